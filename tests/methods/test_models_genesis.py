"""Models Genesis: what is predicted from what, with drawn deformations and with given ones."""

from dataclasses import replace

import pytest
import torch
from pairs_of_views import figures_of, global_and_local

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.models_genesis import ModelsGenesis
from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder
from medssl.models.reconstructor import Reconstructor
from medssl.models.resenc import ResidualEncoder
from medssl.models.unet import UNetEncoder
from medssl.ops.deformations import Deformation, Windows, deform

TERMS = ("reconstruction", "error_of_input", "error_of_mean")
CURVE, FOLDED = (0.2, 0.9, 0.7, 0.1), (0.8, 0.1, 0.3, 0.6)
VALUES = (0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1)
MAPPED = {
    (CURVE, True): (0, 0.286890, 0.444174, 0.490993, 0.505105, 0.524190, 0.594011, 0.769718, 1),
    (CURVE, False): (1, 0.713110, 0.555826, 0.509007, 0.494895, 0.475810, 0.405989, 0.230282, 0),
    (FOLDED, True): (0, 0.015820, 0.057570, 0.146370, 0.288676, 0.567595, 0.806835, 0.936731, 1),
    (FOLDED, False): (1, 0.945634, 0.841336, 0.682582, 0.493864, 0.228300, 0.074391, 0.018819, 0),
}
"""Values of two curves at `VALUES`, increasing and decreasing; the second folds back in x."""


def small(*, in_channels=1, output="sigmoid", kind=ModelsGenesis, **options):
    torch.manual_seed(0)
    encoder = ResidualEncoder(in_channels=in_channels, widths=(4, 8, 8), blocks=(1, 1, 1))
    network = Reconstructor(encoder, None, out_channels=in_channels, output=output)
    return kind(network=network, **{"num_windows": 200, **options})


def crops(*, batch=2, channels=1, side=16, seed=0):
    """Smooth pictures in [0, 1]."""
    views = [global_and_local(b=batch, p=1, q=0, seed=seed + n, sides=(side, 0))["global"] for n in range(channels)]
    return {"crop": View.of(torch.cat([view.image for view in views], dim=2))}


class Echo(Reconstructor):
    """A network whose prediction is its image; it keeps what it saw."""

    def __init__(self):
        super().__init__(UNetEncoder(widths=(2, 4)), None)
        self.seen = []

    def forward(self, image):
        self.seen.append(image)
        return image


class Given(ModelsGenesis):
    """Models Genesis whose draws are handed in."""

    def draw(self, image, progress):
        return self.draws


def nothing(image):
    """Draws that change nothing."""
    batch = len(image)
    empty = Windows(*torch.zeros(2, batch, 1, 3, dtype=torch.int64))
    off, on = torch.zeros(batch, dtype=torch.bool), torch.ones(batch, dtype=torch.bool)
    return Deformation(empty, torch.zeros(0), torch.zeros(batch, 4), on, off, empty, on, torch.rand_like(image))


def given(image, **draws):
    """The loss of the prediction that equals the deformed crop, and the network that saw it."""
    method = Given(network=Echo())
    method.draws = nothing(image)._replace(**draws)
    return method({"crop": View.of(image)}, Progress()), method.network


@pytest.mark.parity
@pytest.mark.parametrize(("controls", "increasing"), MAPPED)
def test_the_network_sees_the_released_map_of_intensities_and_the_target_stays(controls, increasing):
    image = torch.tensor(VALUES).view(1, 1, 9, 1, 1)
    before = image.clone()
    curve = {
        "controls": torch.tensor([controls]),
        "increasing": torch.tensor([increasing]),
        "mapped": torch.tensor([True]),
    }
    output, network = given(image, **curve)
    assert network.seen[0].flatten().tolist() == pytest.approx(MAPPED[controls, increasing], abs=1.3e-5)
    assert torch.equal(image, before)
    error = sum((a - b) ** 2 for a, b in zip(MAPPED[controls, increasing], VALUES, strict=True)) / 9
    assert output.loss.item() == pytest.approx(error, rel=1e-3)
    assert output.logs["error_of_mean"].item() == pytest.approx(torch.tensor(VALUES).var(correction=0).item())


@pytest.mark.parity
def test_steps_follow_each_other_as_released_shuffle_then_intensity_then_paint():
    image = torch.linspace(0, 1, 8).view(1, 1, 8, 1, 1)
    window = Windows(torch.tensor([[[0, 0, 0]]]), torch.tensor([[[4, 1, 1]]]))
    kept = Windows(torch.tensor([[[1, 0, 0]]]), torch.tensor([[[5, 1, 1]]]))
    draws = {
        "shuffled": window,
        "keys": torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64),
        "controls": torch.tensor([CURVE]),
        "increasing": torch.tensor([False]),
        "mapped": torch.tensor([True]),
        "painted": kept,
        "inside": torch.tensor([False]),
        "noise": torch.full_like(image, 0.123),
    }
    seen = given(image, **draws)[1].seen[0].flatten().tolist()
    assert (seen[0], seen[6], seen[7]) == pytest.approx((0.123,) * 3)
    shuffled = image.flatten()[[3, 2, 1, 0, 4, 5, 6, 7]].view_as(image)
    mapped = given(shuffled, controls=draws["controls"], increasing=draws["increasing"], mapped=draws["mapped"])
    assert seen[1:6] == pytest.approx(mapped[1].seen[0].flatten().tolist()[1:6])


def test_without_a_deformation_the_prediction_of_the_input_has_no_error():
    output, network = given(torch.rand(2, 1, 16, 16, 16))
    assert output.loss == output.logs["error_of_input"] == 0
    assert output.logs["error_of_mean"] > 0.05
    assert len(network.seen) == 1


def test_the_loss_is_the_squared_error_over_all_voxels_painted_and_not():
    method, batch = small().eval(), crops(batch=3)
    output = method(batch, Progress(step=2))
    image = batch["crop"].image[:, 0]
    seen = deform(image, method.draw(image, Progress(step=2))).painted
    prediction = method.network(seen)
    errors = [(prediction[n, 0, i] - image[n, 0, i]).square().mean().item() for n in range(3) for i in range(16)]
    assert output.loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert output.logs["error_of_input"].item() == pytest.approx((seen - image).square().mean().item(), rel=1e-5)
    assert output.logs.keys() == set(TERMS)


def test_equal_progress_draws_the_same_and_steps_crops_and_ranks_draw_others():
    method, image = small(), torch.rand(1, 1, 16, 16, 16).expand(6, 1, 16, 16, 16).contiguous()

    def seen(**progress):
        return deform(image, method.draw(image, Progress(**progress))).painted

    assert torch.equal(seen(step=3), seen(step=3))
    others = [seen(step=3), seen(step=4), seen(step=3, rank=1), seen(step=3, micro=1), seen(step=3, seed=1)]
    flat = torch.cat(others).flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(len(flat))
    unchanged = (flat == image[0].flatten()).all(1)
    assert (distances[~unchanged] > 0).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.5, 0.9, 0.9, 0.2, 0.5)),
        ({"probability_shuffle": 0.0, "probability_intensity": 0.0}, (0, 0, 0.9, 0.2, 0.5)),
        ({"probability_shuffle": 1.0, "probability_paint": 1.0, "inpaint_share": 1.0}, (1, 0.9, 1, 1, 0.5)),
        ({"inpaint_share": 0.0, "probability_paint": 0.3}, (0.5, 0.9, 0.3, 0, 0.5)),
    ],
)
def test_steps_are_taken_with_their_probabilities(options, expected):
    draws = small(num_windows=1, **options).draw(torch.zeros(2000, 1, 16, 16, 16), Progress())
    painted = (draws.painted.volume() > 0).any(1)
    painted |= ~draws.inside  # out-painting keeps a window; in-painting has none in one of twenty
    shuffled = (draws.shuffled.volume() > 0).any(1)
    found = [part.float().mean().item() for part in (shuffled, draws.mapped, draws.increasing)]
    inner = draws.inside & painted
    if expected[2] * expected[3]:
        share = inner.sum() / painted.sum()
        assert share.item() == pytest.approx(0.95 * expected[3] / (1 - 0.05 * expected[3]), abs=0.04)
    else:
        assert inner.sum() == 0
    assert found == pytest.approx([expected[0], expected[1], expected[4]], abs=0.04)
    assert painted.float().mean().item() == pytest.approx(expected[2] * (1 - 0.05 * expected[3]), abs=0.04)


def test_windows_of_the_shuffle_follow_number_and_divisor():
    draws = small(num_windows=37, window_divisor=4, probability_shuffle=1.0).draw(
        torch.zeros(2, 1, 24, 24, 24), Progress()
    )
    assert draws.shuffled.side.shape == (2, 37, 3)
    assert (draws.shuffled.side.min(), draws.shuffled.side.max()) == (1, 6)


def test_the_loss_falls():
    method = small()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for step in range(24):
        loss = method(crops(), Progress(step=step % 4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@pytest.mark.parametrize("output", ["sigmoid", "linear"])
def test_all_weights_learn_from_four_channels(output):
    method, batch = small(in_channels=4, output=output), crops(channels=4)
    loss = method(batch, Progress()).loss
    loss.backward()
    assert method.network.head.out_channels == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_half_precision_gives_a_finite_loss_in_single_precision():
    method, batch = small(), crops()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(batch, Progress())
        output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(method(batch, Progress()).loss.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in method.parameters())


def slices():
    encoder = MACLUNetEncoder(spatial_dims=2, base_channels=2, num_levels=2)
    fitted = {"encoder_channels": encoder.channels, "encoder_strides": encoder.strides}
    return Reconstructor(encoder, MACLUNetDecoder(in_channels=1, **fitted))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"crop_voxel": (24, 26, 24)},
            r"views.groups.crop.size=\[24, 26, 24\] is no multiple .* \[4, 4, 4\].*\[24,28,24\]",
        ),
        ({"crop_voxel": (32, 12, 32)}, r"at least 16 voxels; take \[32, 16, 32\]"),
        ({"probability_shuffle": 1.5}, "method.probability_shuffle is a share"),
        ({"probability_intensity": -0.1}, "method.probability_intensity must be a number from 0 up"),
        ({"probability_paint": 1.1}, "method.probability_paint is a share"),
        ({"inpaint_share": 2}, "method.inpaint_share is a share"),
        ({"num_windows": 0}, "method.num_windows must be a whole number from 1 up"),
        ({"window_divisor": 17}, "method.window_divisor must be a whole number from 1 to 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused_when_the_method_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_networks_of_slices_and_of_other_channels_are_refused_when_the_method_is_built():
    with pytest.raises(
        ValueError, match=r"MACLUNetEncoder takes slices, Models Genesis .* networks that fit: model=unet [|] resenc"
    ):
        ModelsGenesis(network=slices(), crop_voxel=(16, 16, 16))
    network = Reconstructor(UNetEncoder(in_channels=2, widths=(2, 4)), None, out_channels=1)
    with pytest.raises(ValueError, match=r"out_channels=1: crops have 2 channels, .* give 2"):
        ModelsGenesis(network=network)


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_intensities_outside_of_zero_and_one_are_refused(shift):
    batch = crops()
    batch["crop"] = replace(batch["crop"], image=batch["crop"].image.round() + shift)
    with pytest.raises(ValueError, match=r"in \[0, 1\]; the crops have .*ByModality with out: \[0, 1\]"):
        small()(batch, Progress())


def test_other_groups_of_views_are_refused():
    with pytest.raises(ValueError, match=r"a view group `crop` with one view; the batch has \{'global': 2\}"):
        small()(global_and_local(q=0), Progress())


def test_a_picture_shows_each_step_of_the_deformation_and_the_prediction():
    (figure,) = figures_of(small(), crops(), Progress()).values()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["crop", "shuffled", "mapped", "painted", "prediction"]
    assert small()(crops(), Progress()).extras == {}


def test_a_segmenter_starts_from_the_encoder_and_may_take_the_decoder():
    method = small()
    assert method.transfers().facts == {"decoder_part": "none"}
    assert method.transfers().recipes == {"encoder": "network.encoder", "decoder": "network.decoder"}
    assert method.parts() == {
        "encoder": method.encoder,
        "decoder": method.network.decoder,
        "head": method.network.head,
    }
