from contextlib import nullcontext
from unittest.mock import Mock

import lightning as L
import pytest

from medssl.data.module import Batch
from medssl.methods.base import Method, Progress
from medssl.training.figures import Pictures
from medssl.training.method_module import MethodModule


class Drawing(Method):
    """A method with one picture, whose file is empty."""

    def forward(self, batch, progress):
        raise AssertionError("pictures of one's own extras need no step")

    def extras(self, views, progress):
        return {}

    def figures(self, batch, extras, progress):
        return {"view": Mock(savefig=lambda path, dpi: path.touch())}


@pytest.mark.parametrize(("every", "drawn"), [(2, [2, 4, 5]), (5, [5]), (7, [5]), (None, [])])
def test_pictures_are_drawn_every_so_many_steps_and_at_the_last_one_or_never(tmp_path, every, drawn):
    trainer = Mock(spec=L.Trainer, max_steps=5, is_global_zero=True, loggers=[], precision_plugin=Mock())
    trainer.precision_plugin.forward_context = nullcontext
    module = Mock(spec=MethodModule, method=Drawing(), progress=lambda batch: Progress())
    pictures = Pictures(tmp_path, every=every)
    for step in range(1, 6):
        pictures.step = step
        pictures.after_step(trainer, module, Mock(spec=Batch, views={}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"view-{step:07d}.png" for step in drawn]
