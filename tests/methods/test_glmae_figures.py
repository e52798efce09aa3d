import pytest
import torch
from pairs_of_views import figures_of

from medssl.losses.reconstruction import patch_statistics
from medssl.ops.patches import patchify


def test_figures_show_input_masked_and_reconstruction_of_both_scales(glmae, views, at):
    method, batch = glmae(), views()
    figures = figures_of(method, batch, at(7))
    assert figures.keys() == {"global", "local"}
    assert method.training
    for name, figure in figures.items():
        assert [axis.get_title() for axis in figure.axes[:3]] == ["input", "masked", "reconstruction"]
        assert figure.get_suptitle() == f"{name} view, step 7"
        panels = [[figure.axes[3 * row + column].images[0].get_array() for column in range(3)] for row in range(3)]
        image = batch[name].image[0, 0, 0]
        middle = image.shape[0] // 2
        assert torch.equal(torch.as_tensor(panels[2][0].data), image[:, :, middle].T.flip(0))
        for shown, masked, rebuilt in panels:
            hidden = masked.mask
            assert 0 < hidden.mean() < 1
            assert (rebuilt.data[~hidden] == shown.data[~hidden]).all()
            assert (rebuilt.data[hidden] != shown.data[hidden]).any()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_drawn_as_the_input(glmae, views, at, norm_pix):
    method, batch = glmae(norm_pix=norm_pix), views(q=0)
    target = patchify(batch["global"].image[:1, 0], 4)
    mean, std = patch_statistics(target)
    perfect = (target - mean) / std if norm_pix else target
    extras = method.extras(batch, at()) | {"prediction_global": perfect}
    axes = method.figures(batch, extras, at())["global"].axes
    shown, rebuilt = (axes[column].images[0].get_array().data for column in (0, 2))
    assert abs(shown - rebuilt).max() < 1e-5
