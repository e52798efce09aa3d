"""`input=phantom:SEED`: a scan to try a network on where none is at hand."""

import re
from pathlib import Path

import numpy as np

from medssl.inference.files import save_image
from medssl.phantoms.torso import draw_phantom


def drawn_phantom(given: Path, output_dir: Path) -> Path:
    """Return the path of the scan: `given`, or for `phantom:SEED` the phantom of that seed, drawn as a NIfTI file.

    Image and true label map lie in `phantoms/images` and `phantoms/labels` of `output_dir`; they are synthetic.
    `data=phantoms` draws the seeds 0 to 31; networks that were trained on it have not seen other seeds.
    """
    wanted = re.fullmatch(r"phantom:(\d+)", str(given))
    if wanted is None:
        return given
    volume, label = draw_phantom(int(wanted[1]))
    for kind, array in (("labels", label), ("images", volume.array[0])):
        path = output_dir / "phantoms" / kind / f"phantom_{int(wanted[1]):04d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, array, volume.affine)
    return path


def _write(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    import nibabel

    image = nibabel.Nifti1Image(array, affine)  # type: ignore[attr-defined]
    image.header.set_xyzt_units("mm")
    save_image(path, image)
