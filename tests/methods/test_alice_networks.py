"""Alice on the networks of configs/model: whole steps, and the command."""

import pytest
import torch
from omegaconf import OmegaConf

from medssl.building import build
from medssl.config import compose, main
from medssl.data.views import View
from medssl.methods.base import Method, Progress
from medssl.pretrain import run
from medssl.training.optim import build_optimizer
from medssl.weights import load_encoder

NETWORKS = {  # preset: settings that make it small, widths of bottleneck and first decoded map, side of a crop
    "nnformer_tiny": (["size_voxel=16", "feature_size=12", "num_heads=[1,2,4,8]"], (96, 48), 16),
    "swinunetr": (["feature_size=12", "num_heads=[1,2,3,6]", "window_voxel=4"], (192, 96), 32),
    "unetr": (["dim=48", "depth=4", "num_heads=4"], (48, 384), 32),
}
ALTERNATIVES = [(model, []) for model in NETWORKS]
ALTERNATIVES += [("nnformer_tiny", ["method.backbone.mask_mode=token"]), ("nnformer_tiny", ["method.cafa_ema=true"])]
ALTERNATIVES += [("nnformer_tiny", ["model.encoder.ape=random_frozen", "method.head.shared=true"])]


def settings_of(model):
    encoder, _, side = NETWORKS[model]
    settings = [f"model={model}", f"views.groups.pair.size=[{side},{side},{side}]", "method.mask_patch_voxel=8"]
    return [*settings, *(f"model.encoder.{setting}" for setting in encoder)]


def built(model, *overrides):
    """The method, its optimiser and a batch of one pair of smooth crops."""
    config = compose("pretrain", ["~data", "method=alice_tiny", *settings_of(model), *overrides])
    config.facts.update({"num_cases": 80, "num_channels": 1, "steps_per_epoch": 20.0})
    config.facts.crop_voxel = list(config.views.groups.pair.size)
    values = OmegaConf.to_container(config, resolve=True)
    torch.manual_seed(0)
    method = build(values["method"], base=Method)
    optimizer, _ = build_optimizer({**values["optimizer"], "warmup_steps": 0}, method.param_groups(), total_steps=200)
    return method, optimizer, batch_of(config.views.groups.pair.size[0])


def batch_of(side):
    coarse = torch.rand(1, 1, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    query = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear")
    image = torch.stack([query, 0.8 * query + 0.1], dim=1)
    return {"pair": View.of(image)}


@pytest.mark.parametrize(("model", "overrides"), ALTERNATIVES)
def test_two_steps_move_the_student_and_the_teacher_behind_it(model, overrides):
    method, optimizer, batch = built(model, *overrides)
    head, widths = method.head, NETWORKS[model][1]
    assert (head.bottleneck_layer.in_features, head.decoded_layer.in_features) == widths, (
        "the head follows the backbone"
    )
    start = [parameter.detach().clone() for parameter in method.backbone.parameters()]
    for step in (20, 21):  # in the second epoch, where the prototypes train too
        progress = Progress(step, 200, step / 20, 10.0, 0)
        output = method(batch, progress)
        output.loss.backward()
        assert output.loss.isfinite()
        assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
        method.after_backward(progress)
        before = [p.clone() for p in method.teacher_backbone.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(progress)
        share = 1 - output.logs["ema_momentum"].item()
        pairs = zip(before, method.backbone.parameters(), method.teacher_backbone.parameters(), strict=True)
        for old, student, teacher in pairs:
            if student.requires_grad:
                torch.testing.assert_close(teacher, old + share * (student - old), atol=1e-6, rtol=1e-4)
    moved = zip(start, method.backbone.parameters(), method.teacher_backbone.parameters(), strict=True)
    trained = [(p - first, teacher - first) for first, p, teacher in moved if p.requires_grad]
    assert all(by.abs().max() > 0 for by, _ in trained)
    assert all(by.abs().max() > 0 for _, by in trained)
    assert sum(by.norm() for _, by in trained) < 0.1 * sum(by.norm() for by, _ in trained), "it lags behind"
    assert not any(p.requires_grad or p.grad is not None for p in method.teacher_backbone.parameters())
    assert method.centre.abs().max() > 0


@pytest.mark.slow
def test_a_preset_takes_the_size_of_the_crops_and_needs_nothing_else(tmp_path):
    """UNETR has a position for each patch: it has to know the crops."""
    encoder, _, _ = NETWORKS["unetr"]
    settings = ["method=alice_tiny", "model=unetr", *(f"model.encoder.{setting}" for setting in encoder)]
    settings += ["data=phantoms", "data.num_cases=4", "data.size_voxel=32", "data.phantom_spacing_mm=12.0"]
    settings += [f"store={tmp_path / 'store'}", f"output_dir={tmp_path / 'run'}", "batch_size=1", "trainer.max_steps=2"]
    main("pretrain", run, arguments=[*settings, "validate_every=null", "figures_every=null"])
    encoder = load_encoder(tmp_path / "run" / "encoder.safetensors")
    assert encoder.pos_embed.shape[1] == 2**3, "patches of 16 voxels in a crop of 32"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("views.groups.pair.size=[40,40,40]", r"views.groups.pair.size=\[40, 40, 40\] is no multiple of the coarsest"),
        (
            "method.mask_patch_voxel=7",
            r"size=\[16, 16, 16\] is no multiple of method.mask_patch_voxel, which is \[7, 7, 7",
        ),
    ],
)
def test_crops_that_do_not_fit_name_the_keys_and_a_size_that_does(setting, message):
    with pytest.raises(ValueError, match=message):
        built("nnformer_tiny", setting)


def test_crops_of_no_stated_size_are_checked_in_the_first_batch():
    method, _, _ = built("nnformer_tiny", "method.crop_voxel=null")
    with pytest.raises(ValueError, match=r"views.groups.pair.size=\[24, 24, 24\] is no multiple of the coarsest"):
        method(batch_of(24), Progress(0, 10, 0.0, 5.0, 0))


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1])
def test_a_mask_that_leaves_nothing_is_refused_when_the_method_is_built(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\), got"):
        built("nnformer_tiny", f"method.mask_ratio={ratio}")
