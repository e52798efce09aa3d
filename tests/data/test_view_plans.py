"""The data layer must carry every method: their view plans, written as YAML, composed and drawn small."""

import json

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from medssl.data.checksums import sealed
from medssl.data.module import VolumeDataModule
from medssl.methods.positions import Positions

GLMAE = """
sampler: {_target_: medssl.data.sampling.Shuffled}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    global: &view
      _target_: medssl.data.placements.RandomCrop
      count: 2
      size: [20, 20, 20]
      fraction: [0.5, 1.0]
      within: body
      augment: [{_target_: medssl.data.augment.ByModality}]
    local: {<<: *view, count: 8, size: [12, 12, 12], fraction: [0.25, 0.5]}
"""

SAM_EMBEDDING = """
sampler: {_target_: medssl.data.sampling.Shuffled}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    crops:
      _target_: medssl.data.placements.Containing
      count: 2
      size: [24, 24, 8]
      spacing_mm: 2.0
      scale: [0.8, 1.2]
      independent: 0.2
      within: body
      outside: -1024.0
      valid: true
      augment:
        - {_target_: medssl.data.augment.Window, low_hu: -1024, high_hu: 3071, out: [-50.0, 205.0]}
        - {_target_: medssl.data.augment.GaussianNoise, std: [0, 0.001]}
"""

ALICE = """
sampler: {_target_: medssl.data.sampling.Pairs, partner: previous}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    pair:
      _target_: medssl.data.matching.Matched
      size: [16, 16, 16]
      matcher: {_target_: medssl.data.matching.BodyCoordinateMatcher}
      score_threshold: 0.7
      tries: 101
      on_fail: best
      outside: -125.0
      augment: [{_target_: medssl.data.augment.Window, low_hu: -125, high_hu: 225}]
"""

DRASCLR = """
sampler: {_target_: medssl.data.sampling.SameLocation, num_locations: 27}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    query: &patch
      _target_: medssl.data.placements.GridCrop
      size: [16, 16, 16]
      grid: [3, 3, 3]
      context: crop
      outside: border
      augment:
        - &affine
          _target_: medssl.data.augment.Affine
          rotation_deg: 10
          translation: 3
          scale: [0.9, 1.1]
          per_axis: true
          space: voxel
        - {_target_: medssl.data.augment.Window, low_hu: -1024, high_hu: 240}
        - &noise {_target_: medssl.data.augment.GaussianNoise, std: [0, 0.04], probability: 0.25}
        - &gamma {_target_: medssl.data.augment.Gamma, gamma: [0.5, 4.5], probability: 0.25}
    key: {<<: *patch}
    neighbours:
      <<: *patch
      count: 2
      neighbours: true
      augment:
        - {<<: *affine, share: group}
        - {_target_: medssl.data.augment.Window, low_hu: -1024, high_hu: 240}
        - {<<: *noise, share: group, std: [0.02, 0.04], probability: 1.0}
        - {<<: *gamma, share: group, statistics: group}
"""

KAF = """
sampler: {_target_: medssl.data.sampling.Shuffled}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    first:
      _target_: medssl.data.placements.RandomCrop
      size: [24, 24, 24]
      points: keypoints
      augment: &moves
        - {_target_: medssl.data.augment.Flip, axes: [0, 1]}
        - _target_: medssl.data.augment.Sometimes
          probability: 0.67
          augment:
            - {_target_: medssl.data.augment.Elastic, sigma_voxel: [8, 10], rms_voxel: [0.5, 1]}
            - _target_: medssl.data.augment.Affine
              rotation_deg: [[-15, 15], [-15, 15], [0, 360]]
              scale: [0.7, 1.3]
              balanced: true
        - {_target_: medssl.data.augment.ByModality}
    second:
      _target_: medssl.data.placements.Nearby
      of: first
      shift: 0.05
      within: volume
      size: [24, 24, 24]
      points: keypoints
      augment: *moves
"""

MACL = """
sampler: {_target_: medssl.data.sampling.Anchored, volumes_per_anchor: 2, min_distance_body: 0.2}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    invariance_auxiliary:
      _target_: medssl.data.placements.Nearby
      of: anchor
      shift: 0.05
      size: [16, 16, 16]
      augment:
        - {_target_: medssl.data.augment.ByModality}
        - &jitter {_target_: medssl.data.augment.Contrast, factor: [0.8, 1.2], share: first}
    invariance_dominant:
      _target_: medssl.data.placements.Same
      of: invariance_auxiliary
      augment:
        - {_target_: medssl.data.augment.ByModality}
        - &other {<<: *jitter, share: second}
    variance_auxiliary: &variance
      _target_: medssl.data.placements.Same
      of: invariance_auxiliary
      augment:
        - &flip {_target_: medssl.data.augment.Flip, axes: [0, 1]}
        - &turn {_target_: medssl.data.augment.Affine, rotation_deg: [[0, 0], [0, 0], [0, 360]], scale: [0.7, 1.3]}
        - {_target_: medssl.data.augment.ByModality}
        - *jitter
    variance_dominant:
      <<: *variance
      augment: [*flip, *turn, {_target_: medssl.data.augment.ByModality}, *other]
"""

FINETUNE = """
sampler: {_target_: medssl.data.sampling.Shuffled}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    crops:
      _target_: medssl.data.placements.RandomCrop
      count: 2
      size: [16, 16, 16]
      label: true
      label_share: 0.67
      augment:
        - {_target_: medssl.data.augment.Flip}
        - {_target_: medssl.data.augment.Affine, rotation_deg: 15, scale: [0.8, 1.2], probability: 0.5}
        - {_target_: medssl.data.augment.ByModality, window_hu: [-175, 250]}
"""


def _volume(seed: int) -> np.ndarray:
    """A smooth body in air."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (48, 44, 40)], indexing="ij"))
    inside = (grid**2).sum(0) < 0.9
    texture = 60 * np.sin(9 * grid[0] + seed) * np.cos(7 * grid[1])
    return np.where(inside, texture, -1000)[None].round().astype(np.int16)


@pytest.fixture
def store(make_store):
    arrays = [_volume(n) for n in range(6)]
    labels = [(a[0] > 20).astype(int) + (a[0] < -20) * (a[0] > -500) * 2 for a in arrays]
    made = make_store(*arrays, labels=labels, affine=np.diag([1.5, 1.5, 2.0, 1.0]), groups=("a", "b") * 3)
    folder = made.root / "derived" / "keypoints-0"
    folder.mkdir(parents=True)
    for record in made.records():
        generator = np.random.default_rng(1)
        points = generator.uniform(0, np.array(record.shape) - 1, (50, 3))
        np.savez(folder / f"{record.case}.npz", points_voxel=points, features=generator.normal(size=(50, 2)))
    (made.root / "derived" / "keypoints.json").write_text(json.dumps(sealed({"folder": "keypoints-0"})))
    return made


def _first_batch(store, text: str, *, batch_size: int = 4, step: int = 0):
    config = instantiate(OmegaConf.create(text), _convert_="all")
    module = VolumeDataModule(
        store=store,
        views=config["views"],
        sampler=config["sampler"],
        batch_size=batch_size,
        seed=0,
        training_cases=range(len(store)),
    )
    loader = module.loader(config["sampler"], module.training_cases, steps=range(step, step + 1), seed=0)
    views = module.draw(next(iter(loader))).views
    for name, view in views.items():
        assert view.image.isfinite().all(), name
        assert view.image.std() > 0.01, name
    return views


def test_glmae_gets_global_and_local_crops_resized_from_shares_of_the_body(store):
    views = _first_batch(store, GLMAE)
    assert views["global"].image.shape == (4, 2, 1, 20, 20, 20)
    assert views["local"].image.shape == (4, 8, 1, 12, 12, 12)
    body = torch.tensor(store.record(0).body.size)
    for name, low, high in (("global", 0.5, 1), ("local", 0.25, 0.5)):
        sides = views[name].matrix.diagonal(dim1=-2, dim2=-1)[..., :3] * views[name].image.shape[-1]
        assert ((sides / body >= low - 1e-6) & (sides / body <= high + 1e-6)).all()
        assert views[name].image.min() >= 0
        assert views[name].image.max() <= 1


def test_sam_embedding_gets_two_scales_of_one_point_with_their_millimetres(store):
    view = _first_batch(store, SAM_EMBEDDING)["crops"]
    assert view.image.shape == (4, 2, 1, 24, 24, 8)
    assert view.valid.shape == (4, 2, 1, 24, 24, 8)
    grid = view.grid_mm()
    spacing = grid.diff(dim=3)[:, :, 0].mean((2, 3, 4))
    assert ((spacing >= 1.6) & (spacing <= 2.4)).all()
    volume = torch.tensor([48.0, 44, 40]) * torch.tensor([1.5, 1.5, 2.0])
    inside = ((grid >= -1) & (grid < volume[:, None, None, None])).all(2, keepdim=True)
    assert (inside | ~view.valid).all()
    assert torch.all(view.image[~view.valid.expand_as(view.image)] < 0), "what lies outside is air"
    assert (spacing[:, 0] - spacing[:, 1]).abs().max() > 0.01, "each crop has a scale of its own"


def test_sam_embedding_crops_hold_one_common_point_but_for_one_pair_in_five(store):
    held = []
    for step in range(10):
        grid = _first_batch(store, SAM_EMBEDDING, step=step)["crops"].grid_mm()
        half = (grid[..., 1, 1, 1] - grid[..., 0, 0, 0]) / 2
        low, high = grid[..., 0, 0, 0] - half, grid[..., -1, -1, -1] + half
        held += (low.amax(1) <= high.amin(1)).all(1).tolist()
    assert np.mean(held) >= 0.8 - 0.15
    plan = OmegaConf.create(SAM_EMBEDDING)
    plan.views.groups.crops.independent = 0.0
    grid = _first_batch(store, OmegaConf.to_yaml(plan), batch_size=6)["crops"].grid_mm()
    half = (grid[..., 1, 1, 1] - grid[..., 0, 0, 0]) / 2
    assert ((grid[..., 0, 0, 0] - half).amax(1) <= (grid[..., -1, -1, -1] + half).amin(1)).all()


def test_alice_gets_matched_crops_of_two_volumes(store):
    view = _first_batch(store, ALICE, step=1)["pair"]
    assert view.image.shape == (4, 2, 1, 16, 16, 16)
    assert (view.case[:, 0] != view.case[:, 1]).any()
    body = view.location_body
    np.testing.assert_allclose(body[:, 0], body[:, 1], atol=0.03)


def test_drasclr_gets_one_location_a_batch_and_neighbours_with_shared_parameters(store):
    views = _first_batch(store, DRASCLR)
    assert views["query"].location_index.unique().numel() == 1
    assert torch.equal(views["query"].location_index, views["key"].location_index)
    assert not torch.equal(views["query"].matrix, views["key"].matrix), "the key is another drawing"
    near = views["neighbours"]
    assert near.image.shape == (4, 2, 1, 16, 16, 16)
    assert (near.location_index != views["query"].location_index).all()
    np.testing.assert_allclose(near.matrix[:, 0, :3, :3], near.matrix[:, 1, :3, :3])
    assert not torch.allclose(near.matrix[0, 0, :3, :3], near.matrix[1, 0, :3, :3])
    assert ((views["query"].location_body > 0) & (views["query"].location_body < 1)).all()


def test_drasclr_neighbours_have_a_joint_gamma_and_noise_of_their_own(store):
    plain = OmegaConf.create(DRASCLR)
    group = plain.views.groups.neighbours
    group.augment = [op for op in group.augment if not op._target_.endswith(("GaussianNoise", "Gamma"))]
    gamma = OmegaConf.create(DRASCLR)
    gamma.views.groups.neighbours.augment = [
        *group.augment,
        OmegaConf.create(DRASCLR).views.groups.neighbours.augment[3],
    ]
    gamma.views.groups.neighbours.augment[-1].probability = 1.0
    noisy = OmegaConf.create(DRASCLR)
    noisy.views.groups.neighbours.augment = [
        *group.augment,
        OmegaConf.create(DRASCLR).views.groups.neighbours.augment[2],
    ]
    before, bent, grainy = (
        _first_batch(store, OmegaConf.to_yaml(c))["neighbours"].image for c in (plain, gamma, noisy)
    )
    low, high = before.amin((1, 3, 4, 5), keepdim=True), before.amax((1, 3, 4, 5), keepdim=True)
    share, power = ((x - low) / (high - low) for x in (before, bent))
    inside = (share > 0.05) & (share < 0.95)
    for b in range(4):
        exponents = (power[b].log() / share[b].log())[inside[b]]
        assert exponents.std() < 0.02 * exponents.mean(), "one exponent and one range for the group"
    noise = (grainy - before).flatten(2)
    np.testing.assert_allclose(noise[:, 0].std(1), noise[:, 1].std(1), rtol=0.1)
    assert abs(float(torch.corrcoef(noise[0])[0, 1])) < 0.1


def test_kaf_gets_two_bent_and_turned_views_with_points_carried_through(store):
    for step in range(3):
        views = _first_batch(store, KAF, step=step)
        shared = views["first"].inside & views["second"].inside
        assert shared.sum() > 4
        assert views["first"].point_features.shape == (4, 1, 50, 2)
        for view in views.values():
            back = view.to_volume(view.to_view(view.points))
            residual = (back - view.points).norm(dim=-1)
            assert residual[view.inside].max() < 0.25


def test_macl_gets_one_crop_twice_in_place_and_twice_moved(store):
    views = _first_batch(store, MACL)
    assert torch.equal(views["invariance_auxiliary"].matrix, views["invariance_dominant"].matrix)
    assert not torch.equal(views["variance_auxiliary"].matrix, views["variance_dominant"].matrix)
    assert not torch.equal(views["invariance_auxiliary"].image, views["invariance_dominant"].image), "jitter differs"
    first = views["invariance_auxiliary"]
    body = first.location_body[:, 0]
    assert (body[0] - body[1]).abs().max() <= 0.1 + 2 / 30, "two volumes near one anchor"
    assert torch.equal(views["variance_dominant"].location_body, first.location_body)
    for frame in ("body", "volume", "mm"):
        assert Positions.of_view(first).along(frame).shape == (4, 3)
    assert first.case[0] != first.case[1]
    assert torch.equal(first.group, first.case % 2), "cohorts a, b, a, b, ..."


def test_fine_tuning_gets_labels_beside_images_with_balanced_centres(store):
    view = _first_batch(store, FINETUNE)["crops"]
    assert view.label.shape == view.image.shape
    counts = torch.bincount(view.label.flatten(), minlength=3)
    assert (counts > 0).all()


def test_no_method_is_named_in_the_data_layer():
    from pathlib import Path

    import medssl.data

    folder = Path(medssl.data.__file__).parent
    text = "".join(path.read_text().lower() for path in folder.rglob("*.py"))
    assert not [name for name in ("glmae", "gl-mae", "alice", "drasclr", "kaf", "macl", "sam_embed") if name in text]
