"""How several processes end when one of them fails."""

import os
import re
import sys
import traceback

import lightning as L
import torch

from medssl.config import user_message
from medssl.training.stopping import Stopped


class EndTogether(L.Callback):
    """Where several processes train, the one that fails says why and is gone at once.

    The others notice by a collective that fails and end without tracebacks of their own. Left alive, a failed process
    would keep them waiting in theirs.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say what happened and exit with code 2."""
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt | Stopped):
            return
        if lost_others(exception):
            if trainer.is_global_zero:
                print(f"stopped: another process is gone ({str(exception).splitlines()[0]})", file=sys.stderr)
        elif not isinstance(exception, SystemExit):
            message = user_message(exception) if isinstance(exception, Exception) else None
            if not trainer.is_global_zero:
                print(file=sys.stderr)  # the progress bar of rank 0 may stand on the line
            print(f"error: {message}" if message else "".join(traceback.format_exception(exception)), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def lost_others(error: BaseException) -> bool:
    """Whether `error` is a collective that failed, which it does where another process ended."""
    text = r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket"
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and re.search(text, str(error), flags=re.IGNORECASE) is not None
    )
