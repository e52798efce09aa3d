"""The loops of docs/your-own-loop.md, run as they are printed and held against the trainer."""

import copy
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import pytest
import torch

from medssl.config import compose
from medssl.data.module import Batch
from medssl.methods.base import Method
from medssl.training.fit import quiet
from medssl.training.method_module import MethodModule

PAGE = (Path(__file__).parent.parent / "docs" / "your-own-loop.md").read_text()
TENSORS, *LOOPS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.S | re.M)
METHODS = [
    "glmae_tiny",
    "mae_tiny",
    "alice_tiny",
    "drasclr_tiny",
    "kaf_tiny",
    "macl_tiny",
    "sam_embed_tiny",
    "models_genesis_tiny",
    "simclr_tiny",
    "voco_tiny",
]
MOST_LINES = 20


@dataclass
class Ran:
    """What a loop of the page did, step by step."""

    name: str
    first_weights: dict
    optimizer: torch.optim.Optimizer
    method: Method
    batches: list
    progress: list
    losses: list


@pytest.fixture(scope="module", params=LOOPS, ids=METHODS)
def ran(request):
    """A loop of the page, run with whatever it gives its method written down."""
    torch.manual_seed(0)
    names, seen = {}, {"batches": [], "progress": [], "losses": [], "first_weights": {}}

    def before(module, inputs):
        if isinstance(module, Method):
            seen["first_weights"] = seen["first_weights"] or copy.deepcopy(module.state_dict())
            seen["batches"].append(copy.deepcopy(inputs[0]))
            seen["progress"].append(inputs[1])

    def after(module, inputs, output):
        if isinstance(module, Method):
            seen["losses"].append(output.loss.item())

    hooks = torch.nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after)]
    try:
        exec(compile(TENSORS + request.param, "your-own-loop.md", "exec"), names)
    finally:
        for handle in handles:
            handle.remove()
    name = re.search(r'build_method\("(\w+)"', request.param)[1]
    return Ran(name, optimizer=names["optimizer"], method=names["method"], **seen)


def test_the_page_has_a_loop_of_at_most_20_lines_for_every_method():
    assert [re.match(r'method = medssl.build_method\("(\w+)"', loop)[1] for loop in LOOPS] == METHODS
    assert max(len(loop.splitlines()) for loop in LOOPS) <= MOST_LINES
    assert "build_method" not in TENSORS


def test_the_command_at_the_top_of_the_page_works(tmp_path):
    (command,) = re.search(r"^```bash\n(.*?)^```$", PAGE, flags=re.S | re.M)[1].splitlines()
    python, *words = shlex.split(command)
    assert python == "python"
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("MACL("), done.stderr


def test_a_loop_gives_the_losses_of_the_trainer(ran):
    config = compose("pretrain", [f"method={ran.name}"])
    last = ran.progress[-1]
    kind, defaults = type(ran.optimizer), ran.optimizer.defaults
    settings = {key: value for key, value in defaults.items() if key in inspect.signature(kind).parameters}
    module = MethodModule(
        trained(ran),
        optimizer={"_target_": f"torch.optim.{kind.__name__}", **settings, "warmup_steps": 0, "final_fraction": 1.0},
        total_steps=last.total_steps,
        steps_per_epoch=last.total_steps / last.total_epochs,
        seed=last.seed,
    )
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module.progress(batch) == ran.progress[batch_idx]
            losses.append(outputs["loss"].item())

    quiet()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=last.total_steps,
        gradient_clip_val=config.optimizer.clip_norm,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [Batch(views, [], step, 0) for step, views in enumerate(ran.batches)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert len(losses) == len(ran.losses) == last.total_steps > 2
    assert losses == pytest.approx(ran.losses, rel=1e-6)
    assert losses[0] != losses[-1]


def test_pictures_show_what_forward_leaves_where_it_is_asked(ran):
    method, batch, progress = trained(ran).train(), ran.batches[0], ran.progress[0]
    progress.seed_torch()
    plain = method(batch, progress)
    progress.seed_torch()
    told = method(batch, replace(progress, with_extras=True))
    assert plain.extras == {}
    assert told.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert not any(extra.requires_grad for extra in told.extras.values())
    assert bool(told.extras) == (ran.name != "drasclr_tiny"), "its pictures show nothing but the views"

    method = trained(ran)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    modes = [module.training for module in method.modules()]
    extras = method.extras(batch, progress)
    assert extras.keys() == told.extras.keys()
    assert method.figures(batch, extras, progress)
    assert [module.training for module in method.modules()] == modes
    assert all(value.equal(before[name]) or value.isnan().any() for name, value in method.state_dict().items())


def trained(ran):
    """The method as it was before the first step."""
    method = copy.deepcopy(ran.method)
    method.load_state_dict(ran.first_weights)
    return method


def test_the_readme_leads_to_the_page():
    assert "docs/your-own-loop.md" in (Path(__file__).parent.parent / "README.md").read_text()
