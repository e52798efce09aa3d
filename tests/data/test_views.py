import numpy as np
import pytest
import torch

from medssl.data.augment import Affine, Elastic, Flip, GaussianNoise, Window
from medssl.data.module import VolumeDataModule
from medssl.data.placements import Fixed, RandomCrop, Same
from medssl.data.sampling import Request, Shuffled
from medssl.data.views import ViewPlan
from medssl.methods.positions import Positions


@pytest.fixture
def coordinate_store(make_store):
    """A volume whose channels are its voxel coordinates (times 100): what a drawn voxel shows is where it lies."""
    grid = np.stack(np.meshgrid(np.arange(80), np.arange(72), np.arange(64), indexing="ij"))
    return make_store((100 * grid).astype(np.int16), affine=np.diag([1.0, 1.2, 2.0, 1.0]))


def _searched(image: torch.Tensor, place: torch.Tensor) -> torch.Tensor | None:
    """View position that shows `place`: the nearest of all voxels, then a Newton step on differences of neighbours."""
    shown = image / 100  # (3 x y z)
    distance = (shown - place[:, None, None, None]).square().sum(0)
    voxel = np.array(np.unravel_index(int(distance.argmin()), distance.shape))
    if np.any(voxel < 2) or np.any(voxel > np.array(distance.shape) - 3):
        return None
    x, y, z = voxel
    columns = [
        (shown[:, x + 1, y, z] - shown[:, x - 1, y, z]) / 2,
        (shown[:, x, y + 1, z] - shown[:, x, y - 1, z]) / 2,
        (shown[:, x, y, z + 1] - shown[:, x, y, z - 1]) / 2,
    ]
    return torch.tensor(voxel) + torch.linalg.solve(torch.stack(columns, 1).double(), place - shown[:, x, y, z])


@pytest.mark.parametrize(
    ("augment", "tolerance"),
    [
        ([Flip(), Affine(rotation_deg=25, scale=[0.8, 1.15], per_axis=True)], 1e-3),
        ([Elastic(rms_voxel=[1.0, 2.0]), Flip(), Affine(rotation_deg=25, scale=[0.8, 1.15])], 0.25),
    ],
)
def test_points_map_between_two_augmented_views_of_one_place(coordinate_store, draw, augment, tolerance):
    groups = {
        "a": RandomCrop(size=[28] * 3, outside="border", augment=augment, within="body"),
        "b": Same(of="a", outside="border", augment=augment),
    }
    found = 0
    for sample in range(4):
        views = draw(coordinate_store, ViewPlan(groups=groups), [Request((0,), sample)])
        marked = torch.randint(4, 24, (40, 3), generator=torch.Generator().manual_seed(sample))
        places = views["a"].to_volume(marked[None, None].double())
        mapped = views["b"].to_view(places)[0, 0]
        limit = torch.tensor([79.0, 71, 63])
        for u, place, stated in zip(marked, places[0, 0], mapped, strict=True):
            if not ((place > 8) & (place < limit - 8)).all():
                continue
            shown = views["a"].image[0, 0, :, u[0], u[1], u[2]].double() / 100
            assert (shown - place).abs().max() < 2e-3
            searched = _searched(views["b"].image[0, 0].double(), place)
            if searched is not None:
                assert (searched - stated).abs().max() < tolerance
                found += 1
    assert found > 40


def test_the_inverse_of_a_displacement_is_checked(coordinate_store, draw):
    folding = [Elastic(sigma_voxel=[2, 2], rms_voxel=[6, 6])]
    view = draw(coordinate_store, ViewPlan(groups={"x": Fixed(size=[32] * 3, augment=folding)}), [Request((0,), 0)])[
        "x"
    ]
    points = view.to_volume(torch.rand(1, 1, 200, 3).double() * 31)
    back = view.to_view(points)
    assert back.isnan().any(), "a field that folds has no inverse everywhere"
    kept = ~back.isnan().any(-1)
    residual = (view.to_volume(back.nan_to_num()) - points).norm(dim=-1)
    assert (residual[kept] <= 0.25).all()


def test_grid_mm_is_the_place_of_each_voxel_in_the_world(coordinate_store, draw):
    view = draw(coordinate_store, ViewPlan(groups={"x": Fixed(size=[8] * 3, spacing_mm=1.5)}), [Request((0,), 0)])["x"]
    expected = view.image[0, 0] / 100 * torch.tensor([1.0, 1.2, 2.0])[:, None, None, None]
    np.testing.assert_allclose(view.grid_mm()[0, 0].numpy(), expected.numpy(), atol=2e-2)
    steps = view.grid_mm()[0, 0].diff(dim=1)[0]
    np.testing.assert_allclose(steps.numpy(), 1.5, atol=1e-4)


def test_grid_body_is_the_place_of_each_voxel_in_the_body_box_also_of_turned_and_bent_views(coordinate_store, draw):
    augment = [Affine(rotation_deg=20.0), Elastic(), Flip()]
    plan = ViewPlan(groups={"x": RandomCrop(size=[8, 7, 6], count=2, augment=augment)})
    view = draw(coordinate_store, plan, [Request((0,), 0)])["x"]
    axes = [torch.arange(n, dtype=torch.float64) for n in (8, 7, 6)]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, 1, -1, 3).expand(1, 2, -1, 3)
    body = coordinate_store.record(0).body
    expected = body.to_body(view.to_volume(voxels).numpy())
    found = view.grid_body().permute(0, 1, 3, 4, 5, 2).reshape(1, 2, -1, 3)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    view.body_faces = None
    with pytest.raises(ValueError, match="does not know the body box"):
        view.grid_body()


def test_positions_in_body_volume_and_millimetres_agree(coordinate_store, draw):
    view = draw(coordinate_store, ViewPlan(groups={"x": RandomCrop(size=[8] * 3)}), [Request((0,), 0)])["x"]
    center = view.center_volume()[0, 0]
    body = coordinate_store.record(0).body
    found = Positions.of_view(view)
    np.testing.assert_allclose(found.along("body")[0].numpy(), body.to_body(center.numpy()))
    np.testing.assert_allclose(found.along("volume")[0].numpy(), (center.numpy() + 1) / [80, 72, 64])
    np.testing.assert_allclose(found.along("mm")[0].numpy(), center.numpy() * [1.0, 1.2, 2.0])


AUGMENT = [Flip(), Affine(rotation_deg=10), Window(low_hu=-1000, high_hu=1000), GaussianNoise()]


def _images(store, *, world: int, steps: range, accumulate: int = 1) -> dict[int, torch.Tensor]:
    """Images by sample number, from the loaders of all ranks."""
    plan = ViewPlan(groups={"x": RandomCrop(size=[8] * 3, count=2, augment=AUGMENT)})
    found = {}
    for rank in range(world):
        module = VolumeDataModule(
            store=store, views=plan, sampler=Shuffled(), batch_size=4, seed=7, training_cases=range(len(store))
        )
        loader = module.loader(Shuffled(), module.training_cases, steps=steps, seed=7, accumulate=accumulate)
        loader.micro_batches.rank, loader.micro_batches.world = rank, world
        for raw in loader:
            drawn = module.draw(raw)
            for n, request in enumerate(raw.requests):
                assert request.sample not in found, "requests of the ranks are disjoint"
                found[request.sample] = drawn.views["x"].image[n]
    return found


def test_a_sample_is_the_same_for_any_number_of_ranks_and_from_any_step(noise_store):
    straight = _images(noise_store, world=1, steps=range(4))
    assert sorted(straight) == list(range(16))
    for other in (
        _images(noise_store, world=2, steps=range(4)),
        _images(noise_store, world=1, steps=range(2, 4), accumulate=2),
    ):
        assert all(torch.equal(image, straight[sample]) for sample, image in other.items())
        assert other
    assert not torch.equal(straight[0], straight[1])
    assert not torch.equal(straight[0][0], straight[0][1])


def test_the_faces_of_a_crop_in_the_body_are_those_before_augmentation(make_store, draw):
    store = make_store(np.arange(40 * 30 * 20, dtype=np.int16).reshape(1, 40, 30, 20), affine=np.diag([1.0, 1, 2, 1]))
    body = store.record(0).body
    moved = [
        Flip(),
        Affine(rotation_deg=[[20, 20], [0, 0], [90, 180]], scale=[0.7, 0.8]),
        Elastic(rms_voxel=[1.0, 2.0]),
    ]
    faces = []
    for augment in ([], moved):
        crop = Fixed(size=[16, 12, 8], spacing_mm=[1.0, 1.0, 2.0], center=[0.5, 0.4, 0.6], augment=augment)
        view = draw(store, ViewPlan(groups={"crop": crop}), [Request(cases=(0,), sample=0)])["crop"]
        faces.append(view.crop_body)
        assert torch.allclose(view.crop_body.mean(2), view.location_body)
    assert torch.equal(*faces)
    share = torch.tensor([16, 12, 8]) / torch.tensor(body.size)
    assert torch.allclose(faces[0][0, 0, 1] - faces[0][0, 0, 0], share)
