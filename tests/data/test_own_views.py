"""Views of tensors of one's own."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from medssl.data.views import View


def test_an_image_alone_is_the_whole_of_a_volume_that_the_body_fills():
    image = torch.rand(3, 2, 1, 8, 6, 4)
    view = View.of(image)
    assert view.image is image
    assert view.matrix.equal(torch.eye(4).double().expand(3, 2, 4, 4))
    assert view.volume_to_mm.equal(view.matrix)
    assert view.volume_shape.tolist() == [[[8, 6, 4]] * 2] * 3
    assert view.case.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert view.group.tolist() == [[0, 0]] * 3
    assert view.body_faces[1, 1].tolist() == [[-0.5] * 3, [7.5, 5.5, 3.5]]
    assert view.location_body.unique().tolist() == [0.5]
    assert view.crop_body[2, 0].tolist() == [[0.0] * 3, [1.0] * 3]
    never_asked = ("displacement", "location_index", "coordinate", "location_valid", "valid", "label", "regions")
    assert all(getattr(view, name) is None for name in (*never_asked, "points", "inside", "point_features"))


def test_an_image_without_a_dimension_of_views_has_one_view_a_sample():
    view = View.of(torch.rand(3, 2, 8, 6, 4), case=[4, 4, 7], label=torch.ones(3, 1, 8, 6, 4, dtype=torch.int64))
    assert view.image.shape == (3, 1, 2, 8, 6, 4)
    assert view.case.tolist() == [[4], [4], [7]]
    assert view.label.shape == (3, 1, 1, 8, 6, 4)


def test_a_cut_knows_where_it_lies_and_which_points_it_shows():
    volume = torch.arange(24.0**3).reshape(24, 24, 24)
    corners = torch.tensor([[0, 4, 10], [8, 0, 20]])
    cuts = [torch.nn.functional.pad(volume, (0, 8))[x : x + 8, y : y + 8, z : z + 8] for x, y, z in corners.tolist()]
    points = torch.tensor([[1.0, 5.0, 11.0], [8.5, 7.0, 23.0], [7.5, 7.0, 12.0]])
    view = View.of(
        torch.stack(cuts)[None, :, None],
        corner_voxel=corners[None],
        volume_shape=[24, 24, 24],
        volume_to_mm=np.diag([2.0, 2.0, 3.0, 1.0]),
        points=points,
        body_faces=[[-0.5, -0.5, -0.5], [23.5, 23.5, 11.5]],
    )
    place = view.to_volume(torch.tensor([2.0, 1.0, 3.0]).expand(1, 2, 1, 3))[0, :, 0]
    assert place.tolist() == [[2, 5, 13], [10, 1, 23]]
    assert [volume[tuple(at)] for at in place.long().tolist()] == [cut[2, 1, 3] for cut in cuts]
    assert view.grid_mm()[0, 1, :, 0, 0, 0].tolist() == [16, 0, 60]
    assert view.location_body[0].tolist() == pytest.approx(torch.tensor([[4, 8, 28], [12, 4, 48]]).div(24).numpy())
    assert view.crop_body[0, 1].tolist() == pytest.approx(torch.tensor([[8, 0, 40], [16, 8, 56]]).div(24).numpy())
    assert view.inside.tolist() == [[[True, False, False], [False, True, False]]]
    assert view.valid[0, 0].all()
    assert view.valid[0, 1, 0].flatten(0, 1).all(0).tolist() == [True] * 4 + [False] * 4


def test_a_view_that_was_turned_states_its_matrix():
    flipped = torch.diag(torch.tensor([-1.0, 1, 2, 1]))
    flipped[0, 3] = 15
    view = View.of(torch.rand(2, 1, 1, 8, 8, 4), matrix=flipped, volume_shape=[16, 8, 8])
    assert view.crop_body[0, 0].tolist() == pytest.approx(torch.tensor([[0.5, 0, -0.0625], [1, 1, 0.9375]]).numpy())
    moved = View.of(view.image, matrix=flipped, volume_shape=[16, 8, 8], location_body=0.5)
    assert moved.crop_body[1, 0].tolist() == pytest.approx(torch.tensor([[0.25, 0, 0], [0.75, 1, 1]]).numpy())


def test_places_that_are_the_same_in_all_cases_come_with_their_number():
    view = View.of(torch.rand(2, 2, 1, 4, 4, 4), location_index=[[3], [5]], coordinate=[[[0, 0, 1]], [[0, 1, 0]]])
    assert view.location_index.tolist() == [[3, 3], [5, 5]]
    assert view.coordinate[1].tolist() == [[0, 1, 0]] * 2
    assert view.location_valid.all()


def test_no_two_entries_of_a_field_share_memory():
    view = View.of(torch.rand(2, 2, 1, 4, 4, 4))
    view.location_body[0, 0, 0] = 0.25
    assert view.location_body.flatten().tolist() == [0.25] + [0.5] * 11


def test_every_field_can_be_stated():
    image = torch.rand(1, 1, 1, 4, 4, 4)
    said = {
        "matrix": 2 * torch.eye(4),
        "volume_to_mm": 3 * torch.eye(4),
        "volume_shape": [9, 9, 9],
        "case": 3,
        "group": 2,
        "location_body": 0.25,
        "crop_body": [[0.1] * 3, [0.4] * 3],
        "body_faces": [[0.0] * 3, [8.0] * 3],
        "displacement": torch.rand(3, 4, 4, 4),
        "location_index": 2,
        "coordinate": [0.0, 0.5, 1.0],
        "location_valid": False,
        "valid": torch.rand(1, 4, 4, 4) > 0.5,
        "label": torch.ones(1, 4, 4, 4, dtype=torch.int16),
        "regions": torch.ones(1, 4, 4, 4, dtype=torch.int64),
        "points": torch.rand(5, 3),
        "inside": [True, False, True, False, True],
        "point_features": torch.rand(5, 2),
    }
    view = View.of(image, **said)
    assert {"image", *said} == {field.name for field in fields(View)}
    for name, given in said.items():
        found = getattr(view, name)
        assert found[0, 0].equal(torch.as_tensor(given, dtype=found.dtype).expand(found.shape[2:])), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corner_voxel": [0, 0, 0], "matrix": torch.eye(4)}, "give one of them"),
        ({"corner_voxel": [0, 0, 0]}, "give volume_shape too"),
        ({"location_index": 3}, "give both or none"),
        ({"case": [0, 1]}, r"case has the shape \[2\]; give \[\] for all views, or \[2, 3\]"),
        ({"points": torch.rand(3)}, r"points has the shape \[3\]; give \[-1, 3\] for all views"),
        ({"matrix": torch.eye(3), "volume_shape": [4, 4, 4]}, r"matrix has the shape \[3, 3\]; give \[4, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        View.of(torch.rand(2, 3, 1, 4, 4, 4), **options)


def test_an_image_has_one_dimension_of_samples_and_at_most_one_of_views():
    with pytest.raises(ValueError, match=r"b v c x y z or b c x y z; got the shape \(2, 3, 1, 1, 4, 4, 4\)"):
        View.of(torch.rand(2, 3, 1, 1, 4, 4, 4))
