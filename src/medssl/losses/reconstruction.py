"""The loss of masked autoencoders, such as GL-MAE's: reconstruction of masked patches."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
