"""Keypoints of phantoms made of blobs, through the views of the configuration."""

import numpy as np
from hydra.utils import instantiate
from omegaconf import OmegaConf

from medssl.config import compose
from medssl.data.scene import Request
from medssl.data.store import VolumeStore
from medssl.methods.base import Progress
from medssl.methods.kaf_points import PointRule
from medssl.models.keypoints import DifferenceOfGaussians
from medssl.tables.derived import derive
from medssl.tables.keypoints import KeypointTables

SIDE, STEP, REACH = 80, 16, 4


def blobs(*, seed):
    """Bright Gaussian blobs on a disturbed grid (1 x y z), in HU."""
    generator = np.random.default_rng(seed)
    centres = np.stack(np.meshgrid(*[np.arange(8, SIDE, STEP)] * 3), axis=-1).reshape(-1, 3)
    axis = np.arange(SIDE)
    image = np.full((SIDE, SIDE, SIDE), -100.0)
    for x, y, z in centres + generator.uniform(-2, 2, centres.shape):
        a, b, c = (np.exp(-((axis - place) ** 2) / (2 * 1.5**2)) for place in (x, y, z))
        image += 250 * a[:, None, None] * b[:, None] * c
    return image.round().astype(np.int16)[None]


def centroid(image, point):
    """The centroid of the blob at a point: of what surrounds the brightest voxel near it; None at the border."""
    corner = np.round(point).astype(int) - 3
    if (corner < 0).any() or (corner + 7 > image.shape).any():
        return None
    near = image[tuple(slice(start, start + 7) for start in corner)]
    top = np.array(np.unravel_index(near.argmax(), near.shape)) + corner
    if (top < REACH).any() or (top + REACH >= image.shape).any():
        return None
    weights = image[tuple(slice(start - REACH, start + REACH + 1) for start in top)] - image.min()
    grid = np.stack(np.meshgrid(*[np.arange(-REACH, REACH + 1)] * 3, indexing="ij"))
    return top + (grid * weights).sum((1, 2, 3)) / weights.sum()


def test_matched_points_of_two_augmented_views_lie_on_the_same_blob_in_both(make_store, draw):
    made = make_store(blobs(seed=0), blobs(seed=1))
    table = KeypointTables(detector=DifferenceOfGaussians(value_range=(0, 1)), num_points=256)
    derive(made.root, table, num_workers=0, progress=False)
    config = compose("pretrain", ["~data", "method=kaf", "views.groups.first.size=[40,40,40]"])
    (moving,) = (a for a in config.views.groups.first.augment if a._target_.endswith("Sometimes"))
    moving.probability = 1.0
    plan = instantiate(OmegaConf.to_container(config.views, resolve=True), _convert_="all")
    views = draw(VolumeStore(made.root), plan, [Request(cases=(n % 2,), sample=n) for n in range(6)])
    assert all(view.displacement is not None for view in views.values())
    rule = PointRule(max_points=64)
    points = rule(views["first"], views["second"], Progress(0, 10, 0.0, 10.0, 0), is_random=True)
    apart = []
    for sample, i, j in points.pairs[(points.pairs >= 0).all(1)].tolist():
        places = {"first": points.first[sample, i], "second": points.second[sample, j]}
        images = {name: views[name].image[sample, 0, 0].numpy() for name in places}
        found = {name: centroid(images[name], place.numpy()) for name, place in places.items()}
        if all(middle is not None for middle in found.values()):
            apart.append([np.linalg.norm(found[name] - places[name].numpy()) for name in places])
    assert len(apart) >= 20
    assert np.max(apart) < 1.0
