"""What scripts/bench_data.py is compared with: same crop, augmentations and core, each as its library advises.

Volumes lie uncompressed on disk (.nii) for MONAI and TorchIO, as a Blosc2 array of 32^3 blocks for
batchgeneratorsv2: the fastest that each of them reads. A library that is not installed is left out, and said so.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import torch
from bench_data import BATCH, BLUR, CROP, GAMMA, NOISE, ROTATION_DEG, SCALE, per_second

NUM_VOLUMES = 8
Step = Callable[[], int]


def rates_of_others(folder: Path, array: np.ndarray) -> dict[str, float]:
    """Crops a second of every comparison whose libraries are installed."""
    found = {}
    for name, (needs, build) in COMPARED.items():
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        if missing:
            print(f"  left out: {name} ({', '.join(missing)} not installed)")
        else:
            found[name] = per_second(build(folder, array), seconds=20.0)
    return found


def monai_pipeline(folder: Path, array: np.ndarray) -> Step:
    """PersistentDataset caches the deterministic part; the random part follows for every item."""
    import monai.data
    from monai import transforms as T

    angle = math.radians(ROTATION_DEG)
    transform = T.Compose(
        [
            T.LoadImaged("image"),
            T.EnsureChannelFirstd("image"),
            T.ScaleIntensityRanged("image", -1000, 1000, 0.0, 1.0, clip=True),
            T.RandSpatialCropd("image", [CROP] * 3, random_size=False),
            *[T.RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(3)],
            T.RandAffined(
                "image",
                prob=1.0,
                rotate_range=[angle] * 3,
                scale_range=[SCALE[1] - 1] * 3,
                mode="bilinear",
                padding_mode="border",
            ),
            T.RandAdjustContrastd("image", prob=1.0, gamma=GAMMA),
            T.RandGaussianNoised("image", prob=1.0, std=NOISE[1]),
            T.RandGaussianSmoothd("image", prob=1.0, sigma_x=BLUR, sigma_y=BLUR, sigma_z=BLUR),
        ]
    )
    items = [{"image": str(path)} for path in _nifti(folder, array)]
    dataset = monai.data.PersistentDataset(items, transform, cache_dir=folder / "monai")
    return _batches(monai.data.DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=0))


def torchio_pipeline(folder: Path, array: np.ndarray) -> Step:
    """A Queue of patches, eight a volume; the transforms act on the patches, several times faster than on volumes."""
    import torchio as tio

    subjects = [tio.Subject(image=tio.ScalarImage(path)) for path in _nifti(folder, array)]
    dataset = tio.SubjectsDataset(subjects, load_getitem=True)
    sampler = tio.UniformSampler(CROP)
    queue = tio.Queue(dataset, max_length=32, samples_per_volume=8, sampler=sampler, num_workers=0)
    transform = tio.Compose(
        [
            tio.Clamp(-1000, 1000),
            tio.RescaleIntensity((0, 1), in_min_max=(-1000, 1000)),
            tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5),
            tio.RandomAffine(scales=SCALE, degrees=ROTATION_DEG, isotropic=True),
            tio.RandomGamma(log_gamma=(math.log(GAMMA[0]), math.log(GAMMA[1]))),
            tio.RandomNoise(std=NOISE),
            tio.RandomBlur(std=BLUR),
        ]
    )
    loader = tio.SubjectsLoader(queue, batch_size=1, num_workers=0)

    def endless():
        while True:
            yield from loader

    patches = endless()

    def one() -> int:
        crops = []
        for _ in range(BATCH):
            patch = next(patches)["image"][tio.DATA][0]
            crops.append(transform(tio.ScalarImage(tensor=patch)).data)
        torch.stack(crops)
        return BATCH

    return one


def batchgenerators_pipeline(folder: Path, array: np.ndarray) -> Step:
    """A memory-mapped Blosc2 array, cut a little larger than the patch so that turning needs no padding."""
    import blosc2
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    path = folder / "ct.b2nd"
    blosc2.set_nthreads(1)
    parameters = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE]}
    blosc2.asarray(
        np.ascontiguousarray(array), urlpath=str(path), chunks=(64,) * 3, blocks=(32,) * 3, cparams=parameters, mode="w"
    )
    stored = [blosc2.open(str(path), mmap_mode="r", dparams={"nthreads": 1}) for _ in range(NUM_VOLUMES)]
    angle, margin = math.radians(ROTATION_DEG), 12
    transforms = [
        SpatialTransform(
            (CROP,) * 3, 0, False, p_rotation=1, rotation=(-angle, angle),
            p_scaling=1, scaling=SCALE, p_synchronize_scaling_across_axes=1,
        ),
        MirrorTransform((0, 1, 2)),
        GammaTransform(GAMMA, 0, False, 1, 0),
        GaussianNoiseTransform((NOISE[0], NOISE[1])),
        GaussianBlurTransform(BLUR),
    ]  # fmt: skip
    generator = np.random.default_rng(0)
    side = CROP + 2 * margin

    def one() -> int:
        crops = []
        for _ in range(BATCH):
            x, y, z = generator.integers(0, np.array(array.shape) - side)
            volume = stored[generator.integers(NUM_VOLUMES)]
            image = torch.from_numpy(volume[x : x + side, y : y + side, z : z + side][None].astype(np.float32))
            image.clamp_(-1000, 1000).add_(1000).div_(2000)
            for transform in transforms:
                image = transform(image=image)["image"]
            crops.append(image)
        torch.stack(crops)
        return BATCH

    return one


def _nifti(folder: Path, array: np.ndarray) -> list[Path]:
    first = folder / "ct_0.nii"
    if not first.exists():
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), first)
    paths = [first, *(folder / f"ct_{number}.nii" for number in range(1, NUM_VOLUMES))]
    for path in paths[1:]:
        if not path.exists():
            path.symlink_to(first)
    return paths


def _batches(loader: object) -> Step:
    def endless():
        while True:
            yield from loader

    batches = endless()

    def one() -> int:
        next(batches)
        return BATCH

    return one


COMPARED = {
    "MONAI PersistentDataset": (["monai"], monai_pipeline),
    "TorchIO Queue": (["torchio"], torchio_pipeline),
    "Blosc2 + batchgeneratorsv2": (["blosc2", "batchgeneratorsv2"], batchgenerators_pipeline),
}
