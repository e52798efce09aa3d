import itertools

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedding_stand_in import FixedFeatures
from oracles import anatomy_matching as oracle
from synthetic import smooth

from medssl.data.augment import Window
from medssl.data.reading import read_volume
from medssl.data.volume import Volume
from medssl.extraction.embedder import Embedder
from medssl.extraction.embedding import VolumeEmbedding, contains, match_points
from medssl.inference.reading import Reading
from medssl.inference.record import record_of

READING = Reading(
    spacing_mm=(2.0, 2.0, 2.0),
    crop_voxel=(1, 1, 1),
    outside="minimum",
    normalise=(Window(low_hu=-1024, high_hu=3071, out=(-50.0, 205.0)),),
)
CELL_MM = 4.0


def embedder(**options):
    return Embedder(FixedFeatures(**options), READING, torch.device("cpu"))


def embed(array, affine, **options):
    record = record_of(Volume(array, affine, "synthetic"))
    return embedder(**options).of_array(array, record), record


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=0)


def random_embedding(seed, *, fine=(7, 6, 9), coarse=(2, 1, 5), spacing_mm=2.0, shape=None, dim=5):
    """Random vectors on a volume of 2 mm whose first voxel lies at the origin."""
    cell_to_mm = np.diag([2 * spacing_mm] * 3 + [1.0])
    cell_to_mm[:3, 3] = spacing_mm / 2
    volume = np.diag([spacing_mm] * 3 + [1.0])
    shape = shape or tuple(2 * n for n in fine)
    return VolumeEmbedding(unit(dim, *fine, seed=seed), unit(dim, *coarse, seed=seed + 50), cell_to_mm, volume, shape)


def test_the_search_gives_what_interpolating_and_comparing_cell_by_cell_gives(monkeypatch):
    query, key = random_embedding(0), random_embedding(1)
    cells = np.array([[0, 0, 0], [3, 5, 2], [6, 2, 8]])
    key_map = oracle.upsampled(key.coarse.numpy(), key.fine.shape[1:])
    query_map = oracle.upsampled(query.coarse.numpy(), query.fine.shape[1:])
    descriptors = query.descriptors(cells)
    for number, (i, j, k) in enumerate(cells):
        np.testing.assert_allclose(descriptors[number, 0], query.fine[:, i, j, k], atol=1e-6)
        np.testing.assert_allclose(descriptors[number, 1], query_map[:, i, j, k], atol=1e-6)
    whole = key.search(descriptors)
    for number in range(3):
        fine, coarse = descriptors[number].numpy()
        score = (np.einsum("e,eijk", fine, key.fine.numpy()) + np.einsum("e,eijk", coarse, key_map)) / 2
        assert tuple(whole[0][number]) == np.unravel_index(score.argmax(), score.shape)
        assert whole[1][number] == pytest.approx(score.max(), abs=1e-6)
    monkeypatch.setattr("medssl.extraction.embedding.SIMILARITIES", 200)
    again = random_embedding(1).search(descriptors)
    np.testing.assert_array_equal(again[0], whole[0])
    np.testing.assert_allclose(again[1], whole[1], atol=1e-6)


@pytest.mark.parity
def test_points_and_scores_are_those_of_the_official_index_arithmetic():
    """Anisotropic, in-plane equal spacing, first voxels at the origin, in the arithmetic's frame.

    It takes [4u, 4u + 4) mm for the cell of a point and answers with 4u + 1 mm, the middle of two 2 mm voxels. We take
    the cell with the nearest middle, so that points in the last millimetre of an interval belong to the next cell.
    """
    query_spacing, key_spacing = (0.8, 0.8, 2.5), (0.7, 0.7, 1.25)
    query, key = random_embedding(2), random_embedding(3)
    query = VolumeEmbedding(query.fine, query.coarse, query.cell_to_mm, np.diag([*query_spacing, 1.0]), (35, 30, 14))
    key = VolumeEmbedding(key.fine, key.coarse, key.cell_to_mm, np.diag([*key_spacing, 1.0]), (40, 34, 29))
    compared = 0
    for point in itertools.product((0, 7, 16, 33), (3, 11, 28), (0, 5, 13)):
        point_mm = np.array(point) * query_spacing
        if np.any(point_mm % 4 >= 3):
            continue
        voxel, cell, score = oracle.find_point(
            (query.fine.numpy(), query.coarse.numpy()),
            (key.fine.numpy(), key.coarse.numpy()),
            point,
            query_spacing_mm=query_spacing,
            key_spacing_mm=key_spacing,
            key_shape=(40, 34, 29),
        )
        cells, scores = key.search(query.descriptors(query.cells(point_mm[None])))
        found_mm, _ = match_points(query, point_mm[None], key)
        assert tuple(cells[0]) == cell
        assert scores[0] == pytest.approx(score, abs=1e-6)
        assert tuple(np.trunc(found_mm[0] / key_spacing + 1e-9).astype(int)) == voxel
        compared += 1
    assert compared > 8


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 2.0), (1.1, 1.1, 3.0)])
def test_a_volume_matched_to_itself_gives_each_point_back_within_a_cell_with_score_one(spacing_mm):
    array = smooth((50, 44, 24), seed=1)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-31.0, 12.5, 400.0]
    embedding, record = embed(array, affine)
    generator = np.random.default_rng(0)
    points = generator.uniform(0, np.array(array.shape[1:]) - 1, (40, 3)) * spacing_mm + affine[:3, 3]
    assert contains(record, points).all()
    found, scores = match_points(embedding, points, embedding)
    assert np.abs(found - points).max() <= CELL_MM / 2 + 1e-6
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    found, scores = match_points(embedding.half(), points, embedding.half())
    assert np.abs(found - points).max() <= CELL_MM / 2 + 1e-6
    np.testing.assert_allclose(scores, 1, atol=1e-3)


@pytest.mark.parametrize("shift_voxel", [(9, -5, 3), (-11, 0, -4)])
def test_crops_about_a_point_and_its_match_show_the_same_landmark_in_a_shifted_copy(shift_voxel):
    """The bodies lie off-centre and apart, the spacing is anisotropic: points cross volumes in millimetres alone."""
    spacing, shape = np.array([1.5, 1.2, 3.0]), (56, 60, 36)
    large = smooth((96, 96, 72), seed=3, sigma=3.0)
    start = np.array([20, 18, 15])

    def cut(lower):
        return np.ascontiguousarray(large[(slice(None), *(slice(a, a + n) for a, n in zip(lower, shape, strict=True)))])

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-100.0, 40.0, 7.0]
    first, second = cut(start), cut(start - shift_voxel)  # the second shows what the first shows, shifted
    (query, _), (key, _) = embed(first, affine), embed(second, affine)
    voxels = np.random.default_rng(5).integers(18, np.array(shape) - 18 * np.array([1, 1, 0.9]), (12, 3))
    points = voxels * spacing + affine[:3, 3]
    found, scores = match_points(query, points, key)
    error = np.abs(found - points - np.array(shift_voxel) * spacing)
    assert np.median(error.max(1)) <= CELL_MM
    assert (error.max(1) <= 5).mean() > 0.8
    assert np.median(scores) > 0.8
    apart = []
    for point, match in zip(points, found, strict=True):
        crops = []
        for array, place in ((first, point), (second, match)):
            voxel = np.rint((place - affine[:3, 3]) / spacing).astype(int)
            crops.append(array[(0, *(slice(v - 4, v + 4) for v in voxel))])
        apart.append(np.corrcoef(crops[0].ravel(), crops[1].ravel())[0, 1])
    assert np.median(apart) > 0.8


def test_a_match_does_not_depend_on_the_order_in_which_a_file_keeps_its_axes(tmp_path):
    array = smooth((40, 36, 20), seed=2)[0].astype(np.float32)
    affine = np.diag([1.5, 1.5, 4.0, 1.0])
    affine[:3, 3] = [-30.0, -80.0, 10.0]
    plain = nibabel.Nifti1Image(array, affine)
    found = []
    for number, code in enumerate(["RAS", "LPS", "SAR"]):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(code)
        )
        path = tmp_path / f"{number}.nii.gz"
        nibabel.save(plain.as_reoriented(turn), path)
        volume = read_volume(path)
        embedding, record = embed(volume.array, volume.affine)
        points = np.array([[-10.0, -60.0, 50.0], [12.0, -44.0, 30.0]])
        assert contains(record, points).all()
        found.append(match_points(embedding, points, embedding)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)


def test_matches_lie_in_the_volume_and_never_in_the_margin_of_its_grid():
    """17 x 17 x 5 voxels of 2 mm stand on a grid of 32 x 32 x 8: the best cell of the margin does not count."""
    query, _ = embed(smooth((16, 16, 4), seed=0), np.diag([2.0, 2.0, 2.0, 1.0]))
    array = smooth((17, 17, 5), seed=1)
    key, record = embed(array, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert key.fine.shape[1:] == (16, 16, 4)
    key.fine[:, 0, 0, 0] = query.fine[:, 4, 4, 1]
    found, _ = match_points(query, np.array([[17.0, 17.0, 5.0]]), key)
    assert contains(record, found).all()
    corners = np.array(list(itertools.product((-1.0, 33.0), (-1.0, 33.0), (-1.0, 9.0))))
    cells = key.cells(corners)
    assert contains(record, key.to_mm(cells)).all()
    voxel = key.to_mm(cells) / 2
    assert voxel.min() >= 0
    assert (voxel <= np.array([16, 16, 4])).all()


class Broken(FixedFeatures):
    """Gives vectors that are no unit vectors, or maps that lack a row."""

    def __init__(self, *, how):
        super().__init__()
        self.how = how

    def forward(self, image, coordinate=None):
        maps = super().forward(image)
        return [2 * level for level in maps] if self.how == "long" else [level[:, :, 1:] for level in maps]


@pytest.mark.parametrize(("how", "message"), [("long", "does not give unit vectors"), ("short", "a map of")])
def test_a_network_that_is_no_embedding_is_named(how, message):
    array = smooth((16, 16, 8))
    record = record_of(Volume(array, np.diag([2.0, 2.0, 2.0, 1.0]), "synthetic"))
    with pytest.raises(ValueError, match=message):
        Embedder(Broken(how=how), READING, torch.device("cpu")).of_array(array, record)


def test_images_with_other_channels_are_refused():
    array = np.concatenate([smooth((16, 16, 8))] * 2)
    record = record_of(Volume(array, np.eye(4), "two.nii.gz"))
    with pytest.raises(ValueError, match=r"two.nii.gz has 2 channels, the embedding reads 1"):
        embedder().of_array(array, record)


def test_tiles_along_z_change_nothing(embedding_weights):
    array = smooth((16, 24, 110))
    record = record_of(Volume(array, np.diag([2.0, 2.0, 2.0, 1.0]), "synthetic"))
    whole, tiled = (Embedder.load(embedding_weights, tile_voxel=tile).of_array(array, record) for tile in (None, 18))
    assert whole.fine.shape == (8, 8, 16, 56)
    assert torch.allclose(tiled.fine, whole.fine, atol=1e-5)
    assert torch.allclose(tiled.coarse, whole.coarse, atol=1e-5)


def test_the_card_says_how_images_are_read_without_their_augmentations(embedding_weights):
    reading = Embedder.load(embedding_weights).reading
    assert reading.spacing_mm == (2.0, 2.0, 2.0)
    assert reading.outside == Reading.from_layout("sam").outside == -1024
    (normalise,) = reading.normalise
    assert normalise.window_hu == [-1024, 3071]
