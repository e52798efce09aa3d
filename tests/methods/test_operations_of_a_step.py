"""No reference method loops over its samples: a step of more crops consists of as many operations."""

import pytest
from small_contrast import cells_and_targets, pairs_of_crops
from small_mae import crops, make_mae
from torch.utils._python_dispatch import TorchDispatchMode

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.models_genesis import ModelsGenesis
from medssl.methods.simclr import SimCLR
from medssl.methods.voco import VoCo
from medssl.models.pooled import PooledProjector
from medssl.models.reconstructor import Reconstructor
from medssl.models.resenc import ResidualEncoder


class Counted(TorchDispatchMode):
    """Counts the operations that run inside."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.number += 1
        return function(*arguments, **(keywords or {}))


def encoder():
    return ResidualEncoder(widths=(4, 8), blocks=(1, 1))


def projector():
    return PooledProjector((4, 8), (1, 2), hidden_dim=8, out_dim=8)


def genesis():
    return ModelsGenesis(network=Reconstructor(encoder(), None, output="sigmoid"), num_windows=200)


def grey(*, b):
    return {"crop": View.of(crops(b=b)["crop"].image.sigmoid())}


CASES = {
    "mae": (make_mae, crops),
    "mae_vit": (lambda: make_mae("vit"), crops),
    "simmim": (lambda: make_mae("simmim"), crops),
    "models_genesis": (genesis, grey),
    "simclr": (lambda: SimCLR(encoder=encoder(), projector=projector()), pairs_of_crops),
    "voco": (lambda: VoCo(encoder=encoder(), projector=projector()), cells_and_targets),
    "voco, teacher": (lambda: VoCo(encoder=encoder(), projector=projector(), teacher="ema"), cells_and_targets),
    "voco, nnssl": (lambda: VoCo(encoder=encoder(), projector=projector(), form="nnssl"), cells_and_targets),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_more_samples_has_as_many_operations(name):
    make, batch_of = CASES[name]
    numbers = []
    for b in (2, 5):
        method, batch = make(), batch_of(b=b)
        with Counted() as counted:
            method(batch, Progress()).loss.backward()
        numbers.append(counted.number)
    assert numbers[0] == numbers[1] > 0
