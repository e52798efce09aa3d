import copy

import pytest
import torch
from pairs_of_views import figures_of
from small_alice import CHOICES, TERMS

from medssl.data.views import View
from medssl.losses.alignment import halved_mse, inter_volume_loss, intra_volume_loss
from medssl.methods.alice import Alice
from medssl.models.alice_head import AliceHead
from medssl.models.cafa import CAFA


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


def test_validation_leaves_no_trace(alice, pairs, at):
    method = alice(cafa_ema=True).eval()
    before = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        method(pairs(), at())
        figures_of(method, pairs(), at())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert not method.training


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
        ({"ema_momentum": 1.5}, "ema_momentum is a share, from 0 to 1; got 1.5"),
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
