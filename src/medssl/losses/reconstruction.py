"""The losses of masked autoencoders, such as GL-MAE's: reconstruction of masked patches, or of any voxels."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from medssl.checks import choice

ERRORS = ("mse", "l1")


def patch_statistics(
    patches: Float[Tensor, "batch token voxel"],
) -> tuple[Float[Tensor, "batch token 1"], Float[Tensor, "batch token 1"]]:
    """Return mean and standard deviation of each patch vector; 1e-6 is added to the unbiased variance."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def masked_mse(
    prediction: Float[Tensor, "batch token voxel"],
    target: Float[Tensor, "batch token voxel"],
    masked: Bool[Tensor, "batch token"],
    *,
    norm_pix: bool = True,
) -> Float[Tensor, ""]:
    """Return the squared error averaged over the voxels of each masked patch, then over all masked patches.

    With `norm_pix` the mean of each target patch is subtracted and the patch divided by its standard deviation. Half
    precision is computed in float32. The loss is zero, with a gradient of zero, where nothing is masked.

    Source: arXiv:2111.06377.
    """
    prediction, target = (x.float() if x.dtype.itemsize < 4 else x for x in (prediction, target))
    if norm_pix:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (prediction - target).square().mean(2)
    return (error * masked).sum() / masked.sum().clamp(min=1)


def voxel_error(
    prediction: Float[Tensor, "batch channel x y z"],
    target: Float[Tensor, "batch channel x y z"],
    counted: Bool[Tensor, "batch 1 x y z"],
    *,
    error: str = "mse",
    num_counted: Shaped[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Return the squared or absolute error, averaged over the channels and over the counted voxels of the whole batch.

    Half precision is computed in float32. The loss is zero, with a gradient of zero, where no voxel counts.

    Args:
        prediction: Predicted values.
        target: True values.
        counted: Voxels that count.
        error: `mse` for the squared, `l1` for the absolute error.
        num_counted: Number that the sum is divided by; None for that of the counted voxels of this batch.

    Raises:
        ValueError: The error is not known.

    Source: arXiv:2410.23132; arXiv:2111.09886 for the absolute error.
    """
    prediction, target = (x.float() if x.dtype.itemsize < 4 else x for x in (prediction, target))
    distance = prediction - target
    distance = distance.square() if choice("error", error, ERRORS) == "mse" else distance.abs()
    total = (distance.mean(1, keepdim=True) * counted).sum()
    return total / (counted.sum() if num_counted is None else num_counted).clamp(min=1)
