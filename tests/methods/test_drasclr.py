from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles.instance import cross_entropies, summed
from pairs_of_views import figures_of
from torch import nn

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.drasclr import DrasCLR
from medssl.models.heads import MLPHead
from medssl.ops.queue import LocationQueue

COORDINATES = torch.tensor([[-1.0, 0, 0], [0, 1, 0.5], [1, -0.5, 0]])


class Encoder(nn.Module):
    """A convolution with batch norm whose kernel is a mixture of two, by place."""

    channels, strides, in_channels, takes_coordinate = (6,), (2,), 1, True

    def __init__(self):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(2, 6, 1, 3, 3, 3))
        self.router = nn.Linear(3, 2)
        self.bn = nn.BatchNorm3d(6)

    def represent(self, image, coordinate, index):
        gates = self.router(coordinate).sigmoid()[index]
        kernels = torch.einsum("ne,eoixyz->noixyz", gates, self.kernels)
        rows = [F.conv3d(row[None], kernel, stride=2) for row, kernel in zip(image, kernels, strict=True)]
        return F.elu(self.bn(torch.cat(rows))).mean((2, 3, 4))


def make(**options):
    torch.manual_seed(0)
    queue = LocationQueue(num_locations=options.pop("rings", 3), dim=5, length=options.pop("length", 64))
    head = MLPHead(in_dim=6, hidden_dim=7, out_dim=5)
    method = DrasCLR(encoder=Encoder(), head=head, queue=queue, num_locations=3, **options)
    assert method.key_encoder.training, "nobody calls train() on a method"
    return method


def view(images, locations, *, cases=None, valid=None):
    """Views (b v) of one size at locations (b v)."""
    return View.of(
        images,
        case=None if cases is None else torch.tensor(cases)[:, None],
        location_index=locations,
        coordinate=COORDINATES[torch.tensor(locations)],
        location_valid=True if valid is None else valid,
    )


def batch(*, b=8, r=2, location=1, seed=0, **options):
    images = torch.rand(b, 2 + r, 1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
    places = [[location, location]] * b
    near = [[(location + 1 + n) % 3 for n in range(r)]] * b
    around = {"neighbours": view(images[:, 2:], near, cases=options.get("cases"))} if r else {}
    return {"anchor": view(images[:, :2], places, **options), **around}


def at(step, **options):
    return Progress(step, 100, float(step), 100.0, 0, **options)


def with_two_coordinates(views):
    """The last row of the anchor lies elsewhere than the others of its location."""
    coordinate = views["anchor"].coordinate.clone()
    coordinate[-1, -1] = torch.tensor([0.25, 0.5, 0.75])
    return {**views, "anchor": replace(views["anchor"], coordinate=coordinate)}


def step(method, views, number=0):
    """One optimiser step without an optimiser: weights stay, queue and key encoder move."""
    output = method(views, at(number))
    output.loss.backward()
    method.after_step(at(number))
    return output


def unit_vectors(method, image, location):
    """What the query encoder gives, outside of the method."""
    index = torch.zeros(len(image), dtype=torch.long)
    features = method.encoder.represent(image, COORDINATES[location : location + 1], index)
    return F.normalize(method.head(features), dim=1)


def test_both_losses_are_those_of_loops_over_subjects_and_keys():
    method, views = make(), batch()
    method.queue.subjects[1, :5] = torch.tensor([3, 3, 9, 0, -1])
    rings = [
        list(zip(ring.tolist(), who.tolist(), strict=True))
        for ring, who in zip(method.queue.keys, method.queue.subjects, strict=True)
    ]
    found = method(views, at(0)).logs
    other = make()  # fresh batch statistics
    query = unit_vectors(other, views["anchor"].image[:, 0], 1)
    rows = views["neighbours"].image.flatten(0, 1)
    features = other.encoder.represent(rows, COORDINATES, torch.tensor([2, 0] * 8))
    near = F.normalize(other.head(features), dim=1).unflatten(0, (8, 2))
    key = unit_vectors(make(), views["anchor"].image[:, 1], 1)
    for name, vectors in (("local", query.tolist()), ("neighbours", summed(near.tolist()))):
        expected = cross_entropies(vectors, key.tolist(), rings, rings=[1] * 8, own=list(range(8)), temperature=0.2)
        assert found[name].item() == pytest.approx(sum(expected) / 8, rel=1e-5)
    assert found["excluded_share"].item() == pytest.approx(3 / (8 * 64))


@pytest.mark.parity
def test_a_step_at_a_location_fills_its_queue_alone():
    method = make()
    before = method.queue.keys.clone()
    step(method, batch())
    assert method.queue.position.tolist() == [0, 8, 0]
    assert torch.equal(method.queue.keys[[0, 2]], before[[0, 2]])
    assert torch.equal(method.queue.keys[1, 8:], before[1, 8:])
    assert not torch.isclose(method.queue.keys[1, :8], before[1, :8]).all(1).any()
    assert torch.allclose(method.queue.keys[1].norm(dim=1), torch.ones(64))
    assert method.queue.subjects[1, :9].tolist() == [*range(8), -1]
    assert torch.equal(method.coordinates[1], COORDINATES[1])
    assert method.coordinates[0].isnan().all()


@pytest.mark.parity
def test_the_key_encoder_follows_by_parameters_and_keeps_its_own_statistics():
    method = make(ema_momentum=0.9)
    query, key = method.encoder, method.key_encoder
    assert all(torch.equal(a, b) for a, b in zip(query.parameters(), key.parameters(), strict=True))
    old = [p.clone() for p in (*key.parameters(), *method.key_head.parameters())]
    output = method(batch(), at(0))
    output.loss.backward()
    assert query.bn.num_batches_tracked == 2, "anchors and neighbours are two passes"
    assert key.bn.num_batches_tracked == 1
    own = key.bn.running_mean.clone()
    with torch.no_grad():
        for parameter in (*query.parameters(), *method.head.parameters()):
            parameter -= 0.1 * parameter.grad
    method.after_step(at(0))
    new = [*query.parameters(), *method.head.parameters()]
    for before, after, student in zip(old, [*key.parameters(), *method.key_head.parameters()], new, strict=True):
        assert torch.allclose(after, 0.9 * before + 0.1 * student, atol=1e-7)
    assert torch.equal(key.bn.running_mean, own)


def test_gradient_reaches_all_of_the_query_network_and_nothing_of_the_keys():
    method = make()
    method(batch(), at(0)).loss.backward()
    for module in (method.encoder, method.head):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert all(p.grad is None for p in (*method.key_encoder.parameters(), *method.key_head.parameters()))
    assert not method.queue.keys.requires_grad


def test_the_queue_is_read_before_the_batch_enters_it():
    method, views = make(mask_self=False), batch()
    first = step(method, views)
    again = method(views, at(1))
    assert first.logs["local"] < again.logs["local"], "its own keys are now among the negatives"
    assert make()(views, at(0)).logs["local"] == first.logs["local"]


def test_older_keys_of_a_subject_are_no_negatives_of_it():
    method, views = make(), batch()
    step(method, views)
    assert method(views, at(1)).logs["excluded_share"].item() == pytest.approx(1 / 64)
    assert method(batch(location=0), at(1)).logs["excluded_share"] == 0


@pytest.mark.parametrize("neighbour", [0, 1])
def test_the_neighbourhood_s_loss_depends_on_every_neighbour(neighbour):
    views = batch()
    before = make()(views, at(0)).logs
    views["neighbours"].image[0, neighbour] = 1 - views["neighbours"].image[0, neighbour]
    after = make()(views, at(0)).logs
    assert after["neighbours"] != before["neighbours"]
    assert after["local"] == before["local"]


def test_a_neighbour_that_is_the_query_has_the_query_s_loss():
    views = batch(r=0)
    anchor = views["anchor"]
    views["neighbours"] = view(anchor.image[:, :1], [[1]] * 8)
    found = make()(views, at(0)).logs
    assert found["neighbours"].item() == pytest.approx(found["local"].item(), rel=1e-6)


def test_a_mean_of_neighbours_is_another_loss_than_their_sum():
    total, mean = (make(neighbour_reduce=name)(batch(), at(0)).logs for name in ("sum", "mean"))
    assert total["local"] == mean["local"]
    assert abs(total["neighbours"] - mean["neighbours"]) > 1e-3


def test_what_a_subject_does_not_show_counts_nowhere():
    shown = [[n != 2] * 2 for n in range(8)]
    views = batch(valid=shown)
    method = make()
    output = step(method, views)
    assert method.queue.subjects[1, :8].tolist() == [0, 1, 3, 4, 5, 6, 7, -1]
    views = batch(valid=shown, cases=[0, 1, 99, 3, 4, 5, 6, 7])  # whoever it is
    assert make()(views, at(0)).logs["local"] == output.logs["local"]
    whole = make()(batch(), at(0)).logs["local"]
    assert whole != output.logs["local"]


def test_a_missing_neighbour_is_left_out_of_the_sum():
    views = batch()
    views["neighbours"].location_valid[3, 1] = False
    with_one = make()(views, at(0)).logs["neighbours"]
    assert with_one != make()(batch(), at(0)).logs["neighbours"]
    views["neighbours"].location_valid[:] = False
    output = make()(views, at(0))
    assert output.logs["neighbours"] == 0
    assert output.loss == output.logs["local"]


def test_the_neighbourhood_joins_after_the_warm_up_and_may_stay_away():
    method = make(warm_up_steps=3)
    assert "neighbours" not in method(batch(), at(2)).logs
    assert "neighbours" in method(batch(), at(3)).logs
    assert "neighbours" not in make(weight_neighbours=0)(batch(), at(0)).logs
    assert "neighbours" not in make()(batch(r=0), at(0)).logs
    output = make(weight_local=0, weight_neighbours=2)(batch(), at(0))
    assert output.loss.item() == pytest.approx(2 * output.logs["neighbours"].item())


def test_mixed_locations_meet_their_own_queues():
    images = torch.rand(4, 2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    views = {"anchor": view(images, [[0, 0], [2, 2], [0, 0], [2, 2]])}
    method = make()
    found = step(method, views)
    assert method.queue.position.tolist() == [2, 0, 2]
    assert method.queue.subjects[2, :2].tolist() == [1, 3]
    changed = make()
    changed.queue.keys[1] = 0
    assert changed(views, at(0)).logs["local"] == found.logs["local"]
    changed = make()
    changed.queue.keys[2] = 0
    assert changed(views, at(0)).logs["local"] != found.logs["local"]


def test_one_queue_for_all_locations_is_an_ablation():
    method = make(rings=1)
    step(method, batch(location=1))
    step(method, batch(location=2, seed=1), 1)
    assert method.queue.position.tolist() == [16]


def test_keys_normed_in_parts_come_back_in_order():
    views = batch(r=0)
    plain, split = make(key_norm="plain"), make(key_norm="split", num_splits=4)
    for method in (plain, split):
        method.encoder.eval(), method.key_encoder.eval()
    assert torch.allclose(_pending(plain, views), _pending(split, views), atol=1e-6), "without batch statistics"
    assert not torch.allclose(_pending(make(key_norm="plain"), views), _pending(make(key_norm="split"), views))


def _pending(method, views):
    method(views, at(0))
    return method.pending[0].key


def test_micro_batches_are_queued_together_after_the_step():
    method = make()
    for micro in range(2):
        method(batch(b=4, seed=micro, cases=[4 * micro + n for n in range(4)]), at(0, micro=micro))
    assert method.queue.position.sum() == 0
    method.after_step(at(0))
    assert method.queue.subjects[1, :8].tolist() == list(range(8))
    assert method.pending == []


def test_held_out_volumes_leave_no_trace():
    method = make().eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch(), at(0))
    assert method.pending == []
    after = method.state_dict()  # coordinates that no batch has shown are NaN before and after
    assert all(torch.equal(after[name].isnan(), value.isnan()) for name, value in before.items())
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_health_tells_ages_and_gates():
    method = make()
    first = step(method, batch(), 0).logs
    assert first["queue_age"] == 0
    assert "gate_std" not in first, "no location is known yet"
    step(method, batch(location=2), 1)
    logs = method(batch(), at(5)).logs
    assert logs["queue_age"] == 5
    gates = method.encoder.router(COORDINATES[1:]).sigmoid()
    assert logs["gate_std"].item() == pytest.approx(gates.std(0, correction=0).mean().item(), rel=1e-5)
    assert 0 < logs["gate_entropy"] <= 0.6932
    assert logs["feature_std"] > 0


def test_all_weights_have_one_group_and_pictures_show_the_location():
    method = make()
    (group,) = method.param_groups()
    assert len(group["params"]) == len([*method.encoder.parameters(), *method.head.parameters()])
    figure = figures_of(method, batch(), at(0))["location"]
    titles = [axis.get_title() for axis in figure.axes[:5]]
    assert titles == ["query", "key", "neighbour 1", "neighbour 2", "another subject"]
    assert set(method.parts()) == {"encoder", "head", "teacher_encoder"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(neighbour_reduce="max"), "neighbour_reduce is 'max', allowed are sum, mean"),
        (lambda: make(key_norm="none"), "key_norm is 'none', allowed are shuffle, split, plain"),
        (lambda: make(temperature=0.0), "temperature must be positive"),
        (lambda: make(ema_momentum=1.5), "ema_momentum is a share, from 0 to 1; got 1.5"),
        (lambda: make(num_splits=0), "num_splits must be at least 1"),
        (lambda: make()(batch(b=1), at(0)), "at least 2 samples .* raise batch_size"),
        (lambda: make()({}, at(0)), "a view group `anchor` with two views"),
        (
            lambda: make()(with_two_coordinates(batch()), at(0)),
            r"location 1 has the coordinates .*\[0.25, 0.5, 0.75\].* in one batch",
        ),
        (lambda: make()({"anchor": replace(batch()["anchor"], coordinate=None)}, at(0)), "use placement GridCrop"),
        (
            lambda: DrasCLR(
                encoder=nn.Linear(1, 1), head=nn.Linear(1, 1), queue=LocationQueue(num_locations=1), num_locations=1
            ),
            "an encoder with `represent`",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
