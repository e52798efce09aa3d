"""KAF on slices: points that are found in them, their partners in a neighbouring slice, and runs by the command."""

import math

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from pairs_of_views import figures_of
from test_kaf import at

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.data.views import View
from medssl.features import run as features
from medssl.methods.base import Method
from medssl.methods.kaf_points import PointRule
from medssl.methods.positions import Positions
from medssl.models.segmenter import build_segmenter
from medssl.ops.correspondence import descriptors_at, patch_descriptors
from medssl.pretrain import run
from medssl.segmentation.initial_weights import find_initial, load_initial

SMALL = ("data=phantoms", "data.num_cases=5", "data.size_voxel=32", "data.phantom_spacing_mm=12.0")
NARROW = (
    *("model.encoder.base_channels=2", "model.encoder.num_layers=1", "model.encoder.hidden=4", "model.encoder.dim=8"),
    *("model.encoder.num_heads=2", "model.encoder.max_points=16", "method.heads.embed_dim=8"),
    "method.transport_iterations=10",
)
SIDE = 48


def resolved(*overrides):
    """The configuration of a run on 32 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    config.facts = {"num_cases": 32, "num_channels": 1, "num_locations": 0, "steps_per_epoch": 4.0}
    return OmegaConf.to_container(config, resolve=True)


def small(*overrides):
    torch.manual_seed(0)
    settings = ("method=kaf_2d", *NARROW, f"views.groups.first.size=[{SIDE},{SIDE},1]", *overrides)
    return build(resolved(*settings)["method"], base=Method)


def picture(b=2, seed=0):
    """Blobs of several sizes in slices of [0, 1], as (b, 1, x, y, 1)."""
    generator = torch.Generator().manual_seed(seed)
    fine, coarse = (
        F.interpolate(torch.rand(b, 1, n, n, generator=generator), size=(SIDE, SIDE), mode="bicubic") for n in (16, 8)
    )
    return ((fine + coarse) / 2).clamp(0, 1)[..., None]


def shown(image, matrix, *, slice_number=5):
    """Views of slices whose voxel (x, y, 0) shows the place matrix @ (x, y, slice_number) of a volume."""
    lift = torch.eye(4, dtype=torch.float64)
    lift[2, 3] = slice_number
    return View.of(image, matrix=lift @ matrix, volume_shape=[SIDE, SIDE, 20])


def turned(image):
    """A slice as it is, and the next one, which shows the same, turned by a quarter and mirrored."""
    matrix = torch.tensor([[0.0, -1, 0, SIDE - 1], [-1, 0, 0, SIDE - 1], [0, 0, 1, 0], [0, 0, 0, 1]]).double()
    moved = image.flip(2, 3).transpose(2, 3)
    return shown(image, torch.eye(4, dtype=torch.float64)), shown(moved, matrix, slice_number=6)


@pytest.mark.parametrize("match", ["carried", "geometric", "descriptor"])
def test_points_of_turned_neighbouring_slices_find_each_other_in_the_plane_of_the_volume(match):
    first, second = turned(picture())
    rule = PointRule(match=match, table=None, max_points=40, gate_share=8 / SIDE)
    points = rule(first, second, at(), is_random=True, spatial_dims=2)
    assert points.first.shape[2] == points.second.shape[2] == 2
    paired = points.pairs[(points.pairs >= 0).all(1)]
    sample, i, j = paired.unbind(1)
    in_volume = [
        view.to_volume(F.pad(where, (0, 1))[:, None])[:, 0, :, :2]
        for view, where in ((first, points.first), (second, points.second))
    ]
    apart = (in_volume[0][sample, i] - in_volume[1][sample, j]).norm(dim=1)
    right = (apart < 1.5).float().mean()
    if match == "descriptor":
        assert right < 0.3, "views that are turned look different"
    else:
        assert len(paired) > 0.6 * points.first_valid.sum()
        assert right > 0.8


def test_only_points_within_the_gate_are_partners():
    first, second = turned(picture())
    counts = []
    for gate in (0.5 / SIDE, 8 / SIDE):
        rule = PointRule(match="carried", table=None, max_points=40, gate_share=gate)
        points = rule(first, second, at(), is_random=True, spatial_dims=2)
        counts.append((points.pairs >= 0).all(1).sum().item())
    assert counts[0] < counts[1]


def test_volumes_may_be_matched_in_the_same_way():
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.rand(2, 1, 9, 9, 9, generator=generator), size=(24, 24, 24), mode="trilinear")
    mirrored = torch.eye(4, dtype=torch.float64)
    mirrored[0, 0], mirrored[0, 3] = -1, 23
    views = View.of(image), View.of(image.flip(2), matrix=mirrored, volume_shape=[24, 24, 24])
    points = PointRule(match="carried", table=None, max_points=30, gate_share=0.2)(*views, at(), is_random=True)
    sample, i, j = points.pairs[(points.pairs >= 0).all(1)].unbind(1)
    mirror = points.second[sample, j]
    mirror[:, 0] = 23 - mirror[:, 0]
    assert len(sample) > 0.6 * points.first_valid.sum()
    assert ((points.first[sample, i] - mirror).norm(dim=1) < 1.5).float().mean() > 0.8


def test_descriptors_at_whole_voxels_are_those_of_the_voxels_around_a_point():
    image, points = picture()[..., 0], torch.tensor([[[7.0, 9.0], [20.0, 31.0]]] * 2)
    reach = torch.arange(-2.0, 3.0)
    places = points[:, :, None] + torch.cartesian_prod(reach, reach)
    torch.testing.assert_close(descriptors_at(image, places), patch_descriptors(image, points), rtol=0, atol=1e-5)
    outside = torch.tensor([[[[-5.0, 3.0], [0.0, 3.0], [4.0, 3.0]]]] * 2)
    expected = torch.stack([image[:, 0, 0, 3], image[:, 0, 0, 3], image[:, 0, 4, 3]], dim=1)
    expected = F.normalize(expected - expected.mean(1, keepdim=True), dim=1)
    torch.testing.assert_close(descriptors_at(image, outside)[:, 0], expected, rtol=0, atol=1e-5)


def test_a_slice_has_the_published_position_and_both_of_a_pair_have_that_of_the_first():
    method, image = small(), picture(b=3)
    matrix = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    matrix[:, 2, 3] = torch.tensor([5.0, 6.0, 12.0])
    first = View.of(image, matrix=matrix, volume_shape=[SIDE, SIDE, 20])
    second = View.of(image, matrix=matrix.flip(0), volume_shape=[SIDE, SIDE, 20])
    assert method.positions.positions(Positions.of_view(first)).flatten().tolist() == [6 / 20, 7 / 20, 13 / 20]
    near = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)  # nearer than 0.1
    positive, compared = method._masks((first, second))
    assert torch.equal(positive, near.repeat(2, 2))
    assert compared.all()


def test_a_step_on_slices_trains_every_weight_and_draws_its_matches():
    method, (first, second) = small(), turned(picture(b=4))
    batch = {"first": first, "second": second}
    output = method(batch, at())
    output.loss.backward()
    terms = ("image", "keypoints", "matching")
    assert all(math.isfinite(output.logs[term]) for term in terms)
    assert output.logs["matched_share"] > 0.3
    assert all(p.grad is not None for p in method.parameters())
    (figure,) = figures_of(method, batch, at()).values()
    assert figure.axes[0].images[0].get_array().shape == (SIDE, 2 * SIDE + 2)


def test_a_slice_without_structure_gets_random_points_of_its_plane():
    image = picture()
    image[0] = 0.0
    first, second = turned(image)
    rule = PointRule(match="carried", table=None, max_points=20, min_points=6)
    points = rule(first, second, at(), is_random=True, spatial_dims=2)
    assert points.first.shape[2] == 2
    assert points.first_valid[0].sum() == 6
    assert points.first[0][points.first_valid[0]].unique(dim=0).shape == (6, 2)


@pytest.mark.parity
def test_the_published_values_are_those_of_the_configuration_for_slices():
    values = resolved("method=kaf_2d")
    method, first, second = values["method"], *values["views"]["groups"].values()
    weights = [method[f"weight_{term}"] for term in ("image", "keypoints", "matching")]
    assert weights == [1, 1, 0.01]
    assert (method["metric"], method["threshold"], method["position_per_view"]) == ("axial", 0.1, False)
    assert (method["temperature"], method["base_temperature"], method["transport_iterations"]) == (0.1, 0.07, 100)
    assert method["points"]["gate_share"] * first["size"][0] == 20
    assert (first["size"], second["size"], second["shift"]) == ([512, 512, 1], [512, 512, 1], [0, 0, 0.05])
    optimizer = values["optimizer"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.002, 0.9, 1e-5)
    assert values["batch_size"] == 32
    with torch.device("meta"):
        built = build(method, base=Method)
    unused = 4 * (256 * 256 + 256 + 1)  # the released layers have a projection and a dustbin that nothing uses
    local = 256 * 257 + 2 * 256 + 512 * 257  # of single keypoints, which the paper does not contrast
    assert sum(p.numel() for p in built.encoder.parameters()) == 59_537_604 - unused
    assert sum(p.numel() for p in built.parameters()) == 63_792_037 - unused - local


def test_slices_pre_train_a_network_that_segments_volumes(tmp_path, capsys):
    where = (*SMALL, f"store={tmp_path / 'store'}")
    settings = ("views.groups.first.size=[32,32,1]", "batch_size=4", "trainer.max_steps=2", "figures_every=2")
    folder = tmp_path / "run"
    arguments = ["method=kaf_2d", *where, *NARROW, *settings, "validate_every=null", f"output_dir={folder}"]
    main("pretrain", run, arguments=arguments)
    assert "encoder(torch.zeros(1, 1, 96, 96))" in capsys.readouterr().out
    names, *lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    assert len(rows) == 2
    assert all(math.isfinite(float(row[term])) for row in rows for term in ("image", "keypoints", "matching"))
    assert (folder / "figures" / "matches-0000002.png").stat().st_size > 0
    encoder = medssl.load_encoder(folder / "encoder.safetensors")
    assert [tuple(level.shape[2:]) for level in encoder(torch.rand(1, 1, 32, 32))] == [
        (n, n) for n in (32, 16, 8, 4, 2)
    ]
    with pytest.raises(SystemExit, match="2"):
        main("features", features, arguments=[f"weights={folder / 'encoder.safetensors'}", *where])
    assert "holds an encoder of slices" in capsys.readouterr().err
    config = compose("finetune", [f"weights.path={folder / 'encoder.safetensors'}"])
    initial = find_initial(config)
    model = initial.completed(config).model
    network, _ = build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=1)
    assert "encoder: " in "\n".join(load_initial(initial, network))
    inflated = network.encoder.stages[0][0].conv.weight
    assert torch.equal(inflated[..., 1], encoder.stages[0][0].conv.weight)
    assert inflated[..., [0, 2]].abs().max() == 0
    assert network(torch.rand(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("views.groups.first.size=[48,48,48]",), r"a 2D network takes slices, \[x, y, 1\]; give .*\[48,48,1\]"),
        (
            ("views.groups.first.size=[48,40,1]",),
            r"which is \[16, 16, 1\]; what fits: views.groups.first.size=\[48,48,1\]",
        ),
        (
            ("method.points.match=shared", "views.groups.first.points=keypoints"),
            "slices hardly show a point of a table",
        ),
        (("method.matcher.spatial_dims=3",), "matcher.spatial_dims=3 must be that of the encoder, 2"),
    ],
)
def test_what_does_not_fit_slices_is_refused_when_the_method_is_built(settings, message):
    with pytest.raises(ValueError, match=message):
        small(*settings)


def test_volumes_are_refused_by_a_network_of_slices():
    with pytest.raises(ValueError, match=r"a 2D network takes slices, \(x, y, 1\) voxels; got \(16, 16, 16\)"):
        small()({name: View.of(torch.rand(2, 1, 16, 16, 16)) for name in ("first", "second")}, at())
