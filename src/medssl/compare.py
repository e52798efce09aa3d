"""Compare fine-tuned runs, paired by case: is one better, by how much, and how sure is that?

Runs of one setting with different seeds are one group; the first run names the reference.

Examples:
    python -m medssl.compare runs/scratch runs/glmae
    python -m medssl.compare runs/scratch-* runs/glmae-* output_dir=comparison metric=nsd
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medssl import checks
from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig

PAGES = ("comparison.md", "comparison.html")


@dataclass(frozen=True)
class CompareSettings:
    """The checked settings of a comparison: which runs, by which metric, with which intervals.

    Args:
        runs: Folders of finished runs; the first names the reference.
        folder: Folder of the pages.
        metric: `dice`, `nsd` or `hd95_mm`.
        num_bootstrap: Draws behind an interval.
        confidence: Confidence level of the intervals.
        seed: Seed of the draws.
    """

    runs: tuple[Path, ...]
    folder: Path
    metric: str
    num_bootstrap: int
    confidence: float
    seed: int

    @classmethod
    def of(cls, config: DictConfig) -> CompareSettings:
        """Return the settings of a configuration, checked.

        Raises:
            ValueError: A setting is wrong, a run is not there, or pages would be replaced.
        """
        from medssl.evaluation.scores import METRICS

        overwrite = checks.switch("overwrite", config.overwrite)
        return cls(
            runs=tuple(checks.existing("runs", run, what="folder of a run", folder=True) for run in config.runs),
            folder=checks.result_folder(config.output_dir, outputs=PAGES, overwrite=overwrite),
            metric=checks.choice("metric", config.metric, METRICS),
            num_bootstrap=checks.whole("num_bootstrap", config.num_bootstrap),
            confidence=checks.number("confidence", config.confidence),
            seed=checks.whole("seed", config.seed),
        )


def run(config: DictConfig) -> None:
    """Compare, write both pages, and print the tables."""
    from medssl.data.atomic import write_text
    from medssl.evaluation.comparison import compare_groups
    from medssl.evaluation.groups import read_groups
    from medssl.evaluation.report import to_html, to_markdown, to_terminal
    from medssl.evaluation.statistics import Resampling

    settings = CompareSettings.of(config)
    resampling = Resampling(settings.num_bootstrap, settings.confidence, settings.seed)
    comparison = compare_groups(read_groups(list(settings.runs)), metric=settings.metric, resampling=resampling)
    texts = {page: write(comparison) for page, write in zip(PAGES, (to_markdown, to_html), strict=True)}
    settings.folder.mkdir(parents=True, exist_ok=True)
    for page, text in texts.items():
        write_text(settings.folder / page, text)
    print(to_terminal(comparison))
    print("\n".join(f"wrote {settings.folder / page}" for page in PAGES))


if __name__ == "__main__":
    main("compare", run, positional="runs")
