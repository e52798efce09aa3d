import pytest
import torch

from medssl.ops.queue import LocationQueue, default_length


def queue(**options):
    torch.manual_seed(0)
    return LocationQueue(**{"num_locations": 3, "dim": 4, "length": 5, **options})


def keys(*numbers):
    return torch.tensor([[float(n), 0, 0, 0] for n in numbers])


def test_keys_fill_the_ring_of_their_location_and_wrap():
    ring = queue()
    before = ring.keys.clone()
    assert torch.allclose(before.norm(dim=2), torch.ones(3, 5))
    ring.enqueue(torch.tensor([1, 1, 1]), keys(1, 2, 3), torch.tensor([7, 8, 9]), step=4)
    assert ring.keys[1, :3, 0].tolist() == [1, 2, 3]
    assert ring.subjects[1].tolist() == [7, 8, 9, -1, -1]
    assert ring.position.tolist() == [0, 3, 0]
    ring.enqueue(torch.tensor([1, 0, 1, 1]), keys(4, 40, 5, 6), torch.tensor([1, 2, 3, 4]), step=5)
    assert ring.keys[1, :, 0].tolist() == [6, 2, 3, 4, 5]
    assert ring.subjects[1].tolist() == [4, 8, 9, 1, 3]
    assert ring.position.tolist() == [1, 1, 0]
    assert ring.keys[0, 0, 0] == 40
    assert torch.equal(ring.keys[2], before[2])


def test_of_more_keys_than_places_the_last_stay():
    ring = queue(length=2)
    ring.enqueue(torch.zeros(5, dtype=torch.long), keys(1, 2, 3, 4, 5), torch.arange(5), step=0)
    assert ring.keys[0, :, 0].tolist() == [5, 4]
    assert ring.position[0] == 1


def test_age_counts_the_keys_that_are_there():
    ring = queue()
    assert ring.age(torch.tensor([0]), step=9) == 0
    ring.enqueue(torch.tensor([0]), keys(1), torch.tensor([1]), step=2)
    ring.enqueue(torch.tensor([0]), keys(1), torch.tensor([2]), step=6)
    assert ring.age(torch.tensor([0]), step=9) == 5
    assert ring.age(torch.tensor([0, 2]), step=9) == 5


def test_it_stays_in_main_memory_and_in_single_precision():
    module = torch.nn.ModuleDict({"queue": queue(), "layer": torch.nn.Linear(2, 2)})
    module.to(torch.float64)
    assert module["layer"].weight.dtype == torch.float64
    assert module["queue"].keys.dtype == torch.float32
    module.to("meta")
    assert module["queue"].keys.device.type == "cpu"
    found, subjects = module["queue"].fetch(torch.tensor([2]), torch.device("cpu"))
    assert torch.equal(found, module["queue"].keys[2:])
    assert subjects.tolist() == [[-1] * 5]


def test_one_ring_may_serve_all_locations():
    ring = queue(num_locations=1)
    assert ring.ring(torch.tensor([5, 0, 2])).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="location 3 has no queue: there are 3"):
        queue().ring(torch.tensor([1, 3]))


def test_the_default_length_is_a_power_of_two_that_holds_no_old_key_of_the_batch():
    assert [default_length(n, 8) for n in (10_000, 4104, 48, 9)] == [4096, 4096, 32, 2]
    assert queue(length=None, num_cases=48, batch_size=8).length == 32
    with pytest.raises(ValueError, match="length=0"):
        queue(length=0)
    with pytest.raises(ValueError, match="num_locations=0"):
        queue(num_locations=0)
