"""The rule that fits weights of a stem to another number of input channels."""

from torch import Tensor


def fit_stem(tensors: dict[str, Tensor], key: str, in_channels: int) -> dict[str, Tensor]:
    """Return the tensors with the stem weight `key` (out, channel, ...) fitted to `in_channels`.

    From one channel to many the weight is repeated and divided by their number; from many to one it is summed. In both
    cases an image of equal channels gives the same as the single channel. Any other change is left to the caller's
    comparison of shapes.
    """
    weight = tensors.get(key)
    if weight is None or weight.ndim < 2 or weight.shape[1] == in_channels:
        return tensors
    if weight.shape[1] == 1:
        return {**tensors, key: weight.expand(-1, in_channels, *weight.shape[2:]) / in_channels}
    if in_channels == 1:
        return {**tensors, key: weight.sum(1, keepdim=True)}
    return tensors
