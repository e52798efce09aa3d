"""The store of a run: where it lies, whether it is finished, and how it is brought up to date."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from medssl.data.prepare import PrepareError, prepare_store
from medssl.data.recipes import locate_store, preparation
from medssl.data.sources import SourceMissingError
from medssl.data.store import VolumeStore
from medssl.run.ranks import rank_zero_first
from medssl.run.signals import Stopped


def open_store(config: DictConfig, *, is_resumed: bool = False) -> VolumeStore:
    """Return the store of the run, up to date with its source; rank 0 updates it, the other ranks wait.

    A finished store is used as it is when its source is not available, and when a run is resumed.
    """
    root = Path(locate_store(config.data, config.store))
    if config.data.get("source") is not None:
        with rank_zero_first(Path(config.output_dir).expanduser(), root) as is_first:
            if is_first and not (is_resumed and is_prepared(config)):
                update_store(config, root)
    return VolumeStore(root)


def check_source(config: DictConfig) -> None:
    """Check that the images exist, or else the finished store that was made of them.

    Raises:
        ValueError: Neither the images nor a finished store exist.
    """
    root, images = Path(locate_store(config.data, config.store)), config.data.get("root")
    if config.data.get("source") is None:
        VolumeStore(root)
    elif images is not None and not Path(str(images)).expanduser().exists() and not is_prepared(config):
        raise SourceMissingError(f"data.root={images} does not exist")


def is_prepared(config: DictConfig) -> bool:
    """Return whether the store of the run was finished once."""
    return (Path(locate_store(config.data, config.store)) / "index.jsonl").is_file()


def update_store(config: DictConfig, root: Path) -> None:
    """Prepare the store, or the new cases of its source, and print in a line what has changed."""
    is_finished = (root / "index.jsonl").is_file()
    if not is_finished:
        print(f"preparing {config.data.name} -> {root}", flush=True)
    try:
        summary = prepare_store(
            instantiate(config.data.source, _convert_="all"),
            root,
            **preparation(config.data),
            max_rejected_fraction=config.max_rejected_fraction,
            prune=False,  # another run may be reading
        )
    except Stopped as stop:
        raise Stopped(f"{stop} while preparing; finished cases are kept in {root}") from None
    except (SourceMissingError, PrepareError, OSError) as error:
        if not is_finished:
            raise
        print(f"{str(error).splitlines()[0]}; the store {root} is used as it is", flush=True)
    else:
        if is_finished and summary.has_changed:
            print(f"the source has changed: {summary}", flush=True)
