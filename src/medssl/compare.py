"""Compare fine-tuned runs, paired by case: is one better, by how much, and how sure is that?

Runs of one setting with different seeds are one group; the first run names the reference.

Examples:
    python -m medssl.compare runs/scratch runs/glmae
    python -m medssl.compare runs/scratch-* runs/glmae-* output_dir=comparison metric=nsd
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(config: DictConfig) -> None:
    """Compare, write both pages, and print the tables."""
    from medssl.data.atomic import write_text
    from medssl.evaluation.comparison import compare_groups
    from medssl.evaluation.groups import read_groups
    from medssl.evaluation.report import to_html, to_markdown, to_terminal
    from medssl.evaluation.statistics import Resampling

    folder = Path(config.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file; name a folder")
    pages = {folder / "comparison.md": to_markdown, folder / "comparison.html": to_html}
    if there := [page for page in pages if page.exists() and not config.overwrite]:
        raise ValueError(f"{there[0]} already exists; replace it by overwrite=true, or give another output_dir")
    for name, kind in {"num_bootstrap": int, "seed": int, "confidence": int | float}.items():
        if not isinstance(config[name], kind):
            raise ValueError(f"{name}={config[name]} must be a {'whole ' * (kind is int)}number")
    resampling = Resampling(config.num_bootstrap, config.confidence, config.seed)
    groups = read_groups([Path(path).expanduser() for path in config.runs])
    comparison = compare_groups(groups, metric=config.metric, resampling=resampling)
    texts = {page: write(comparison) for page, write in pages.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for page, text in texts.items():
        write_text(page, text)
    print(to_terminal(comparison))
    print("\n".join(f"wrote {page}" for page in pages))


if __name__ == "__main__":
    main("compare", run, positional="runs")
