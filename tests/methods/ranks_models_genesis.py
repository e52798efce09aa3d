"""One of one or two processes that take the gradient of Models Genesis. Run by test_models_genesis_ddp.py."""

import torch
from ranks import as_rank
from torch import nn

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.models_genesis import ModelsGenesis
from medssl.models.reconstructor import Reconstructor
from medssl.models.resenc import ResidualEncoder
from medssl.ops.deformations import Windows


class OwnShare(ModelsGenesis):
    """Models Genesis whose processes take their share of one draw for all crops."""

    def draw(self, image, progress):
        whole = super().draw(self.everything, Progress(progress.step))
        first = len(image) * progress.rank
        own, voxels = slice(first, first + len(image)), whole.shuffled.volume().sum(1)
        keys = whole.keys.split(voxels.tolist())[own]

        def part(drawn):
            return Windows(*(part[own] for part in drawn)) if isinstance(drawn, Windows) else drawn[own]

        shares = {name: part(drawn) for name, drawn in whole._asdict().items() if name != "keys"}
        return type(whole)(keys=torch.cat(keys), **shares)


def work(rank, world):
    """Loss and averaged gradients with given draws, and the images that the process's own draws give."""
    torch.manual_seed(0)
    encoder = ResidualEncoder(widths=(2, 4), blocks=(1, 1))
    network = Reconstructor(encoder, None, output="sigmoid")
    method = OwnShare(network=network, num_windows=100).double()
    image = torch.rand(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method.everything = image
    own = image[4 // world * rank : 4 // world * (rank + 1)]
    parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=False, broadcast_buffers=False)
    progress = Progress(3, 10, 0.0, 1.0, 0, rank)
    output = parallel({"crop": View.of(own)}, progress)
    output.loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters()}
    drawn = ModelsGenesis.draw(method, own, progress).noise
    return {"loss": output.loss.detach(), "logs": output.logs, "gradients": gradients, "drawn": drawn}


if __name__ == "__main__":
    as_rank(work)
