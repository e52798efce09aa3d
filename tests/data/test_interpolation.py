import numpy as np
import pytest
import torch

from medssl.data import interpolation
from medssl.data.augment.base import Pose
from medssl.data.draw import ReadBox, grid_sampled, places_of, sampling_grid
from medssl.data.geometry import Displacement, Frame, affine_about, rotation_matrix
from medssl.data.interpolation import linear_at, nearest_at

SIDES, SHAPE = (30, 26, 34), (12, 10, 14)
STEP, TURN = [0.9, 1.0, 1.1], rotation_matrix(np.deg2rad([20, -15, 35]))
CPU = torch.device("cpu")


@pytest.fixture
def view_at():
    """A turned view about a voxel of a box, bent or not."""

    def make(center, *, bent=False):
        turn = affine_about(np.array(center, float), TURN, translation=np.zeros(3), to_space=np.eye(3))
        frame = Frame.at(center, SHAPE, step_voxel=STEP).moved(turn)
        nodes = np.random.default_rng(1).normal(0, 2, (3, *(Displacement.num_nodes(n, 5.0) for n in SHAPE)))
        pose = Pose(frame, Displacement(nodes.astype(np.float32), 5.0) if bent else None)
        return pose, ReadBox(0, np.zeros(3, int), np.array(SIDES), frame)

    return make


CENTERS = {"inside": (15, 13, 17), "edge": (2.5, 24, 30), "outside": (-40, 13, 17)}


@pytest.mark.parametrize("bent", [False, True], ids=["straight", "bent"])
@pytest.mark.parametrize("fill", [None, [-1024.0, 7.5]], ids=["border", "fill"])
@pytest.mark.parametrize("where", CENTERS)
def test_slabs_and_the_one_kernel_of_a_gpu_draw_the_same(view_at, where, fill, bent):
    pose, box = view_at(CENTERS[where], bent=bent)
    values = torch.from_numpy(np.random.default_rng(0).uniform(-1000, 1000, (2, *SIDES)).astype(np.float32))
    fill = None if fill is None else torch.tensor(fill)[:, None, None, None]
    slabs, kernel = torch.empty(2, *SHAPE), torch.empty(2, *SHAPE)
    linear_at(values, places_of(box, pose, CPU), fill=fill, out=slabs)
    grid_sampled(values.clone(), sampling_grid(box, pose, CPU), fill=fill, out=kernel)
    torch.testing.assert_close(slabs, kernel, rtol=0, atol=0.05)  # single precision of places, 2,000 a voxel
    if where == "outside" and fill is not None and not bent:
        assert torch.equal(slabs, fill.expand(2, *SHAPE))
    assert (slabs - kernel).abs().mean() < 2e-3


@pytest.mark.parametrize("where", CENTERS)
def test_results_do_not_depend_on_the_size_of_a_slab(view_at, where, monkeypatch):
    pose, box = view_at(CENTERS[where], bent=True)
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.uniform(-1000, 1000, (1, *SIDES)).astype(np.float32))
    labels = torch.from_numpy(generator.integers(0, 2**31 - 1, (1, *SIDES)).astype(np.int32))
    found = []
    for size in (1, 3 * 140, 10**6):
        monkeypatch.setattr(interpolation, "CACHED_VOXELS", size)
        image, label = torch.empty(1, *SHAPE), torch.empty((1, *SHAPE), dtype=torch.int64)
        linear_at(values, places_of(box, pose, CPU), fill=torch.zeros(1, 1, 1, 1), out=image)
        nearest_at(labels, places_of(box, pose, CPU), out=label)
        found.append((image, label))
    for image, label in found[1:]:
        assert torch.equal(image, found[0][0])
        assert torch.equal(label, found[0][1])


def test_a_box_of_one_voxel_is_its_value_and_the_fill_around_it(view_at):
    pose, _ = view_at(-TURN @ np.array(STEP) / 2)  # the view voxel after its middle shows the only voxel
    box = ReadBox(0, np.zeros(3, int), np.ones(3, int), pose.frame)
    image, label = torch.empty(1, *SHAPE), torch.empty((1, *SHAPE), dtype=torch.int64)
    linear_at(torch.full((1, 1, 1, 1), 5.0), places_of(box, pose, CPU), fill=None, out=image)
    assert torch.all(image == 5)
    linear_at(torch.full((1, 1, 1, 1), 5.0), places_of(box, pose, CPU), fill=torch.zeros(1, 1, 1, 1), out=image)
    nearest_at(torch.full((1, 1, 1, 1), 3, dtype=torch.uint8), places_of(box, pose, CPU), out=label)
    assert image[0, 6, 5, 7].item() == pytest.approx(5, abs=1e-4)
    assert label[0, 6, 5, 7] == 3
    assert set(label.unique().tolist()) == {0, 3}
    assert torch.all(image[label == 0] < 2.5)
