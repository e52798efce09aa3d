"""The ignored label: voxels of unknown class, which count neither in the loss nor in a score."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from synthetic import classes_of_grey, reading
from volume_files import image

from medssl.config import main
from medssl.data.checksums import sealed
from medssl.data.placements import RandomCrop
from medssl.data.prepare import prepare_store
from medssl.data.sampling import Request
from medssl.data.scene import Scene
from medssl.data.sources import NnUnet
from medssl.data.splits import resolve_split
from medssl.data.views import View, ViewPlan
from medssl.evaluation.scores import dice_by_class, score_case
from medssl.finetune import run
from medssl.models.segmenter import build_segmenter
from medssl.segmentation.evaluator import Evaluator
from medssl.segmentation.method import IGNORED, Segmentation, loss_of_known
from medssl.segmentation.plan import find_classes
from medssl.weights import read_card

UNET = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8, 8], "strides": [1, 2, 2]}
LOSS = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)
SPACING_MM = (0.7, 1.3, 2.5)


def slow_loss(logits, target):
    """Dice and cross entropy in a plain loop over voxels, without those that are ignored; the mean over samples."""
    total, samples = 0.0, 0
    num_classes = logits.shape[1]
    for scores, classes in zip(logits, target, strict=True):
        both, ours, theirs, entropy, count = [0.0] * num_classes, [0.0] * num_classes, [0.0] * num_classes, 0.0, 0
        for at in itertools.product(*(range(n) for n in classes.shape[1:])):
            true = int(classes[(0, *at)])
            if true == IGNORED:
                continue
            shares = [math.exp(float(scores[(k, *at)])) for k in range(num_classes)]
            shares = [share / sum(shares) for share in shares]
            entropy, count = entropy - math.log(shares[true]), count + 1
            for k in range(num_classes):
                both[k] += shares[k] * (k == true)
                ours[k] += shares[k] ** 2
                theirs[k] += k == true
        if count:
            dice = [1 - 2 * a / (b + c + 1e-6) for a, b, c in zip(both, ours, theirs, strict=True)]
            total, samples = total + sum(dice) / num_classes + entropy / count, samples + 1
    return total / samples


def crops(seed, *, share=0.4):
    """Logits and classes of two samples, some voxels of unknown class."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 5, 4, 3, generator=rng)
    target = torch.randint(0, 3, (2, 1, 5, 4, 3), generator=rng)
    return logits, torch.where(torch.rand(target.shape, generator=rng) < share, IGNORED, target)


@pytest.mark.parametrize("seed", range(50))
def test_the_loss_is_that_of_a_plain_loop_over_the_known_voxels(seed):
    logits, target = crops(seed, share=seed % 10 / 10)
    target[1] = IGNORED if seed % 7 == 4 else target[1]  # a sample without a known voxel is left out
    assert loss_of_known(LOSS, logits, target).item() == pytest.approx(slow_loss(logits, target), rel=1e-5)


def test_an_ignored_voxel_gets_no_gradient_and_does_not_move_that_of_others():
    logits, target = crops(0)
    logits.requires_grad_()
    loss_of_known(LOSS, logits, target).backward()
    hidden = (target == IGNORED).expand_as(logits)
    assert (logits.grad[hidden] == 0).all()
    assert (logits.grad[~hidden] != 0).all()
    other = torch.where(hidden, 100 * torch.randn_like(logits), logits).detach().requires_grad_()
    loss_of_known(LOSS, other, target).backward()
    assert torch.equal(other.grad, logits.grad)


def test_a_batch_without_a_known_voxel_has_loss_and_gradient_0():
    logits, target = crops(0)
    logits.requires_grad_()
    loss = loss_of_known(LOSS, logits, torch.full_like(target, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_where_all_is_known_the_loss_is_that_of_the_whole_batch():
    logits, target = crops(0, share=0.0)
    assert loss_of_known(LOSS, logits, target).item() == pytest.approx(LOSS(logits, target).item(), rel=1e-6)


@pytest.mark.parametrize("deep_supervision", [0, 1])
def test_the_method_hides_the_ignored_label_at_every_depth(at, deep_supervision):
    torch.manual_seed(0)
    segmenter, _ = build_segmenter(UNET, None, num_classes=3, in_channels=1, deep_supervision=deep_supervision)
    method = Segmentation(segmenter=segmenter, label_values=[0, 5, 117], ignored_label=200, loss=LOSS)
    picture = torch.rand(2, 1, 1, 16, 16, 16)
    label = torch.tensor([0, 5, 117, 200])[(4 * picture).long()]
    assert method.classes_of(torch.tensor([0, 5, 117, 200, 201, 6])).tolist() == [0, 1, 2, IGNORED, 0, 0]
    output = method({"crop": View.of(picture, label=label)}, at())
    classes = method.classes_of(label.flatten(0, 1))
    logits = segmenter.outputs(picture.flatten(0, 1))
    coarse = torch.nn.functional.interpolate(classes.double(), scale_factor=0.5, mode="nearest-exact").long()
    targets = (classes, coarse)[: 1 + deep_supervision]
    losses = [loss_of_known(LOSS, one, target).item() for one, target in zip(logits, targets, strict=True)]
    weights = [1, 0.5][: len(losses)]
    assert output.loss.item() == pytest.approx(np.average(losses, weights=weights), rel=1e-5)
    known = label[label != 200]
    assert output.logs["foreground_share"].item() == pytest.approx((known > 0).float().mean().item())


def slow_scores(prediction, truth, ignored, *, diagonal_mm):
    """Dice, HD95 and NSD (1 mm) of class 1 in a plain loop; an ignored voxel is like one beyond the image."""
    known = {tuple(voxel) for voxel in np.argwhere(~ignored)}
    ours, theirs = ({v for v in known if classes[v] == 1} for classes in (prediction, truth))
    if not ours and not theirs:
        return [math.nan] * 3
    if not ours or not theirs:
        return [0.0, diagonal_mm, 0.0]
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, s)) == 1]

    def outline(inside):
        return [v for v in inside if any(tuple(a + b for a, b in zip(v, s, strict=True)) not in inside for s in steps)]

    def mm(a, b):
        return math.dist(np.multiply(a, SPACING_MM), np.multiply(b, SPACING_MM))

    surfaces = outline(ours), outline(theirs)
    ways = [[min(mm(a, b) for b in to) for a in own] for own, to in (surfaces, surfaces[::-1])]
    near = sum(d <= 1.0 for way in ways for d in way) / sum(map(len, ways))
    return [2 * len(ours & theirs) / (len(ours) + len(theirs)), max(np.percentile(way, 95) for way in ways), near]


@pytest.mark.parametrize("seed", range(50))
def test_scores_are_those_of_a_plain_loop_without_the_ignored_voxels(seed):
    rng = np.random.default_rng(seed)
    shape = (7, 6, 5)
    truth = np.zeros(shape, np.uint8)
    truth[1:5, 1:4, 1:4] = 1
    prediction = np.roll(truth, rng.integers(-1, 2, 3), axis=(0, 1, 2))
    ignored = np.zeros(shape, bool)
    ignored[tuple(slice(a, a + rng.integers(2, 6)) for a in rng.integers(0, 4, 3))] = True
    if seed % 10 == 7:
        ignored = truth == 1  # the whole class: what is left of the prediction is in one map only
    before = prediction.copy(), truth.copy()
    scores = score_case(prediction, truth, num_classes=2, spacing_mm=SPACING_MM, ignored=ignored)
    diagonal_mm = float(np.linalg.norm(np.multiply(shape, SPACING_MM)))
    expected = slow_scores(prediction, truth, ignored, diagonal_mm=diagonal_mm)
    np.testing.assert_allclose([scores.dice[0], scores.hd95_mm[0], scores.nsd[0]], expected, rtol=1e-6)
    np.testing.assert_allclose(dice_by_class(prediction, truth, num_classes=2, ignored=ignored), expected[:1])
    assert all(np.array_equal(a, b) for a, b in zip(before, (prediction, truth), strict=True))


@pytest.fixture
def store(make_store):
    """Two cases whose grey values tell the classes 0, 1, 2; a slab of each has the ignored label 9."""
    rng = np.random.default_rng(0)
    classes = [rng.integers(0, 3, (16, 18, 20)) for _ in range(2)]
    labels = [np.where(np.arange(20) < 6 + n, 9, c).astype(np.int16) for n, c in enumerate(classes)]
    arrays = [(1000 * c - 1000).astype(np.int16)[None] for c in classes]
    made = make_store(*arrays, labels=labels, splits=("train", "validation"))
    (made.root / "labels.json").write_text(json.dumps(sealed({"names": {"1": "liver", "2": "tumour"}, "ignore": 9})))
    return type(made)(made.root)


def test_no_crop_is_centred_on_an_ignored_voxel_as_one_of_a_class(store):
    crop = RandomCrop(size=[4, 4, 4], label=True, label_share=1.0)
    plan = ViewPlan(groups={"crop": crop})
    for step in range(40):
        (view,) = plan.place(Scene(store, Request((0,), 0)), seed=0, step=step)["crop"]
        assert view.placement.frame.matrix[2, 3] + 1.5 >= 5.5, "the middle lies beyond the ignored slab"


@pytest.mark.parametrize("full", [False, True])
def test_the_evaluator_scores_the_known_voxels_alone(store, full):
    class Inverted(torch.nn.Module):
        """Tells the classes by their grey, but those of the ignored slab wrongly."""

        def forward(self, image):
            shares = classes_of_grey()(image)
            shares[..., :6] = shares[..., :6].flip(1)
            return shares.log()

    options = {"reading": reading(window=(16, 18, 20)), "overlap": 0.5, "window_batch": 1, "tolerance_mm": 1.0}
    masked, plain = (
        Evaluator(store=store, label_values=[0, 1, 2], ignored_label=ignored, **options) for ignored in (9, None)
    )
    found, other = (
        one.run(Inverted(), [0, 1], device=torch.device("cpu"), full=full, title="") for one in (masked, plain)
    )
    assert [dice.tolist() for dice in found.dice.values()] == [[1.0, 1.0], [1.0, 1.0]]
    assert max(dice.max() for dice in other.dice.values()) < 0.95
    assert all(found.contents[case] != other.contents[case] for case in found.contents)
    if full:
        assert all(scores.hd95_mm.max() == 0 and scores.nsd.min() == 1 for scores in found.scores.values())


def test_the_ignored_label_is_no_class_and_cannot_be_asked_for(store):
    split = resolve_split(store, split="source")
    assert find_classes(store, split, wanted=None) == {0: "background", 1: "liver", 2: "tumour"}
    with pytest.raises(ValueError, match=r"value 9 is the ignored label of the data, which is no class; .* hold 1, 2"):
        find_classes(store, split, wanted=[1, 9])


def test_a_run_on_nnunet_data_with_an_ignored_label_learns_and_reports_the_other_classes(tmp_path, capsys):
    for number in range(3):
        grey = np.random.default_rng(number).normal(0, 20, (20, 18, 16))
        label = np.zeros((20, 18, 16), np.uint8)
        label[4:16, 4:14, 4:12], label[8:12, 6:12, 6:10] = 1, 2
        image(tmp_path / "imagesTr" / f"c{number}_0000.nii.gz", (grey + 300 * (label > 0)).astype(np.int16))
        image(tmp_path / "labelsTr" / f"c{number}.nii.gz", label)
    known = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1, "ignore": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(known))
    options = {"channels": "all", "num_workers": 0, "progress": False}
    prepare_store(NnUnet(root=tmp_path), tmp_path / "store", **options)  # in this process, which is faster
    settings = {"data": "nnunet", "data.root": tmp_path, "store": tmp_path / "store", "output_dir": tmp_path / "run"}
    network = {"model": "unet", "model.encoder.widths": "[4,8]", "model.encoder.strides": "[1,2]"}
    length = {"crop_voxel": "[16,16,16]", "trainer.max_steps": 2, "validate_every": 2, "label_share": 1.0}
    main("finetune", run, arguments=[f"{key}={value}" for key, value in {**settings, **network, **length}.items()])
    said = capsys.readouterr().out
    assert "classes: 1 (body)" in said
    assert "ignored: label value 2; its voxels enter neither the loss nor the scores" in said
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (results["classes"], results["ignored_label"]) == (["body"], 2)
    assert [c["name"] for c in read_card(tmp_path / "run" / "segmenter.safetensors")["classes"]] == [
        "background",
        "body",
    ]
    assert "ignore" not in (tmp_path / "run" / "cases.csv").read_text()
