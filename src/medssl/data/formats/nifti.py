"""NIfTI files, by nibabel."""

import gzip
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from medssl.data.formats.base import Header, Load, ReadError, sides_and_channels
from medssl.data.formats.claims import check_claim


def open_nifti(path: Path) -> tuple[Header, Load]:
    """Return the header of a NIfTI file, and the function that loads its voxels."""
    import nibabel

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # header repairs of no consequence
    try:
        image: Any = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ReadError(path, "the file is not a NIfTI image, whatever its name says") from error
    proxy, dtype = image.dataobj, image.header.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = {"c": "complex numbers", "V": "colours"}.get(dtype.kind, f"of type {dtype}")
        raise ReadError(path, f"the voxels are {kind}; grey values are needed")
    scaled = (proxy.slope, proxy.inter) != (1, 0)
    whole = dtype.kind in "iu" and float(proxy.slope).is_integer() and float(proxy.inter).is_integer()
    shape, num_channels = sides_and_channels(path, image.shape)
    header = Header(shape, num_channels, image.affine.astype(np.float64), dtype.itemsize, whole)
    check_claim(path, header, held_in=path.stat().st_size)
    needed, found = math.prod(image.shape) * dtype.itemsize + proxy.offset, path.stat().st_size
    if not path.name.lower().endswith(".gz") and needed > found:
        raise ReadError(path, f"the file is truncated: its voxels need {needed:,} bytes, it has {found:,}")
    layout = ((*shape, num_channels), dtype, proxy.offset, proxy.slope, proxy.inter)

    def load(channel: int | None) -> Shaped[np.ndarray, "x y z c"]:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            voxels = nibabel.arrayproxy.ArrayProxy(stream, layout, mmap=False)
            if channel is not None:
                array = np.asarray(voxels[..., channel : channel + 1])
            else:
                array = np.asarray(voxels, dtype=np.float32 if scaled else None)
            while stream.read(2**20):  # the checksum stands at the end
                pass
        return array.astype(np.float32 if scaled or dtype.itemsize > 8 else dtype.newbyteorder("="), copy=False)

    return header, load
