import io
import math
from dataclasses import replace

import pytest
import torch
from pairs_of_views import figures_of
from small_mae import FORMS, crops, make_mae
from torch import nn

from medssl.data.views import View
from medssl.losses.reconstruction import masked_mse
from medssl.methods.mae import MAE
from medssl.models.resenc import ResidualEncoder
from medssl.models.unet import UNetEncoder
from medssl.ops.masking import voxel_mask
from medssl.ops.patches import patchify

every_form = pytest.mark.parametrize("form", FORMS)


def image_of(batch):
    return batch["crop"].image.flatten(0, 1)


class Constant(nn.Module):
    """Predicts the same volume for any image."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, image, *mask):
        return self.prediction.expand_as(image)


G1 = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1]], dtype=torch.bool)
"""Hidden cells of the references card, 1."""


@pytest.mark.parity
@pytest.mark.parametrize(
    ("zero", "norm_pix", "expected"),
    [(False, False, 0.936785670667), (True, False, 0.455423430334), (False, True, 1.475905432637)],
)
@every_form
def test_the_card_s_volume_and_mask_give_its_losses_through_the_method(form, zero, norm_pix, expected, at):
    n = torch.arange(512, dtype=torch.float64)
    image, prediction = (x.reshape(1, 1, 8, 8, 8) for x in (torch.cos(0.05 * n), torch.sin(0.1 * n)))
    method = make_mae(form, mask=G1, norm_pix=norm_pix)
    method.network = Constant(torch.zeros_like(image) if zero else prediction)
    output = method({"crop": View.of(image)}, at())
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)
    if not norm_pix:
        assert output.logs["zero_prediction"].item() == pytest.approx(0.455423430334, abs=1e-12)


@every_form
def test_hidden_voxels_have_no_influence_on_the_prediction_and_visible_ones_have(form, at):
    method, batch = make_mae(form, **({"fill": "mean"} if form == "cnn" else {})).eval(), crops()
    image = image_of(batch)
    mask = method._mask(image, at())
    hidden = method._hidden(mask, image)
    noise = torch.randn_like(image)
    prediction = method.predict(image, mask)
    assert torch.equal(method.predict(torch.where(hidden, image + noise, image), mask), prediction)
    assert torch.equal(method.predict(torch.where(hidden, torch.nan, image), mask), prediction)
    assert not torch.allclose(method.predict(torch.where(hidden, image, image + noise), mask), prediction, atol=1e-3)


@every_form
def test_visible_voxels_of_the_target_do_not_enter_the_loss_nor_get_a_gradient(form, at):
    batch = crops()
    image = image_of(batch)
    method = make_mae(form)
    hidden = method._hidden(method._mask(image, at()), image)
    prediction = nn.Parameter(torch.zeros_like(image))
    method.network = Constant(prediction)
    loss = method(batch, at()).loss
    loss.backward()
    assert torch.equal(prediction.grad != 0, hidden)
    changed = torch.where(hidden, image, image + torch.randn_like(image))
    assert method({"crop": View.of(changed)}, at()).loss.item() == loss.item()
    changed = torch.where(hidden, image + 1, image)
    assert method({"crop": View.of(changed)}, at()).loss.item() != loss.item()


@pytest.mark.parametrize("norm_pix", [True, False])
@every_form
def test_the_loss_is_that_of_masked_patches_of_the_size_of_the_blocks(form, norm_pix, at):
    method, batch = make_mae(form, norm_pix=norm_pix, in_channels=2), crops(channels=2)
    image = image_of(batch)
    mask = method._mask(image, at())
    patches = patchify(method.predict(image, mask), 4)
    expected = masked_mse(patches, patchify(image, 4), mask.masked, norm_pix=norm_pix)
    assert method(batch, at()).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@every_form
def test_masks_differ_between_samples_steps_and_ranks_and_come_again(form, at):
    method, image = make_mae(form), image_of(crops(b=2, v=2))
    masked = method._mask(image, at()).masked
    assert masked.shape == (4, 64)
    assert masked.sum(1).tolist() == [48] * 4
    assert len({tuple(row.tolist()) for row in masked}) == 4
    assert torch.equal(masked, method._mask(image, at()).masked)
    for other in (at(1), at(rank=1), at(micro=1), at(seed=1)):
        assert not torch.equal(masked, method._mask(image, other).masked)
    assert torch.equal(masked, method.eval()._mask(image, at()).masked)
    assert torch.equal(method._mask(image, at(draw=3)).masked, method._mask(image, at(3)).masked)


def test_kept_blocks_are_those_with_the_least_noise(at):
    """References card, 1 (G3)."""
    method, image = make_mae(), image_of(crops())
    noise = torch.rand(2, 64, generator=at().generator("mask"))
    assert torch.equal(method._mask(image, at()).keep, noise.argsort(dim=1, stable=True)[:, :16])


def test_a_range_of_ratios_draws_one_for_all_samples_of_a_step_on_all_ranks(at):
    method, image = make_mae(mask_ratio=[0.3, 0.9]), image_of(crops(b=3))
    counts = [method._mask(image, at(step)).masked.sum(1).tolist() for step in range(20)]
    assert all(len(set(row)) == 1 for row in counts)
    assert min(counts)[0] < 28 < 48 < max(counts)[0]
    assert 64 * 0.3 <= min(counts)[0] <= max(counts)[0] <= math.ceil(64 * 0.9)
    for other in (at(7, rank=1), at(7, micro=1)):
        assert method._mask(image, other).masked.sum(1).tolist() == counts[7]
    logged = method(crops(b=3), at(7)).logs["mask_ratio"].item()
    assert logged == pytest.approx(counts[7][0] / 64)


@every_form
def test_the_error_everywhere_counts_visible_voxels_too(form, at):
    batch = crops()
    method = make_mae(form, loss_on="everywhere", error="l1")
    image = image_of(batch)
    prediction = method.predict(image, method._mask(image, at()))
    output = method(batch, at())
    assert output.loss.item() == pytest.approx((prediction - image).abs().mean().item(), rel=1e-5)
    assert output.logs["zero_prediction"].item() == pytest.approx(image.abs().mean().item(), rel=1e-5)


@every_form
def test_voxels_beyond_the_volume_do_not_count_where_the_view_knows_them(form, at):
    batch = crops()
    valid = torch.ones(2, 1, 1, 16, 16, 16, dtype=torch.bool)
    valid[0, ..., 10:, :, :] = False
    method, image = make_mae(form), image_of(batch)
    mask = method._mask(image, at())
    counted = method._hidden(mask, image) & valid[:, 0]
    expected = (method.predict(image, mask) - image).square()[counted].mean()
    batch["crop"].valid = valid
    assert method(batch, at()).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    batch["crop"].valid = torch.zeros_like(valid)
    assert method(batch, at()).loss.item() == 0


def test_a_filled_image_is_what_the_u_net_sees(at):
    batch = crops()
    image = image_of(batch)
    for fill in ("zero", "mean"):
        method, seen = make_mae(fill=fill), []
        method.encoder.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        method(batch, at())
        hidden = method._hidden(method._mask(image, at()), image)
        assert torch.equal(seen[0][~hidden], image[~hidden])
        means = [
            picture[~hole].mean().item() if fill == "mean" else 0.0 for picture, hole in zip(image, hidden, strict=True)
        ]
        for shown, hole, mean in zip(seen[0], hidden, means, strict=True):
            assert shown[hole].tolist() == pytest.approx([mean] * int(hole.sum()), abs=1e-6)


@every_form
def test_every_weight_learns_from_four_channels_and_the_error_is_their_mean(form, at):
    method, batch = make_mae(form, in_channels=4), crops(channels=4)
    output = method(batch, at())
    output.loss.backward()
    still = {name for name, p in method.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0}
    assert not still
    image = image_of(batch)
    mask = method._mask(image, at())
    hidden, prediction = method._hidden(mask, image)[:, 0], method.predict(image, mask)
    apart = [(prediction - image)[:, channel].square()[hidden].mean().item() for channel in range(4)]
    assert output.loss.item() == pytest.approx(sum(apart) / 4, rel=1e-5)


@every_form
def test_the_loss_under_autocast_is_float32_and_near_that_of_full_precision(form, at):
    method, batch = make_mae(form), crops()
    full = method(batch, at())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch, at())
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.03)
    half.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


@every_form
def test_the_order_of_the_samples_does_not_matter(form, at):
    masked = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 48
    batch, order = crops(b=3), [2, 0, 1]
    shuffled = {"crop": View.of(batch["crop"].image[order])}
    found = make_mae(form, mask=masked)(batch, at()).loss.item()
    assert make_mae(form, mask=masked[order])(shuffled, at()).loss.item() == pytest.approx(found, rel=1e-5)
    views = {"crop": View.of(batch["crop"].image.transpose(0, 1))}  # three crops of one volume
    assert make_mae(form, mask=masked)(views, at()).loss.item() == pytest.approx(found, rel=1e-6)


@every_form
def test_a_restart_from_a_checkpoint_continues_bit_for_bit(form, at):
    def step(method, optimizer, number):
        torch.manual_seed(number)  # as the training module does, for dropped paths
        method(crops(seed=number), at(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def build():
        method = make_mae(form, drop_path=0.5, mask_ratio=[0.6, 0.9])
        return method, torch.optim.AdamW(method.param_groups(), lr=1e-3)

    (straight, optimizer), file = build(), io.BytesIO()
    for number in range(4):
        step(straight, optimizer, number)
        if number == 1:
            torch.save({"method": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    resumed, optimizer = build()
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    for number in (2, 3):
        step(resumed, optimizer, number)
    again = resumed.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in straight.state_dict().items())


@pytest.mark.parametrize(
    ("form", "steps", "rate", "share"), [("cnn", 30, 1e-2, 0.7), ("vit", 40, 3e-3, 0.9), ("simmim", 40, 3e-3, 0.9)]
)
def test_the_loss_falls(form, steps, rate, share, at):
    method, losses = make_mae(form), []
    optimizer = torch.optim.AdamW(method.param_groups(), lr=rate)
    for step in range(steps):
        output = method(crops(b=4, seed=step % 4), at(step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert sum(losses[-5:]) < share * sum(losses[:5])


@pytest.mark.parametrize("norm_pix", [True, False])
@every_form
def test_figures_show_input_masked_and_reconstruction(form, norm_pix, at):
    method, batch = make_mae(form, norm_pix=norm_pix), crops()
    (figure,) = figures_of(method, batch, at(7)).values()
    assert figure.get_suptitle() == "75% hidden, step 7"
    assert [axis.get_title() for axis in figure.axes[:3]] == ["input", "masked", "reconstruction"]
    image = batch["crop"].image[0, 0, 0]
    for row in range(3):
        shown, masked, rebuilt = (figure.axes[3 * row + column].images[0].get_array() for column in range(3))
        assert torch.equal(torch.as_tensor(shown.data), image.select(row, 8).T.flip(0))
        assert 0 < masked.mask.mean() < 1
        assert (rebuilt.data[~masked.mask] == shown.data[~masked.mask]).all()
        assert (rebuilt.data[masked.mask] != shown.data[masked.mask]).any()
    perfect = method.extras(batch, at()) | {"prediction": method._target(image_of(batch))}
    axes = method.figures(batch, perfect, at())["crop"].axes
    assert abs(axes[0].images[0].get_array() - axes[2].images[0].get_array()).max() < 1e-5
    assert method(batch, replace(at(), with_extras=False)).extras == {}


def test_the_parts_are_the_networks_of_the_form():
    assert [list(make_mae(form).parts()) for form in FORMS] == [
        ["encoder", "decoder", "head"],
        ["encoder", "decoder"],
        ["encoder", "head"],
    ]
    transfers = [list(make_mae(form).transfers().recipes) for form in FORMS]
    assert transfers == [["encoder", "decoder"], ["encoder"], ["encoder"]]
    assert [len(make_mae(form).param_groups()) for form in FORMS] == [1, 2, 1]


def test_a_batch_without_crops_is_refused(at):
    with pytest.raises(ValueError, match=r"needs a view group called `crop`; the batch has \['global'\]"):
        make_mae()({"global": crops()["crop"]}, at())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cnn", "fill": "noise"}, "method.fill is 'noise', allowed are zero, mean"),
        ({"loss_on": "visible"}, "method.loss_on is 'visible', allowed are hidden, everywhere"),
        ({"error": "ssim"}, "method.error is 'ssim', allowed are mse, l1"),
        ({"mask_ratio": 0.0}, "method.mask_ratio=0.0 must lie between 0 and 1"),
        ({"mask_ratio": [0.9, 0.6]}, r"method.mask_ratio=\[0.9, 0.6\] must lie between 0 and 1"),
        ({"block_voxel": 0}, "method.block_voxel=0 must be three whole numbers above 0"),
        ({"form": "vit", "block_voxel": 8}, r"block_voxel=\[8, 8, 8\] must be method.encoder.patch_voxel=\[4, 4, 4\]"),
        ({"crop_voxel": [16, 18, 16]}, r"size=\[16, 18, 16\] is no multiple of method.block_voxel, .*\[16,20,16\]"),
        ({"block_voxel": 3, "crop_voxel": [15, 15, 15]}, r"coarsest stride of UNetEncoder, which .*\[16,16,16\]"),
        ({"block_voxel": 16, "crop_voxel": [16, 16, 16]}, "a mask ratio of 0.75 keeps 0 of 1 tokens"),
        ({"mask_ratio": [0.6, 0.99], "crop_voxel": [16, 16, 16]}, "a mask ratio of 0.99 keeps 0 of 64 tokens"),
    ],
)
def test_what_cannot_work_is_refused_when_the_method_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        make_mae(**options)


def test_networks_that_do_not_fit_a_form_are_refused_with_those_that_do():
    plain, vit = UNetEncoder(widths=(4, 8)), make_mae("vit").network
    simmim = make_mae("simmim").encoder
    for options, message in (
        ({"encoder": plain, "form": "vit"}, "trains a VisionTransformer, not UNetEncoder; take method=mae_vit;"),
        ({"encoder": vit.encoder, "form": "vit"}, "needs a MaskedDecoder as method.decoder"),
        ({"encoder": vit.encoder, "decoder": vit.decoder}, "method.form=cnn takes no MaskedDecoder"),
        ({"encoder": simmim, "decoder": vit.decoder, "form": "simmim"}, "give method.decoder=null"),
        ({"encoder": nn.Identity()}, "Identity does not describe its maps by `channels` and `strides`"),
    ):
        with pytest.raises(ValueError, match=message):
            MAE(**{"block_voxel": 4, **options})
    plain.takes_coordinate = True
    with pytest.raises(ValueError, match=r"UNetEncoder reads coordinates beside the image, .* model=unet [|] resenc"):
        MAE(encoder=plain)
    plain.takes_coordinate, plain.strides = False, ((1, 1), (2, 2))
    with pytest.raises(ValueError, match="UNetEncoder takes slices, MAE trains on volumes: spatial_dims must be 3"):
        MAE(encoder=plain)
    deep = ResidualEncoder(widths=(4, 4, 4), blocks=(1, 1, 1), strides=(1, 4, 4))
    with pytest.raises(ValueError, match=r"crop.size=\[16, 16, 16\] does not fit ResidualEncoder: .* a single voxel"):
        MAE(encoder=deep, block_voxel=4, crop_voxel=[16, 16, 16])


def test_blocks_and_crops_may_differ_by_axis(at):
    method = make_mae(block_voxel=[8, 4, 2], crop_voxel=[16, 16, 16])
    image = image_of(crops())
    mask = method._mask(image, at())
    assert mask.masked.shape == (2, 2 * 4 * 8)
    assert torch.equal(method._hidden(mask, image), voxel_mask(mask.masked.unflatten(1, (2, 4, 8))[:, None], (16,) * 3))


@pytest.mark.parametrize("form", ["vit", "simmim"])
def test_a_fill_that_the_form_does_not_use_is_refused(form):
    with pytest.raises(ValueError, match=r"method\.fill=mean is for form=cnn"):
        make_mae(form, fill="mean")
