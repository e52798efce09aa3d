"""VoCo as a method: values of the reference, gradients, teacher, logs and pictures."""

import math

import pytest
import torch
from pairs_of_views import figures_of
from small_contrast import GivenMaps, cells_and_targets, given_projector, given_views
from torch import nn

from medssl.data import augment as A
from medssl.data.cells import Cells, Inside
from medssl.data.sampling import Request
from medssl.data.views import ViewPlan
from medssl.methods.voco import VoCo
from medssl.models.pooled import PooledProjector
from medssl.models.resenc import ResidualEncoder

C = torch.arange(8.0, dtype=torch.float64)
K, M = torch.arange(16.0, dtype=torch.float64)[:, None], torch.tensor([[4.0], [8.0]], dtype=torch.float64)
BASE, TARGET = (0.37 * K * (C + 1) + 0.2 * C**2).sin(), (0.37 * M * (C + 1) + 0.2 * C**2 - 1.2).cos()
OLD_BASE = (0.35 * K * (C + 1) + 0.2 * C**2).sin()
OLD_TARGET = (0.37 * M * (C + 1) + 0.2 * C**2 - 1.1).cos()
CELLS = torch.tensor([[96.0 * i, 96.0 * j, 0] for i in range(4) for j in range(4)], dtype=torch.float64)
CORNERS = torch.tensor([[52.0, 152, 0], [102, 12, 0]], dtype=torch.float64)  # of the centres (100, 200) and (150, 60)
EPSILONS = 2e-7
"""The three codes add 1e-6 to different divisors; the values of nnssl and of the first code differ by up to this."""


class Given(nn.Module):
    """An encoder that gives other maps than the image."""

    channels, strides = (8,), (1,)

    def __init__(self, vectors):
        super().__init__()
        self.vectors = vectors

    def forward(self, image):
        return [self.vectors[..., None, None, None]]


def faces(lower):
    """Crops of 96 x 96 x 96 in a field of 384 x 384 x 96, as faces in [0, 1]."""
    field = torch.tensor([384.0, 384, 96], dtype=torch.float64)
    return torch.stack([lower, lower + 96], dim=1)[None] / field


def given(at, base=BASE, target=TARGET, *, corners=CORNERS, cells=CELLS, **options):
    """The output of VoCo whose embeddings are given."""
    return at_places(
        VoCo(encoder=GivenMaps(), projector=given_projector(), **options), at, base, target, corners, cells
    )


def at_places(method, at, base=BASE, target=TARGET, corners=CORNERS, cells=CELLS):
    batch = {"base": given_views(base[None]), "target": given_views(target[None])}
    batch["base"].crop_body, batch["target"].crop_body = faces(cells), faces(corners)
    return method(batch, at())


def small(**options):
    torch.manual_seed(0)
    encoder = ResidualEncoder(in_channels=options.pop("in_channels", 1), widths=(4, 8), blocks=(1, 1))
    head = {"hidden_dim": 16, "out_dim": 8, "norm": options.pop("norm", "layer")}
    return VoCo(encoder=encoder, projector=PooledProjector(encoder.channels, encoder.strides, **head), **options)


@pytest.mark.parity
def test_the_overlaps_that_a_step_trains_on_are_the_reference_labels(at):
    """References card, section 5: centres (100, 200) and (150, 60) in a field of 384, cells of 96."""
    rows = given(lambda: at(with_extras=True)).extras
    assert rows["overlap"].shape == rows["predicted"].shape == (1, 2, 16)
    found = [{k: round(y, 6) for k, y in enumerate(row) if y} for row in rows["overlap"][0].tolist()]
    assert found[0] == {1: 0.190972, 2: 0.267361, 5: 0.225694, 6: 0.315972}
    assert found[1] == {4: 0.820312, 5: 0.117188, 8: 0.054688, 9: 0.007812}


@pytest.mark.parity
def test_the_terms_of_given_embeddings_are_the_reference_values(at):
    """References card, section 5."""
    output = given(at)
    logs = {name: value.item() for name, value in output.logs.items()}
    assert logs["positive"] == pytest.approx(0.512594252, abs=1e-9)
    assert logs["negative"] == pytest.approx(0.064661756, abs=3e-9)
    assert logs["regulariser"] == pytest.approx(0.028392193, abs=1e-9)
    assert output.loss.item() == pytest.approx(sum(logs[name] for name in ("positive", "negative", "regulariser")))


@pytest.mark.parity
def test_the_first_form_and_that_of_nnssl_are_the_reference_values(at):
    first, other = given(at, form="first").logs, given(at, form="nnssl")
    assert (first["positive"] + first["negative"]).item() == pytest.approx(0.532575378, abs=EPSILONS)
    assert first["regulariser"].item() == pytest.approx(0.028392193, abs=1e-9)
    assert (other.logs["positive"] + other.logs["negative"]).item() == pytest.approx(0.577256183, abs=EPSILONS)
    assert other.logs["regulariser"].item() == pytest.approx(0.091618182, abs=1e-9)
    assert other.loss.item() == pytest.approx(0.668874365, abs=EPSILONS)


@pytest.mark.parity
def test_the_teacher_of_the_release_gives_the_reference_values(at):
    method = VoCo(encoder=GivenMaps(), projector=given_projector(), teacher="ema")
    method.teacher_encoder = Given(torch.cat([OLD_BASE, OLD_TARGET]))
    logs = at_places(method, at).logs
    assert logs["positive"].item() == pytest.approx(0.443957711, abs=EPSILONS)
    assert logs["negative"].item() == pytest.approx(0.053188106, abs=EPSILONS)
    assert logs["regulariser"].item() == pytest.approx(0.028392193, abs=1e-9)


def test_the_weights_of_the_terms_scale_them(at):
    weights = {"weight_positive": 2.0, "weight_negative": 0.5, "weight_regulariser": 0.0}
    output = given(at, **weights)
    expected = 2 * output.logs["positive"] + 0.5 * output.logs["negative"]
    torch.testing.assert_close(output.loss, expected)


def test_the_prediction_gives_no_gradient_to_the_bases_without_a_teacher(at):
    base, target = BASE.clone().requires_grad_(), TARGET.clone().requires_grad_()
    given(at, base, target, weight_regulariser=0.0).loss.backward()
    assert base.grad is None or not base.grad.any()
    assert target.grad.abs().sum() > 0
    given(at, base, target).loss.backward()
    assert base.grad.abs().sum() > 0  # of the regulariser


def test_with_a_teacher_targets_and_bases_learn_and_the_teacher_does_not(at):
    method, batch = small(teacher="ema"), cells_and_targets()
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad == (not name.startswith("teacher"))
    pairs = {"teacher_encoder": method.encoder, "teacher_projector": method.projector}
    for name, student in pairs.items():
        own = getattr(method, name).state_dict()
        assert all(torch.equal(own[key], value) for key, value in student.state_dict().items())  # equal at step 0
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.1)
    before = method.teacher_encoder.stem.conv.weight.clone()
    method(batch, at()).loss.backward()
    optimizer.step()
    method.after_step(at())
    expected = 0.9 * before + 0.1 * method.encoder.stem.conv.weight
    torch.testing.assert_close(method.teacher_encoder.stem.conv.weight, expected)
    assert list(method.parts()) == ["encoder", "teacher_encoder"]
    assert list(small().parts()) == ["encoder"]
    base = BASE.clone().requires_grad_()
    method = VoCo(encoder=GivenMaps(), projector=given_projector(), teacher="ema", weight_regulariser=0.0)
    at_places(method, at, base).loss.backward()
    assert base.grad.abs().sum() > 0  # the teacher's targets are compared with the network's bases


def test_order_of_bases_changes_nothing_and_a_base_is_most_similar_to_itself(at):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    expected = given(at)
    permuted = given(at, BASE[order], cells=CELLS[order])
    torch.testing.assert_close(permuted.loss, expected.loss, rtol=1e-12, atol=0)
    same = given(at, target=BASE[[3, 7]], corners=CELLS[[3, 7]])  # targets that are cells
    assert same.logs["positive"].item() == pytest.approx(0, abs=2e-6)
    assert same.logs["accuracy"] == 1
    swapped = given(at, target=BASE[[7, 3]], corners=CELLS[[3, 9]])
    assert swapped.logs["accuracy"] == 0


def test_values_at_collapse_and_chance_stand_beside_the_terms(at):
    equal = given(at, BASE[:1].expand(16, -1), BASE[:1].expand(2, -1)).logs
    assert equal["positive"].item() == pytest.approx(equal["positive_at_collapse"].item(), rel=1e-9)
    assert (equal["negative"].item(), equal["regulariser"].item()) == (pytest.approx(1), pytest.approx(1))
    assert equal["feature_std"].item() == pytest.approx(0, abs=1e-7)
    apart = given(at, torch.eye(8, dtype=torch.float64)[[0, 1] * 8], torch.eye(8, dtype=torch.float64)[[2, 3]]).logs
    assert apart["positive"].item() == pytest.approx(apart["positive_at_chance"].item(), rel=1e-9)
    y = [0.19097222, 0.26736111, 0.22569444, 0.31597222, 0.8203125, 0.1171875, 0.0546875, 0.0078125]
    chance = -sum(value * math.log(1 - value) for value in y) / 2
    assert apart["positive_at_chance"].item() == pytest.approx(chance, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"teacher": "ema"}, {"form": "nnssl", "norm": "batch"}, {"form": "first"}])
def test_every_weight_learns_of_images_of_four_channels_and_the_loss_falls(at, options):
    method = small(in_channels=4, **options)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    batch, losses = cells_and_targets(channels=4, side=8), []
    for _ in range(12):
        output = method(batch, at())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(at())
        losses.append(output.loss.item())
    learned = [p for name, p in method.named_parameters() if p.requires_grad and "bias" not in name]
    assert all(p.grad is not None and p.grad.any() for p in learned)
    assert losses[-1] < losses[0] - 0.2


def test_losses_under_autocast_are_float32_and_near_those_of_full_precision(at):
    method, batch = small(), cells_and_targets(side=8)
    full = method(batch, at())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch, at())
    assert half.loss.dtype == torch.float32
    assert all(value.isfinite() for value in half.logs.values())
    assert half.loss.item() == pytest.approx(full.loss.item(), abs=0.05)
    half.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_flips_and_turns_of_the_crops_keep_the_overlaps(at, noise_store, draw):
    found = []
    for augment in ([], [A.Flip(probability=1), A.Rotate90(probability=1, planes=[[0, 1]])]):
        base = Cells(grid=[2, 2, 2], size=[8, 8, 8], within="body", augment=augment)
        plan = ViewPlan(groups={"base": base, "target": Inside(of="base", count=3, augment=augment)})
        batch = draw(noise_store, plan, [Request((n,), n) for n in range(2)])
        found.append((batch, small().extras(batch, at())["overlap"]))
    (plain, overlap), (turned, same) = found
    assert not torch.equal(plain["base"].image, turned["base"].image)
    torch.testing.assert_close(overlap, same)
    torch.testing.assert_close(overlap.sum(2), torch.ones(2, 3))


def test_pictures_show_overlaps_and_crops(at):
    method, batch = small(), cells_and_targets()
    assert method(batch, at()).extras == {}
    pictures = figures_of(method, batch, at())
    assert list(pictures) == ["crops", "overlaps"]
    extras = method.extras(batch, at())
    shown = [torch.tensor(axes.images[0].get_array()) for axes in pictures["overlaps"].axes[:2]]
    torch.testing.assert_close(shown[0], extras["overlap"][0])
    torch.testing.assert_close(shown[1], extras["predicted"][0])
    k = int(extras["overlap"][0, 0].argmax())
    titles = [axes.get_title() for axes in pictures["crops"].axes if axes.get_title()]
    assert titles[:2] == [
        "target",
        f"largest overlap: base {k},\n{extras['overlap'][0, 0, k]:.2f} true, "
        f"{extras['predicted'][0, 0, k]:.2f} predicted",
    ]


def test_batches_and_settings_that_do_not_fit_are_refused(at):
    batch, method = cells_and_targets(side=8), small()
    for wrong in ({"base": batch["base"]}, batch | {"target": cells_and_targets(side=16)["target"]}):
        with pytest.raises(ValueError, match="VoCo needs a view group `base` of at least two cells"):
            method(wrong, at())
    batch["target"].crop_body = None
    with pytest.raises(ValueError, match="VoCo needs the faces of the crops"):
        method(batch, at())
    for options, message in (
        ({"form": "paper"}, r"method\.form is 'paper', allowed are released, first, nnssl"),
        ({"teacher": "student"}, r"method\.teacher is 'student', allowed are none, ema"),
        ({"ema_momentum": 1.5}, r"method\.ema_momentum is a share"),
        ({"weight_negative": -1.0}, r"method\.weight_negative must be a number from 0 up"),
        ({"crop_voxel": [15, 16, 16]}, r"views.groups.base.size=\[15, 16, 16\] is no multiple of the coarsest stride"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)
