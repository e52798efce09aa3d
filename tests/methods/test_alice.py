import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from pairs_of_views import figures_of
from torch import nn

from medssl.data.views import View
from medssl.losses.alignment import halved_mse, inter_volume_loss, intra_volume_loss
from medssl.methods.alice import Alice
from medssl.models.alice_backbones import Backbone
from medssl.models.alice_head import AliceHead
from medssl.models.cafa import CAFA

TERMS = ("inter_volume", "intra_volume", "reconstruction")
CHOICES = [{}, {"cafa_ema": True}, {"teacher_tokens": "encoder"}, {"teacher_shared_head": False}]
CHOICES += [{"mask_shape": "cube"}, {"mask_per_sample": False}, {"teacher_drop_path": True}, {"mask_ratio": 0.0}]
CHOICES += [{"cafa_ema": True, "teacher_tokens": "encoder", "teacher_shared_head": False}]


class Encoder(nn.Module):
    """Maps of strides 4 and 8."""

    channels, strides, in_channels = (8, 12), (4, 8), 1

    def __init__(self, dropout):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv3d(1, 8, 4, stride=4), nn.GELU(), nn.Dropout3d(dropout))
        self.coarse = nn.Conv3d(8, 12, 2, stride=2)

    def forward(self, image):
        """Fine to coarse."""
        fine = self.fine(image)
        return [fine, self.coarse(fine)]


class Decoder(nn.Module):
    """One map of stride 4."""

    channels, strides = (6,), (4,)

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(12, 6, 2, stride=2)

    def forward(self, image, maps):
        """A list of the one."""
        return [self.up(maps[-1])]


@pytest.fixture
def alice():
    """Makes a small Alice: 8 bottleneck and 64 decoder tokens for crops of 16 voxels; keywords go to the method."""

    def make(*, dropout=0.0, cafa_dropout=0.0, **options):
        torch.manual_seed(0)
        widths = {"bottleneck_channels": 12, "decoded_channels": 6, "hidden_dim": 20, "bottleneck_dim": 8}
        head = AliceHead(**widths, num_prototypes=16, init_std=0.3)
        cafa = CAFA(dim=16, hidden_dim=24, num_heads=2, head_dim=6, dropout=cafa_dropout)
        options = {"mask_patch_voxel": 4, "freeze_last_layer_epochs": 0, **options}
        return Alice(backbone=Backbone(Encoder(dropout), Decoder()), head=head, cafa=cafa, **options)

    return make


@pytest.fixture
def pairs():
    """Makes a batch of smooth pictures; the key is the query in another contrast, with some noise."""

    def make(*, b=2, seed=0, noise=0.1):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(b, 1, 5, 5, 5, generator=generator)
        query = F.interpolate(coarse, size=(16, 16, 16), mode="trilinear")
        key = 0.8 * query + noise * torch.rand(query.shape, generator=generator)
        return {"pair": View.of(torch.stack([query, key], dim=1))}

    return make


def train(method, batches, at, *, steps, rate=1e-3, first=0):
    """Plain training; returns the logs of every step."""
    optimizer = torch.optim.AdamW(method.param_groups(), lr=rate, weight_decay=0.04)
    logs = []
    for step in range(first, first + steps):
        output = method(batches(step), at(step))
        output.loss.backward()
        method.after_backward(at(step))
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(at(step))
        logs.append({name: value.item() for name, value in output.logs.items()})
    return logs


def images_seen(method, batch, progress):
    """What reaches the encoders of teacher and student."""
    seen, handles = [], []
    for backbone in (method.teacher_backbone, method.backbone):
        hook = backbone.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        handles.append(hook)
    method(batch, progress)
    for handle in handles:
        handle.remove()
    return seen


def test_the_loss_is_the_weighted_sum_of_its_terms(alice, pairs, at):
    weights = {"weight_inter_volume": 0.7, "weight_intra_volume": 1.3, "weight_reconstruction": 2.1}
    output = alice(**weights)(pairs(), at())
    expected = sum(weights[f"weight_{term}"] * output.logs[term].item() for term in TERMS)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize("options", CHOICES)
def test_the_terms_follow_from_networks_run_crop_by_crop(alice, pairs, at, options):
    method, batch = alice(**options).eval(), pairs(b=3)
    method.centre.normal_(std=0.1)
    method.token_centre.normal_(std=0.1)
    if method.teacher_cafa is not None:
        with torch.no_grad():
            method.teacher_cafa.value.weight.mul_(1.1)
    logs = method(batch, at()).logs
    rows = [batch["pair"].image[n, v][None] for v in range(2) for n in range(3)]
    mask = method._mask(torch.cat(rows), at())
    crops, anchors, aligned, targets, errors = [], [], [], [], []
    for n, row in enumerate(rows):
        whole, hidden = method.teacher_backbone(row), method.backbone(row, mask[n : n + 1])
        target = method.teacher_head(*whole[:3])
        student = method.head(*hidden[:3])
        context = target.bottleneck if options.get("teacher_tokens") == "encoder" else target.decoded
        crops.append(student.pooled)
        anchors.append(target.pooled)
        aligned.append(method.cafa(student.bottleneck, student.decoded))
        targets.append((method.teacher_cafa or method.cafa)(student.bottleneck, context))
        errors.append(halved_mse(hidden.reconstruction, row).item())
    crops, anchors = (torch.cat(some).unflatten(0, (2, 3)) for some in (crops, anchors))
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.008}
    found = inter_volume_loss(crops, anchors, method.centre, **temperatures).item()
    assert logs["inter_volume"].item() == pytest.approx(found, rel=1e-4)
    found = intra_volume_loss(torch.cat(aligned), torch.cat(targets), method.token_centre, **temperatures).item()
    assert logs["intra_volume"].item() == pytest.approx(found, rel=1e-4)
    assert logs["reconstruction"].item() == pytest.approx(sum(errors) / 6, rel=1e-4)


def test_student_and_teacher_tokens_align_to_the_same_where_their_decoder_tokens_are_equal(alice, pairs, at):
    """The queries are the student's on both sides, whatever they are."""
    method = alice(teacher_shared_head=False, mask_ratio=0.0).eval()
    seen = []
    method.cafa.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
    method(pairs(), at())
    (queries, context), first = seen[0]
    (teacher_queries, teacher_context), second = seen[1]
    assert torch.equal(queries, teacher_queries)
    assert torch.allclose(context, teacher_context, atol=1e-6)
    assert torch.allclose(first, second, atol=1e-5)
    assert not second.requires_grad
    assert torch.equal(method.cafa(torch.randn(4, 8, 16), context).isfinite(), torch.ones(4, 8, 16, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(4))
def test_the_alignment_is_the_same_for_equal_decoder_tokens_whatever_the_queries(alice, pairs, at, seed):
    """Teacher and student with the same decoder tokens: the same answers to any question, and to another, others."""
    method = alice(teacher_shared_head=False, mask_ratio=0.0).eval()
    torch.manual_seed(seed)
    queries, answers = 3.0 * torch.randn(4, 8, 16), []

    def asked(module, inputs):
        return queries, inputs[1]

    method.cafa.register_forward_pre_hook(asked)
    method.cafa.register_forward_hook(lambda _, inputs, output: answers.append(output))
    method(pairs(b=2, seed=seed), at())
    student, teacher = answers
    torch.testing.assert_close(student, teacher, atol=1e-5, rtol=1e-5)
    queries = queries.roll(1, dims=1)
    method(pairs(b=2, seed=seed), at())
    assert (answers[2] - student).abs().max() > 0.1
    torch.testing.assert_close(answers[2], answers[3], atol=1e-5, rtol=1e-5)


def test_swapping_query_and_key_leaves_the_loss_as_it_is(alice, pairs, at):
    method, batch = alice(mask_per_sample=False, mask_ratio=0.0), pairs(b=3)
    swapped = {"pair": copy.copy(batch["pair"])}
    swapped["pair"].image = batch["pair"].image.flip(1)
    assert method(swapped, at()).loss.item() == pytest.approx(method(batch, at()).loss.item(), rel=1e-5)


def test_a_crop_is_drawn_to_its_partner_and_to_no_other_volume(alice, pairs, at):
    method, batch = alice(mask_ratio=0.0, teacher_temperature_start=0.1).eval(), pairs(b=4, noise=0.0)
    shifted = {"pair": copy.copy(batch["pair"])}
    image = batch["pair"].image
    shifted["pair"].image = torch.stack([image[:, 0], image[:, 1].roll(1, dims=0)], dim=1)
    own, other = (method(some, at()).logs["inter_volume"].item() for some in (batch, shifted))
    assert own < other


def test_the_teacher_sees_whole_crops_and_the_student_the_visible_blocks(alice, pairs, at):
    method, batch = alice(), pairs(b=3)
    whole, hidden = images_seen(method, batch, at())
    image = batch["pair"].image.transpose(0, 1).flatten(0, 1)
    assert torch.equal(whole, image)
    visible = hidden != 0
    assert torch.equal(hidden, image * visible)
    columns = visible[:, 0, ::4, ::4, ::4]  # (row, 4, 4, 4)
    assert columns.flatten(1).float().mean(1).tolist() == [0.25] * 6
    assert torch.equal(columns, columns[..., :1].expand(-1, -1, -1, 4))
    assert len({tuple(row.flatten().tolist()) for row in columns}) == 6


def test_masks_come_again_and_differ_between_steps_ranks_and_crops_as_asked(alice, pairs, at):
    image = pairs(b=3)["pair"].image.transpose(0, 1).flatten(0, 1)
    method = alice()
    mask = method._mask(image, at())
    assert torch.equal(mask, method._mask(image, at()))
    for other in (at(1), at(rank=1), at(micro=1), at(seed=1)):
        assert not torch.equal(mask, method._mask(image, other))
    shared = alice(mask_per_sample=False)._mask(image, at())
    assert torch.equal(shared[:3], shared[:1].expand(3, -1, -1, -1, -1))
    assert torch.equal(shared[3:], shared[3:4].expand(3, -1, -1, -1, -1))
    assert not torch.equal(shared[0], shared[3])
    cubes = alice(mask_shape="cube")._mask(image, at())
    assert cubes.flatten(1).sum(1).tolist() == [48] * 6
    assert not torch.equal(cubes, cubes[..., :1].expand(-1, -1, -1, -1, 4))


def test_a_group_for_the_student_is_what_it_sees_and_nothing_else(alice, pairs, at):
    method, batch = alice(), pairs()
    noisy = copy.copy(batch["pair"])
    noisy.image = batch["pair"].image + 0.1
    plain = method(batch, at()).logs
    logs = method({**batch, "student": noisy}, at()).logs
    image, other = (view.image.transpose(0, 1).flatten(0, 1) for view in (batch["pair"], noisy))
    whole, hidden = images_seen(method, {**batch, "student": noisy}, at())
    assert torch.equal(whole, image)
    assert torch.equal(hidden, other * (hidden != 0))
    reconstruction = method.backbone(other, method._mask(image, at())).reconstruction
    assert logs["reconstruction"].item() == pytest.approx(halved_mse(reconstruction, image).item(), rel=1e-5)
    assert logs["reconstruction"] != plain["reconstruction"]
    with pytest.raises(ValueError, match="`pair` and `student` must agree in count and size"):
        method({**batch, "student": View.of(torch.rand(2, 1, 1, 16, 16, 16))}, at())


def test_a_batch_without_pairs_is_refused(alice, pairs, at):
    with pytest.raises(ValueError, match=r"view group called `pair` with two views; the batch has \{'crop'"):
        alice()({"crop": pairs()["pair"]}, at())
    with pytest.raises(ValueError, match="view group called `pair` with two views"):
        alice()({"pair": View.of(torch.rand(2, 3, 1, 16, 16, 16))}, at())


@pytest.mark.parametrize("options", CHOICES)
def test_the_teacher_gets_no_gradient_and_every_trained_weight_does(alice, pairs, at, options):
    method = alice(**options)
    method(pairs(), at()).loss.backward()
    teachers = [method.teacher_backbone, method.teacher_head, *filter(None, [method.teacher_cafa])]
    frozen = [p for teacher in teachers for p in teacher.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing  # DDP would wait for them
    trained = {id(p) for group in method.param_groups() for p in group["params"]}
    assert not trained & {id(p) for p in frozen}
    assert all(p.grad.abs().max() > 0 for p in method.cafa.parameters())


def test_the_aligned_target_carries_no_gradient_into_the_student(alice, pairs, at):
    """With the reconstruction and crops switched off, gradient comes through the student's side alone."""
    weights = {"weight_inter_volume": 0.0, "weight_reconstruction": 0.0}
    method = alice(**weights)
    calls = []
    method.cafa.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0].requires_grad, output)))
    method(pairs(), at())
    assert [(queries, output.requires_grad) for queries, output in calls] == [(True, True), (False, False)]


@pytest.mark.parametrize("options", CHOICES)
def test_one_step_moves_the_teacher_by_the_share_of_the_student_s_step(alice, pairs, at, options):
    method = alice(ema_momentum=0.9, **options)
    before = copy.deepcopy(method)
    train(method, lambda step: pairs(), at, steps=1)
    names = {"teacher_backbone": "backbone", "teacher_head": "head"}
    names |= {"teacher_cafa": "cafa"} if method.teacher_cafa is not None else {}
    for teacher, student in names.items():
        old, new = dict(before.get_submodule(teacher).named_parameters()), method.get_submodule(teacher)
        for name, parameter in new.named_parameters():
            follows = method.get_submodule(student).get_parameter(name)
            share = 1.0 if (teacher, name) == ("teacher_cafa", "query.weight") else 0.1
            if not follows.requires_grad:
                share = 1.0
            expected = old[name] + share * (follows - old[name])
            assert torch.allclose(parameter, expected, atol=1e-6), (teacher, name)
    moved = method.backbone.encoder.fine[0].weight - before.backbone.encoder.fine[0].weight
    assert moved.abs().max() > 0


def test_centres_are_used_before_they_move_and_move_by_all_micro_batches(alice, pairs, at):
    method = alice(centre_momentum=0.8)
    batches = [pairs(seed=1), pairs(seed=2, b=1)]
    crops, tokens = [], []
    method.teacher_head.register_forward_hook(lambda _, inputs, output: crops.append(output.pooled))
    method.cafa.register_forward_hook(lambda _, inputs, output: tokens.append(output))
    for micro, batch in enumerate(batches):
        method(batch, at(micro=micro))
        assert method.centre.abs().max() == 0
        assert method.token_centre.abs().max() == 0
    method.after_step(at())
    assert torch.allclose(method.centre, 0.2 * torch.cat(crops).mean(0, keepdim=True), atol=1e-7)
    targets = torch.cat([tokens[1], tokens[3]])  # the student's side comes first
    assert torch.allclose(method.token_centre, 0.2 * targets.mean((0, 1))[None], atol=1e-6)
    assert method.logit_sum.abs().max() == method.token_sum.abs().max() == method.num_rows == 0


def test_gradients_of_the_student_are_clipped_one_by_one_and_those_of_the_alignment_are_not(alice, pairs, at):
    plain, clipped = alice(clip_per_parameter=None), alice(clip_per_parameter=1e-3)
    found = []
    for method in (plain, clipped):
        method(pairs(), at()).loss.backward()
        method.after_backward(at())
        found.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    shrunk = 0
    for name, whole in found[0].items():
        norm = whole.norm().item()
        share = 1.0 if name.startswith("cafa") else min(1.0, 1e-3 / (norm + 1e-6))
        shrunk += share < 1
        assert torch.allclose(found[1][name], whole * share, atol=1e-7), name
    assert 0 < shrunk < len(found[0])
    assert any(whole.norm() > 1e-3 for name, whole in found[0].items() if name.startswith("cafa"))


def test_the_prototypes_wait_for_the_second_epoch(alice, pairs, at):
    method = alice(freeze_last_layer_epochs=1)
    layers = {"head.projector.last_layer.weight_v", "head.token_layer.weight_v"}
    for step, waiting in ((9, True), (10, False)):
        method(pairs(), at(step)).loss.backward()
        method.after_backward(at(step))
        missing = {name for name, p in method.named_parameters() if p.requires_grad and p.grad is None}
        assert missing == (layers if waiting else set())


def test_schedules_are_those_of_the_step(alice, pairs, at):
    method = alice(teacher_temperature_epochs=3)
    logs = [method(pairs(), at(step)).logs for step in (0, 10, 20, 99)]
    assert [log["teacher_temperature"].item() for log in logs] == pytest.approx([0.008, 0.009, 0.01, 0.01])
    momenta = [1 - 0.004 * (math.cos(math.pi * step / 100) + 1) / 2 for step in (0, 10, 20, 99)]
    assert [log["ema_momentum"].item() for log in logs] == pytest.approx(momenta)


def test_weights_without_decay_are_the_biases_gains_and_norms(alice):
    """As in the released code: what has two and more dimensions decays, and fixed gains are left out."""
    decayed, plain = alice().param_groups()
    assert "weight_decay" not in decayed
    assert plain["weight_decay"] == 0.0
    assert {p.ndim for p in plain["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    method = alice()
    trained = [p for p in (*method.backbone.parameters(), *method.head.parameters(), *method.cafa.parameters())]
    count = sum(len(group["params"]) for group in method.param_groups())
    assert count == len(trained) - 2  # the gains of both prototype layers


def test_signs_of_a_collapse_are_logged(alice, pairs, at):
    method, batch = alice().eval(), pairs(b=4)
    logs = method(batch, at()).logs
    image = batch["pair"].image.transpose(0, 1).flatten(0, 1)
    whole = method.teacher_backbone(image)
    anchors = method.teacher_head(*whole[:3]).pooled
    probabilities = (anchors / 0.008).softmax(1)
    entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(1).mean()
    assert logs["entropy_teacher"].item() == pytest.approx(entropy.item(), abs=1e-5)
    mean = probabilities.mean(0)
    assert logs["entropy_teacher_mean"].item() == pytest.approx(-torch.xlogy(mean, mean).sum().item(), rel=1e-4)
    directions = whole.pooled / whole.pooled.norm(dim=1, keepdim=True)
    spread = (directions - directions.mean(0)).square().mean(0).sqrt().mean().item() * 12**0.5
    assert logs["feature_std"].item() == pytest.approx(spread, rel=1e-4)
    student = method.head(*method.backbone(image, method._mask(image, at()))[:3]).pooled
    agreement = sum(anchors[n].argmax().item() == student[4 + n].argmax().item() for n in range(4)) / 4
    assert logs["accuracy"].item() == agreement
    seen = []
    method.cafa.register_forward_hook(lambda _, inputs, output: seen.append(output))
    method(batch, at())
    mean = (seen[1] / 0.008).softmax(2).mean((0, 1))
    assert logs["entropy_tokens_mean"].item() == pytest.approx(-torch.xlogy(mean, mean).sum().item(), rel=1e-4)
    method.teacher_backbone.encoder.coarse.weight.data.zero_()
    collapsed = method(batch, at()).logs
    assert collapsed["feature_std"].item() == pytest.approx(0, abs=1e-6)
    assert collapsed["entropy_teacher"].item() == pytest.approx(collapsed["entropy_teacher_mean"].item(), abs=1e-5)


def test_validation_leaves_no_trace(alice, pairs, at):
    method = alice(cafa_ema=True).eval()
    before = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        method(pairs(), at())
        figures_of(method, pairs(), at())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert not method.training


def test_the_teacher_is_never_in_training_mode_unless_it_drops_paths(alice):
    method = alice(cafa_ema=True).train()
    assert method.backbone.training
    assert method.cafa.training
    teachers = (method.teacher_backbone, method.teacher_head, method.teacher_cafa)
    assert not any(teacher.training for teacher in teachers)
    dropping = alice(teacher_drop_path=True).train()
    assert dropping.teacher_backbone.training
    assert not dropping.eval().teacher_backbone.training


def test_losses_under_autocast_are_float32_and_near_those_of_full_precision(alice, pairs, at):
    method = alice(teacher_temperature_start=0.1)
    full = method(pairs(), at())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(pairs(), at())
    assert half.loss.dtype == torch.float32
    for term in TERMS:
        assert half.logs[term].item() == pytest.approx(full.logs[term].item(), abs=0.05)
    half.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_the_losses_fall(alice, pairs, at):
    method = alice(teacher_temperature_start=0.04, teacher_temperature=0.04, centre_momentum=0.5)
    logs = train(method, lambda step: pairs(b=4, seed=step % 4), at, steps=60, rate=3e-3)
    first, last = ([sum(log[term] for log in rows) / 5 for term in TERMS] for rows in (logs[:5], logs[-5:]))
    assert last[2] < first[2] / 3
    assert last[1] < first[1]
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert all(log["feature_std"] > 0.05 for log in logs)


def test_a_restart_from_a_checkpoint_continues_bit_for_bit(alice, pairs, at):
    def step(method, optimizer, number):
        torch.manual_seed(number)  # as the training module does, for dropout
        for micro in range(2):
            method(pairs(seed=2 * number + micro), at(number, micro=micro)).loss.backward()
        method.after_backward(at(number))
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(at(number))

    def build():
        method = alice(dropout=0.2, cafa_dropout=0.1, cafa_ema=True)
        return method, torch.optim.AdamW(method.param_groups(), lr=1e-3)

    straight, optimizer = build()
    file = io.BytesIO()
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
    first, second = straight.state_dict(), resumed.state_dict()
    assert first.keys() == second.keys()
    assert {"centre", "token_centre", "cafa.query.weight", "teacher_cafa.key.weight"} <= first.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert min(first[name].abs().max() for name in ("centre", "token_centre")) > 0


def test_figures_show_both_crops_whole_masked_and_rebuilt_side_by_side(alice, pairs, at):
    method, batch = alice(), pairs(b=3)
    figure = figures_of(method, batch, at(7))["pair"]
    assert method.training
    titles = [axis.get_title() for axis in figure.axes[:6]]
    assert titles == ["query", "key", "masked query", "masked key", "rebuilt query", "rebuilt key"]
    assert figure.get_suptitle() == "one anatomy in two volumes, step 7"
    rows = [[figure.axes[6 * row + column].images[0].get_array() for column in range(6)] for row in range(3)]
    axial = batch["pair"].image[0, :, 0, :, :, 8]
    for view in range(2):
        assert torch.equal(torch.as_tensor(rows[2][view].data), axial[view].T.flip(0))
    for panels in rows:
        for view in range(2):
            hidden = panels[2 + view].mask
            assert hidden.mean() > 0
            assert (panels[2 + view].data[~hidden] == panels[view].data[~hidden]).all()


def test_what_leaves_pre_training_are_the_networks_of_student_and_teacher(alice):
    method = alice()
    parts = method.parts()
    assert parts.keys() == {"encoder", "decoder", "teacher_encoder", "teacher_decoder", "head", "cafa"}
    assert parts["encoder"] is method.encoder is method.backbone.encoder
    assert parts["teacher_decoder"] is method.teacher_backbone.decoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_tokens": "both"}, "teacher_tokens is 'both', allowed are decoder, encoder"),
        ({"mask_shape": "ball"}, "the shape of a mask is 'ball', allowed are column, cube"),
        ({"student_temperature": 0.0}, "must be positive"),
        ({"ema_momentum": 1.5}, r"ema_momentum must lie in \[0, 1\], got 1.5"),
    ],
)
def test_unknown_options_are_refused(alice, options, message):
    with pytest.raises(ValueError, match=message):
        alice(**options)


def test_networks_that_do_not_fit_are_refused_with_the_settings_that_do(alice):
    fitting = alice()
    head = AliceHead(bottleneck_channels=10, decoded_channels=6, hidden_dim=8, bottleneck_dim=4, num_prototypes=16)
    message = "head.bottleneck_channels is 10, .*; set method.head.bottleneck_channels=12$"
    with pytest.raises(ValueError, match=message):
        Alice(backbone=fitting.backbone, head=head, cafa=fitting.cafa)
    with pytest.raises(ValueError, match=r"set method\.cafa\.dim=16$"):
        Alice(backbone=fitting.backbone, head=fitting.head, cafa=CAFA(dim=8, hidden_dim=8, num_heads=2, head_dim=4))
