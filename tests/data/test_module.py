import numpy as np
import pytest
import torch

from medssl.data.augment import Flip, GaussianNoise
from medssl.data.matching import Matched
from medssl.data.module import VolumeDataModule
from medssl.data.placements import GridCrop, RandomCrop
from medssl.data.sampling import Pairs, Shuffled
from medssl.data.views import ViewPlan

PLAN = ViewPlan(groups={"x": RandomCrop(size=[8] * 3, augment=[Flip(), GaussianNoise()])})


def _module(store, **settings):
    defaults = {"store": store, "views": PLAN, "sampler": Shuffled(), "batch_size": 2, "seed": 0}
    return VolumeDataModule(**{**defaults, "training_cases": range(len(store)), **settings})


def test_facts_count_training_cases_steps_and_locations(noise_store):
    module = _module(
        noise_store, views=ViewPlan(groups={"x": GridCrop(size=[4] * 3, grid=[2, 3, 4])}), training_cases=[0, 1, 3]
    )
    facts = {"num_cases": 3, "num_channels": 1, "num_locations": 24, "crop_voxel": [4, 4, 4], "steps_per_epoch": 1.5}
    facts["steps_per_round"] = 1.5
    assert module.facts() == facts


def test_validation_draws_the_same_crops_each_time_whatever_the_seed(noise_store):
    cases = {"training_cases": [0, 1], "validation_cases": [2, 3]}
    batches = [next(iter(_module(noise_store, seed=seed, **cases).val_dataloader())) for seed in (0, 1)]
    assert sorted(batches[0].cases) == ["case_002", "case_003"]
    first, second = (_module(noise_store).draw(batch).views["x"].image for batch in batches)
    assert torch.equal(first, second)


def test_validation_pairs_held_out_cases_with_each_other(noise_store):
    plan = ViewPlan(groups={"pair": Matched(size=[8] * 3)})
    module = _module(noise_store, views=plan, sampler=Pairs(), training_cases=[0], validation_cases=[1, 2, 3])
    requests = [request for batch in module.val_dataloader() for request in batch.requests]
    assert sorted(request.cases[0] for request in requests[:3]) == [1, 2, 3]
    assert all(len(set(request.cases)) == 2 and 0 not in request.cases for request in requests)


def test_reading_ahead_changes_nothing_and_waiting_is_counted(noise_store):
    images = []
    for prefetch in (0, 3):
        module = _module(noise_store, prefetch=prefetch)
        loader = module.loader(module.sampler, module.training_cases, steps=range(5), seed=0)
        images.append(torch.cat([module.on_after_batch_transfer(batch, 0).views["x"].image for batch in loader]))
        seconds = module.timers.take()
        assert seconds["wait_s"] > 0
        assert seconds["draw_s"] > 0
        assert module.timers.take() == {"wait_s": 0.0, "draw_s": 0.0}
    assert torch.equal(*images)


def test_accumulation_cuts_the_same_batch_into_parts(noise_store):
    module = _module(noise_store, batch_size=4)

    def requests(accumulate):
        loader = module.loader(module.sampler, module.training_cases, steps=range(2), seed=0, accumulate=accumulate)
        return [request for batch in loader for request in batch.requests]

    assert requests(1) == requests(4)
    with pytest.raises(ValueError, match=r"batch_size=4 .* must be divisible by processes x accumulate = 1 x 3"):
        requests(3)


def test_an_unreadable_chunk_names_the_case(noise_store):
    case = noise_store.record(0).case
    (shard,) = (path for path in (noise_store.folder(0) / "0" / "c").rglob("0") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[: len(content) // 2] = b"\x00" * (len(content) // 2)
    shard.write_bytes(content)
    module = _module(noise_store)
    loader = module.loader(module.sampler, [0], steps=range(4), seed=0)
    with pytest.raises(ValueError, match=rf"cannot read a chunk of .*{case}-\w+\.zarr.*prepare again"):
        list(loader)


def test_a_lost_shard_is_not_read_as_zeros(noise_store):
    case = noise_store.record(0).case
    (shard,) = (path for path in (noise_store.folder(0) / "0" / "c").rglob("0") if path.is_file())
    shard.unlink()
    module = _module(noise_store)
    loader = module.loader(module.sampler, [0], steps=range(1), seed=0)
    with pytest.raises(ValueError, match=rf"cannot read a chunk of .*{case}-\w+\.zarr.*prepare again"):
        list(loader)


def test_air_that_is_zero_is_no_lost_chunk(make_store):
    array = np.zeros((1, 70, 40, 40), np.int16)
    array[0, :4] = 100
    store = make_store(array, labels=[np.zeros((70, 40, 40), int)])
    assert not store.read(0, 0, (40, 0, 0), (70, 40, 40)).result().any()
    assert not store.read_label(0, (0, 0, 0), (70, 40, 40)).result().any()


def test_cases_of_different_channels_are_refused_by_name_of_the_option(make_store):
    store = make_store(
        np.ones((1, 12, 12, 12), np.int16) * np.arange(12, dtype=np.int16), np.ones((2, 12, 12, 12), np.int16)
    )
    module = _module(store)
    loader = module.loader(module.sampler, [0, 1], steps=range(1), seed=0)
    with pytest.raises(ValueError, match=r"data\.channels=N"):
        module.draw(next(iter(loader)))


def test_a_resized_view_reads_a_few_times_its_own_size_however_large_the_volume(make_store):
    """Twice along its finest axis; fractions that differ by up to 2 make it four times along another."""
    store = make_store(np.random.default_rng(0).integers(0, 999, (1, 210, 190, 100)).astype(np.int16))
    size, reach = 24, 4 * 4 + 2  # of the filter
    plan = ViewPlan(groups={"x": RandomCrop(size=[size] * 3, count=8, fraction=[0.5, 1.0])})
    module = _module(store, views=plan)
    loader = module.loader(module.sampler, [0], steps=range(6), seed=0)
    sides = np.array([raw.voxels.shape[1:] for batch in loader for raw in batch.groups["x"]])
    assert sides.max() <= 4 * size + 2 * reach
    assert sides.prod(axis=1).mean() < 0.1 * 210 * 190 * 100


def test_the_loader_holds_boxes_and_never_a_whole_volume(noise_store):
    module = _module(noise_store)
    loader = module.loader(module.sampler, module.training_cases, steps=range(2), seed=0)
    for batch in loader:
        for raw in batch.groups["x"]:
            assert raw.voxels.shape == (1, 8, 8, 8)
            assert raw.voxels.untyped_storage().nbytes() == 2 * 8**3


def test_without_held_out_cases_there_is_no_validation(noise_store):
    assert _module(noise_store).val_dataloader() == []
