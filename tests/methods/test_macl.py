import math
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import torch
from oracles.macl_network import fill, golden_images, published_shapes
from pairs_of_views import figures_of

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.macl import MACL
from medssl.methods.positions import PositionRule
from medssl.methods.watch import WATCHED_STEPS
from medssl.models.macl_heads import MACLHeads
from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder
from medssl.models.partial_unet import PartialUNet
from medssl.weights import load_parts

TERMS = ("global", "dense", "equivariance")
COLLAPSE = (0.1 / 0.07) * math.log(7)  # of four samples, eight rows
ALONG_Z = PositionRule(axes=["z"], threshold=0.1)
NOW = Progress(0, 10, 0.0, 1.0, 0)


def make(*, spatial_dims=3, in_channels=1, base_channels=2, num_levels=2, num_blocks=1, heads=None, **options):
    torch.manual_seed(0)
    sizes = {"in_channels": in_channels, "base_channels": base_channels, "num_levels": num_levels}
    encoder = MACLUNetEncoder(spatial_dims=spatial_dims, **sizes)
    decoder = MACLUNetDecoder(
        in_channels=in_channels, encoder_channels=encoder.channels, encoder_strides=encoder.strides
    )
    backbone = PartialUNet(encoder, decoder, num_blocks=num_blocks)
    widths = {"bottleneck_channels": backbone.bottleneck_channels, "decoded_channels": backbone.decoded_channels}
    sizes = {**widths, "spatial_dims": spatial_dims, "hidden_dim": 8, "proj_dim": 6, **(heads or {})}
    return MACL(
        backbone=backbone,
        heads=MACLHeads(**sizes),
        **{"positions": ALONG_Z, **options},
    )


def view(*images, z=(0.1, 0.15, 0.5, 0.95)):
    """Views of samples at heights z."""
    image = torch.stack(images, dim=1)  # (b v c x y z)
    return View.of(image, location_body=[[[0.5, 0.5, height]] for height in z])


def batch(*, side=8, seed=0, **options):
    """Smooth pictures: one view that both branches see, and two others."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, 4, 1, 4, 4, 4, generator=generator)
    still, *noise = (torch.nn.functional.interpolate(c, size=(side,) * 3, mode="trilinear") for c in coarse)
    first, second = (0.8 * still + 0.2 * other for other in noise)
    return {"still": view(still, **options), "moved": view(first, second, **options)}


def part(group, index):
    """Some samples of a view."""
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return View(**{name: None if value is None else value[index] for name, value in values.items()})


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The published network with formula weights, in slices and float64, and what a step of it gives."""
    method = make(
        spatial_dims=2, base_channels=4, num_levels=4, num_blocks=2, heads={"hidden_dim": 16, "proj_dim": 4}
    ).double()
    file = tmp_path_factory.mktemp("golden") / "macl.pth"
    torch.save({"net": fill(published_shapes(base=4, proj_dim=4))}, file)
    reports = load_parts(file, method.parts(), layout="macl")
    images = [image[..., None] for image in golden_images()]  # slices have a third axis of one voxel
    views = {name: view(image) for name, image in zip(("still", "still_dominant"), images[:2], strict=True)}
    output = method({**views, "moved": view(*images[2:])}, NOW)
    output.loss.backward()
    return method, output, reports


@pytest.mark.parity
def test_the_published_network_with_formula_weights_gives_the_recorded_losses(golden):
    method, output, reports = golden
    assert sum(p.numel() for p in method.parameters()) == 135_192
    assert len(list(method.parameters())) == 92
    assert [len(report.matched) for report in reports] == [60, 64, 22]  # 146 entries
    assert output.logs["global"].item() == pytest.approx(3.125971, abs=1e-6)
    assert output.logs["dense"].item() == pytest.approx(6.340061, abs=1e-6)
    assert output.logs["equivariance"].item() == pytest.approx(0.077760, abs=1e-6)
    assert output.loss.item() == pytest.approx(6.373762, abs=1e-6)


@pytest.mark.parity
def test_its_maps_and_embeddings_have_the_recorded_shapes_means_and_deviations(golden):
    method = deepcopy(golden[0])  # whose norms may count further calls
    full, small, moved, moved_small = (image[..., None] for image in golden_images())
    with torch.no_grad():
        auxiliary, dominant, decoded = method._branches(full, method._small(small))
        places = method.heads.places(auxiliary, decoded)
        images = method.heads.images(*method._branches(moved, method._small(moved_small)))
    recorded = [
        (auxiliary, (4, 64, 8, 8), 0.107365, 0.151868),
        (places[0], (4, 16, 8, 8), 0.370002, 0.603442),
        (images[0], (4, 4), 0.000616, 0.010890),
        (dominant, (4, 64, 2, 2), 0.033108, 0.056777),
        (places[1], (4, 16, 8, 8), 0.394556, 0.586683),
        (images[1], (4, 4), -0.001892, 0.104619),
    ]
    for tensor, shape, mean, deviation in recorded:
        assert tensor.shape == shape
        assert (tensor.mean().item(), tensor.std().item()) == pytest.approx((mean, deviation), abs=1e-6)


@pytest.mark.parity
def test_its_gradients_have_the_recorded_norms(golden):
    encoder, decoder = golden[0].backbone.encoder, golden[0].backbone.decoder
    assert encoder.center[0].weight.grad.norm().item() == pytest.approx(197.211927, abs=1e-6)
    assert encoder.stages[0][0].conv.weight.grad.norm().item() == pytest.approx(51.818676, abs=1e-6)
    assert decoder.ups[-1].weight.grad.norm().item() == pytest.approx(0.031289, abs=1e-6)


@pytest.mark.parity
def test_blocks_beyond_the_second_get_no_gradient_and_norms_count_their_calls(golden):
    method = golden[0]
    idle = {name for name, p in method.named_parameters() if p.grad is None}
    blocks = ("ups.0.", "ups.1.", "stages.0.", "stages.1.")
    assert idle == {
        n for n, _ in method.named_parameters() if n.startswith(tuple(f"backbone.decoder.{b}" for b in blocks))
    }
    assert not any(dict(method.named_parameters())[name].requires_grad for name in idle)
    counts = {name: int(n) for name, n in method.named_buffers() if name.endswith("num_batches_tracked")}
    for start, calls in (("backbone.encoder", 4), ("backbone.decoder", 2), ("heads.auxiliary_pixel", 1)):
        found = {n for name, n in counts.items() if name.startswith(start) and not name.startswith(tuple_of(idle))}
        assert found == {calls}, start
    assert {counts[f"backbone.decoder.stages.{level}.1.norm.num_batches_tracked"] for level in (0, 1)} == {0}


def tuple_of(names):
    return tuple({name.rsplit(".", 2)[0] for name in names if ".norm." in name})


@pytest.mark.parity
@pytest.mark.parametrize(
    ("options", "heads", "count"),
    [
        ({"spatial_dims": 2, "base_channels": 32, "num_levels": 4, "num_blocks": 2}, {}, 8_616_576),
        ({"in_channels": 4, "spatial_dims": 2, "base_channels": 32, "num_levels": 4, "num_blocks": 2}, {}, 8_617_440),
        ({"base_channels": 32, "num_levels": 4, "num_blocks": 2}, {}, 24_906_944),
        ({"base_channels": 16, "num_levels": 4, "num_blocks": 2}, {"hidden_dim": 64}, 6_237_408),
        ({"base_channels": 32, "num_levels": 4, "num_blocks": 1}, {}, 28_020_672),
        ({"base_channels": 32, "num_levels": 3, "num_blocks": 2}, {}, 6_229_056),
        ({"base_channels": 8, "num_levels": 3, "num_blocks": 1}, {"hidden_dim": 32}, 445_616),
    ],
)
def test_methods_have_the_known_number_of_weights(options, heads, count):
    with torch.device("meta"):
        method = make(**options, heads={"hidden_dim": 128, "proj_dim": 128, **heads})
    assert sum(p.numel() for p in method.parameters()) == count


@pytest.mark.parity
def test_the_published_heads_have_the_known_numbers_of_weights():
    with torch.device("meta"):
        heads = MACLHeads(bottleneck_channels=512, decoded_channels=128, spatial_dims=2)
    counts = {name: sum(p.numel() for p in head.parameters()) for name, head in heads.named_children()}
    expected = {"auxiliary": 82_176, "dominant": 33_024, "auxiliary_pixel": 738_048, "dominant_pixel": 0}
    assert counts == expected


def test_permuting_samples_changes_no_loss():
    method, views = make().double(), batch()
    views = {name: replace(group, image=group.image.double()) for name, group in views.items()}
    permuted = {name: part(group, [2, 0, 3, 1]) for name, group in views.items()}
    first, second = method(views, NOW), method(permuted, NOW)
    assert first.loss.item() == pytest.approx(second.loss.item(), rel=1e-12)
    assert first.logs["num_positives"].item() == 0.5


def test_one_sample_has_nothing_to_contrast_with():
    method = make().eval()
    one = {name: part(group, [0]) for name, group in batch().items()}
    logs = method(one, NOW).logs
    assert logs["global"].item() == pytest.approx(0, abs=1e-6)
    assert logs["dense"].item() == pytest.approx(0, abs=1e-6)


def test_equal_pictures_give_the_collapse_value_where_both_branches_have_one_head():
    """Black ones, which padding leaves as they are at both sizes."""
    method, views = make(heads={"global_from": "encoder"}), batch()
    method.heads.dominant.load_state_dict(method.heads.auxiliary.state_dict())
    black = {name: replace(group, image=torch.zeros_like(group.image)) for name, group in views.items()}
    logs, other = method(black, NOW).logs, method(views, NOW).logs
    for term in ("global", "dense"):
        assert logs[term].item() == pytest.approx(COLLAPSE, rel=1e-6)
        assert abs(other[term].item() - COLLAPSE) > 0.01
    assert logs["feature_std"].item() == pytest.approx(0, abs=1e-6)
    assert logs["equivariance"].item() == 0


@pytest.mark.parametrize("branch", ["auxiliary", "dominant"])
def test_the_equivariance_pulls_at_both_branches(branch):
    method = make(weight_global=0.0, weight_dense=0.0, coupling="independent")
    method(batch(), NOW).loss.backward()
    encoder = method.auxiliary_encoder if branch == "auxiliary" else method.backbone.encoder
    assert encoder.center[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("coupling", ["shared", "independent", "ema"])
def test_the_encoders_of_the_branches_are_one_or_two_or_a_moving_average(coupling):
    method = make(coupling=coupling, momentum=0.5).train()
    optimizer = torch.optim.SGD(method.param_groups()[0]["params"], lr=0.1)
    start = method.encoder.center[0].weight.detach().clone()
    method(batch(), NOW).loss.backward()
    optimizer.step()
    method.after_step(NOW)
    moved = method.encoder.center[0].weight
    assert not torch.equal(moved, start)
    if coupling == "shared":
        assert method.auxiliary_encoder is None
        return
    auxiliary = method.auxiliary_encoder.center[0].weight
    assert auxiliary.requires_grad == (coupling == "independent")
    if coupling == "ema":
        torch.testing.assert_close(auxiliary, (start + moved) / 2)
        assert auxiliary.grad is None
        assert method.auxiliary_encoder.training
    else:
        assert not torch.equal(auxiliary, moved)
        assert not torch.equal(auxiliary, start)
    assert "auxiliary_encoder" in method.parts()


@pytest.mark.parametrize(
    "options",
    [
        {"heads": {"global_from": "encoder"}},
        {"heads": {"dominant_pixel": True}},
        {"downsample": "area"},
        {"dense_chunk": 3},
        {"spatial_dims": 2},
        {"coupling": "ema"},
        {"coupling": "independent"},
    ],
)
def test_with_every_option_all_trained_weights_get_a_gradient(options):
    method, views = make(**options), batch()
    if options.get("spatial_dims") == 2:
        views = {name: replace(group, image=group.image[..., :1]) for name, group in views.items()}
    output = method(views, NOW)
    output.loss.backward()
    assert all(output.logs[term].isfinite() for term in TERMS)
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    if "dense_chunk" in options:
        assert output.loss.item() == pytest.approx(make()(views, NOW).loss.item(), rel=1e-5)


def test_the_dominant_branch_may_have_a_look_of_its_own():
    method, views = make().eval(), batch()
    image = views["still"].image[:, 0]
    one = method(views, NOW).logs
    same = method({**views, "still_dominant": view(image)}, NOW).logs
    assert all(one[term].item() == same[term].item() for term in TERMS)
    changed = method({**views, "still_dominant": view(1 - image)}, NOW).logs
    assert changed["global"] == one["global"]
    assert changed["equivariance"] != one["equivariance"]


def test_all_three_terms_fall_on_a_batch():
    method = make(base_channels=4).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    views = batch(side=16)
    logs = []
    for _ in range(30):
        output = method(views, NOW)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        logs.append({term: output.logs[term].item() for term in TERMS})
    assert all(logs[-1][term] < 0.7 * logs[0][term] for term in TERMS)
    assert logs[-1]["global"] < 0.7 * COLLAPSE


@pytest.mark.parametrize(
    ("z", "count", "advice"),
    [((0.1, 0.3, 0.5, 0.95), "0 positives among the 3", "raise method"), ((0.5,) * 4, "3 positives", "lower method")],
)
def test_a_run_without_positives_or_without_negatives_says_so_once(z, count, advice, capsys):
    method, views = make(), batch(z=z)
    logs = method(views, NOW).logs
    for step in range(1, 3 * WATCHED_STEPS):
        method.watch([logs["num_positives"], logs["num_compared"]], replace(NOW, step=step))
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert count in said
    assert f"{advice}.positions.threshold" in said


def test_a_run_that_compares_nothing_asks_for_larger_batches(capsys):
    method, views = make().eval(), batch()
    alone = {
        name: replace(group, group=torch.arange(4)[:, None].expand_as(group.group)) for name, group in views.items()
    }
    logs = method(alone, NOW).logs
    for _ in range(WATCHED_STEPS):
        method.watch([logs["num_positives"], logs["num_compared"]], NOW)
    said = capsys.readouterr().err
    assert "0 positives among the 0 other samples" in said
    assert said.endswith("hardly anything is contrasted; raise batch_size\n")


@pytest.mark.parametrize("positives", [0.5, 2.5])
def test_some_positives_and_some_negatives_are_nothing_to_say(positives, capsys):
    method = make()
    for _ in range(WATCHED_STEPS):
        method.watch([torch.tensor(positives), torch.tensor(3.0)], NOW)
    assert capsys.readouterr().err == ""


def test_the_contrasts_ask_the_device_for_no_value():
    method, views = make(), batch()
    masks = method.positions(views["still"])
    method.positions = lambda view, gather: masks  # which reads whether positions are finite
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "nonzero"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the device is waited for"))
        output = method(views, NOW)
    assert output.loss.isfinite()


def test_crops_of_other_cohorts_are_not_compared():
    method, views = make().eval(), batch()
    groups = torch.tensor([0, 1, 0, 1])[:, None]
    split = {name: replace(group, group=groups.expand_as(group.group)) for name, group in views.items()}
    logs = method(split, NOW).logs
    assert logs["num_compared"].item() == 1
    assert logs["num_positives"].item() == 0  # the neighbours at 0.1 and 0.15 are of two cohorts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "loose"}, "shared, independent, ema"),
        ({"downsample": "cubic"}, "linear, area"),
        ({"temperature": 0.0}, "positive"),
        ({"momentum": 2.0}, "momentum is a share, from 0 to 1; got 2.0"),
        ({"crop_voxel": [12, 12, 12]}, r"multiples of \[8, 8, 8\]"),
        ({"dense_chunk": 0}, "dense_chunk must be at least 1 or null, got 0"),
        ({"crop_voxel": [16, 16, 4], "spatial_dims": 2}, r"\[x, y, 1\]; give views.groups.still.size=\[16,16,1\]"),
        ({"num_blocks": 3}, "blocks 1 to 2"),
        ({"heads": {"global_from": "head"}}, "decoder, encoder"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("word", ["maybe", "no", 0])
def test_only_true_false_and_null_say_whether_samples_are_gathered(word, monkeypatch):
    monkeypatch.setattr(MACL, "__init__", MACL.__init__.__wrapped__)
    with pytest.raises(ValueError, match=f"gather must be true, false or null, got {word!r}"):
        make(gather=word)


def test_wrong_views_are_refused():
    views = batch()
    with pytest.raises(ValueError, match="still"):
        make()({"moved": views["moved"]}, NOW)
    other = view(views["still"].image[:, 0])
    other.matrix = other.matrix + 0.1
    with pytest.raises(ValueError, match="show other places"):
        make()({**views, "still_dominant": other}, NOW)
    with pytest.raises(ValueError, match="still_dominant"):
        make()({**views, "still_dominant": views["moved"]}, NOW)
    with pytest.raises(ValueError, match="one size"):
        make()({**views, "still": view(torch.rand(4, 1, 16, 16, 16))}, NOW)
    with pytest.raises(ValueError, match=r"views.groups.still.size=\[12, 12, 12\]"):
        make()(batch(side=12), NOW)


def test_the_picture_shows_both_branches_and_a_positive():
    method = make().train()
    figure = figures_of(method, batch(), NOW)["branches"]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["auxiliary", "auxiliary, moved", "dominant", "dominant, moved", "a positive"]
    assert method.training
