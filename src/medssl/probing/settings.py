"""The settings of the command `probe`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from medssl import checks
from medssl.evaluation.statistics import Resampling
from medssl.extraction.feature_file import FILE
from medssl.probing.cross_validation import CrossValidation
from medssl.probing.targets import TASKS, Columns

OUTPUTS = ("probe.json", "predictions.csv", "probe.png")


@dataclass(frozen=True)
class ProbeSettings:
    """The checked settings of a probe: which features, which target, and how they are probed.

    Args:
        features: File or folder of the features, and of those to compare with under the name `reference`.
        location: Number of the location that features are taken from; None for the pooled ones.
        targets: CSV file with a row per case.
        columns: The columns of that file and their meaning.
        task: `regression`, `classification` or `survival`.
        validation: Folds and repeats.
        resampling: The bootstrap behind intervals.
        max_components: Number of principal components that survival is predicted from.
        folder: Folder of the results.
        values: All settings as plain values, for the results.
    """

    features: dict[str, Path]
    location: int | None
    targets: Path
    columns: Columns
    task: str
    validation: CrossValidation
    resampling: Resampling
    max_components: int
    folder: Path
    values: dict[str, Any]

    @classmethod
    def of(cls, config: DictConfig) -> "ProbeSettings":
        """Return the settings of a configuration, checked.

        Raises:
            ValueError: A setting is wrong, a file is not there, or results would be replaced.
        """
        overwrite = checks.switch("overwrite", config.overwrite)
        folder = checks.result_folder(config.output_dir, outputs=OUTPUTS, overwrite=overwrite)
        counts = ("num_folds", "num_repeats", "num_inner_folds", "seed", "num_bootstrap", "max_components")
        for name in counts:
            checks.whole(name, config[name])
        given = {name: config[name] for name in ("features", "reference") if config[name] is not None}
        values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        return cls(
            features={name: _feature_file(name, path) for name, path in given.items()},
            location=checks.whole("location", config.location, or_null="for the pooled features"),
            targets=checks.existing("targets", config.targets, what="table"),
            columns=Columns(str(config.target), config.case, config.event, config.subject),
            task=checks.choice("task", config.task, TASKS),
            validation=CrossValidation(config.num_folds, config.num_repeats, config.num_inner_folds, config.seed),
            resampling=Resampling(config.num_bootstrap, checks.number("confidence", config.confidence), config.seed),
            max_components=config.max_components,
            folder=folder,
            values=values,
        )


def _feature_file(name: str, given: Any) -> Path:
    """Return the path of features, which `load_features` looks into."""
    path = Path(str(given)).expanduser()
    return path if path.is_dir() else checks.existing(name, path, what=f"folder or {FILE}")
