"""The three losses of Alice: contrast of matched crops, contrast of tokens within a crop, and reconstruction."""

from jaxtyping import Float
from torch import Tensor

from medssl.losses.consistency import centred_softmax, cross_entropy_of_views


def inter_volume_loss(
    student: Float[Tensor, "view batch prototype"],
    teacher: Float[Tensor, "view batch prototype"],
    centre: Float[Tensor, "1 prototype"],
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """Return the cross-entropy between the student's logits of one view and the teacher's of the other, both ways.

    The views hold the same anatomy in different volumes. Mean over the batch and over ordered pairs of different views,
    in nats. Gradient flows to `student` only.

    Source: repository alibaba-damo-academy/alice, loss.py (class term).
    """
    target = centred_softmax(teacher, centre, temperature=teacher_temperature)
    return cross_entropy_of_views(student, target, temperature=student_temperature, pairs="cross")


def intra_volume_loss(
    student: Float[Tensor, "row token prototype"],
    teacher: Float[Tensor, "row token prototype"],
    centre: Float[Tensor, "1 prototype"],
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """Return the cross-entropy between the student's aligned tokens and the teacher's of the same crop and place.

    Mean over all tokens, masked or visible, of all crops, in nats. Gradient flows to `student` only.

    Source: repository alibaba-damo-academy/alice, loss.py (patch term).
    """
    target = centred_softmax(teacher, centre, temperature=teacher_temperature)
    rows = student.flatten(0, 1)[None], target.flatten(0, 1)[None]
    return cross_entropy_of_views(*rows, temperature=student_temperature, pairs="same")


def halved_mse(
    reconstruction: Float[Tensor, "batch channel x y z"], image: Float[Tensor, "batch channel x y z"]
) -> Float[Tensor, ""]:
    """Return half the squared error, averaged over all voxels, masked or visible.

    Half precision is computed in float32.

    Source: repository alibaba-damo-academy/alice, loss.py (reconstruction term).
    """
    reconstruction, image = (x.float() if x.dtype.itemsize < 4 else x for x in (reconstruction, image))
    return 0.5 * (reconstruction - image).square().mean()
