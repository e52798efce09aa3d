import copy
import io
import math

import pytest
import torch
from small_alice import CHOICES, TERMS


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
