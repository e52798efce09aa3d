"""From a command line to a composed configuration, and from a user's mistake to one readable line.

`config_dir` is the only code that knows where the YAML lives; `main` is the frame of every `python -m medssl.NAME`.
"""

from __future__ import annotations

import collections.abc
import difflib
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.launcher import process_rank
from medssl.moved import refuse_moved
from medssl.paths import with_paths
from medssl.threads import wait_asleep

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PACKAGE = Path(__file__).parent


def config_dir() -> Path:
    """Return the folder of the YAML files: inside an installed package, else beside `src` in a checkout."""
    for folder in (_PACKAGE / "configs", _PACKAGE.parent.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise ValueError(f"no configs beside {_PACKAGE}; install medssl from its wheel or with pip install -e")


def compose(name: str, overrides: Sequence[str] = (), *, extra_dir: Path | None = None) -> DictConfig:
    """Return the configuration `name` with `overrides`; groups are looked up in our configs, then in `extra_dir`.

    Interpolations stay unresolved: `facts` are filled in before a method is built.

    Raises:
        ValueError: A `_target_` names a place that medssl has left, a setting that is a path is none, or a group is
            null or a number.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    _register_resolvers()
    overrides = [re.sub(r"^weights=", "weights.path=", override) for override in overrides]  # a file, with options
    if extra_dir is not None:
        overrides.append(f"hydra.searchpath=['file://{Path(extra_dir).resolve()}']")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            config = hydra_compose(name, overrides)
        except ValueError as error:
            if not str(error).startswith("Config group override"):
                raise
            raise ValueError(
                f"a group takes the name of a choice, as --help lists them, or is left out: {error}"
            ) from None
    refuse_moved(OmegaConf.to_container(config, resolve=False), source="the configuration")
    return with_paths(config, name)


def _register_resolvers() -> None:
    from omegaconf import OmegaConf

    def epochs(number: float, *, _root_: DictConfig) -> int:
        per_epoch = _root_.facts.steps_per_epoch
        if per_epoch is None:
            raise ValueError("an epoch has no length before the data are known: facts.steps_per_epoch is null")
        return round(number * per_epoch)

    OmegaConf.register_new_resolver("epochs", epochs, replace=True)
    OmegaConf.register_new_resolver("add", lambda *terms: sum(terms), replace=True)
    OmegaConf.register_new_resolver("mul", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("div", lambda dividend, divisor: dividend / divisor, replace=True)
    OmegaConf.register_new_resolver("floordiv", lambda dividend, divisor: dividend // divisor, replace=True)
    OmegaConf.register_new_resolver(
        "precision", lambda kind: "32-true" if kind == "cpu" else "bf16-mixed", replace=True
    )


def with_values(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """Return a copy of a configuration that has other values at dotted names; the configuration stays as it is."""
    from omegaconf import OmegaConf

    copy: DictConfig = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # type: ignore[assignment]
    for name, value in values.items():
        OmegaConf.update(copy, name, value, merge=False, force_add=True)
    return copy


def to_yaml(config: DictConfig) -> str:
    """Return the configuration as YAML, resolved as far as its values are known."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def known(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            return {key: known(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
        if isinstance(node, list):
            return [known(value, f"{path}[{index}]") for index, value in enumerate(node)]
        if isinstance(node, str) and "${" in node:
            try:
                node = OmegaConf.select(config, path)
            except OmegaConfBaseException:  # needs facts that only the data have
                return node
            return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        return node

    return OmegaConf.to_yaml(OmegaConf.create(known(OmegaConf.to_container(config, resolve=False), "")))


@dataclass(frozen=True)
class CommandLine:
    """The words after `python -m medssl.NAME`, sorted by their kind."""

    overrides: list[str] = field(default_factory=list)
    extra_dir: Path | None = None
    help: bool = False
    cfg: bool = False
    words: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, arguments: Sequence[str], *, positional: bool = False) -> CommandLine:
        """Split `arguments` into options, overrides and (where `positional`) words without an equals sign.

        Raises:
            ValueError: An argument is none of these.
        """
        overrides, words, extra_dir, asked = [], [], None, {"help": False, "cfg": False}
        rest = iter(arguments)
        for argument in rest:
            if argument in ("-h", "--help", "--cfg"):
                asked["cfg" if argument == "--cfg" else "help"] = True
            elif argument.split("=", 1)[0] == "--config-dir":
                value = argument.split("=", 1)[1] if "=" in argument else next(rest, "")
                extra_dir = Path(value).expanduser()
                if not value or not extra_dir.is_dir():
                    raise ValueError(
                        f"--config-dir {value!r} is no folder; it names the folder that holds method/*.yaml"
                    )
            elif positional and "=" not in argument and not argument.startswith(("-", "~")):
                words.append(argument)
            elif argument.startswith("-") or ("=" not in argument and not argument.startswith("~")):
                raise ValueError(f"{argument!r} is not understood; give KEY=VALUE, or --help for the list")
            else:
                overrides.append(argument)
        return cls(overrides, extra_dir, **asked, words=words)


def freeze(config: DictConfig) -> DictConfig:
    """Make a configuration read-only, and return it: writing to it raises afterwards."""
    from omegaconf import OmegaConf

    OmegaConf.set_readonly(config, True)
    return config


def help_text(name: str, description: str, *, extra_dir: Path | None = None, positional: str | None = None) -> str:
    """Return the page that `--help` prints: description, groups with their choices, keys with their comments.

    The comment behind a key in `NAME.yaml` explains it. A line `# group.key: text` explains a key of a group.
    """
    text = (config_dir() / f"{name}.yaml").read_text(encoding="utf-8")
    words = f"{positional.upper()} ... " if positional else ""
    lines = [
        f"usage: python -m medssl.{name} {words}KEY=VALUE ... [--config-dir DIR] [--cfg] [--help]",
        "",
        description.strip(),
    ]
    listed = re.search(r"^defaults:\n((?:  .*\n)+)", text, flags=re.M)
    defaults = re.findall(r"^  - (?:override )?(\w+): *(\S+)", listed[1], flags=re.M) if listed else []
    if defaults:
        lines += ["", "groups (GROUP=CHOICE; * is taken when none is given)"]
    for group, default in defaults:
        folders = [config_dir() / group, *([extra_dir / group] if extra_dir else [])]
        choices = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        lines.append(f"  {group:<22} {', '.join(f'{c}*' if c == default else c for c in choices)}")
    lines += ["", "keys (KEY=VALUE; lists are written [1,2,3])"]
    placed = [(key, "", about) for key, about in re.findall(r"^# (\w+(?:\.\w+)*): (.*)$", text, flags=re.M)]
    for key, value, about in [*placed, *re.findall(r"^([a-z_]+): *([^#\n]*?) *# (.*)$", text, flags=re.M)]:
        lines.append(
            f"  {key:<22} {about}" + (f" [{value}]" if value not in ("", "null", "???") and "$" not in value else "")
        )
    lines += [
        "",
        "options",
        "  --config-dir DIR       look for groups in DIR too, and import the Python files beside them",
        "  --cfg                  print the composed configuration and stop",
        "  MEDSSL_DEBUG=1         show the traceback behind an error message",
    ]
    return "\n".join(lines)


def main(
    name: str,
    run: Callable[[DictConfig], None],
    *,
    arguments: Sequence[str] | None = None,
    positional: str | None = None,
) -> None:
    """Compose the configuration `name` from the command line, and run a command with it.

    Words without an equals sign are added to the list `positional` of the configuration, if that is named.
    The docstring of `run`'s module is the description in `--help`. A mistake of the user becomes one message on stderr
    and exit code 2; a fault of the program keeps its traceback. Ctrl-C exits with code 130.
    """
    config = None
    wait_asleep()
    try:
        line = CommandLine.parse(sys.argv[1:] if arguments is None else arguments, positional=positional is not None)
        if line.extra_dir is not None:
            sys.path.insert(0, str(line.extra_dir.resolve()))
        if line.help:
            description = sys.modules[run.__module__].__doc__ or ""
            print(help_text(name, description, extra_dir=line.extra_dir, positional=positional))
            sys.exit(0)
        config = compose(name, line.overrides, extra_dir=line.extra_dir)
        if positional is not None:
            given = config[positional]
            words = [*([given] if isinstance(given, str) else given or []), *line.words]
            config = with_values(config, {positional: words})
        freeze(config)
        if line.cfg:
            print(to_yaml(config), end="")
        else:
            run(config)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = user_message(error) or mistyped(config)
        if message is None or os.environ.get("MEDSSL_DEBUG", "0") not in ("", "0"):
            raise
        if isinstance(error, OSError) or process_rank() == 0:  # settings are wrong on all ranks, a file may be on one
            print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def user_message(error: BaseException) -> str | None:
    """Return the message that a user gets for `error`; None where it is a fault of the program.

    Mistakes of the user are a configuration that cannot be composed or instantiated, a file system that refuses, and
    every ValueError that our own code (or a method from `--config-dir`) raised. A ValueError from another library is a
    fault of the program.
    """
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = error.__cause__
        wrong_call = isinstance(cause, TypeError) and re.search(r"unexpected keyword|required .*argument", str(cause))
        if wrong_call or _raised_in(cause).startswith(("hydra.", "importlib.")):  # unknown argument, unknown class
            return _one_line(str(error) if wrong_call else f"{error}\n{cause}")
        return user_message(cause)
    if isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error, OmegaConfBaseException) and isinstance(error.__cause__, ValueError):
            return user_message(error.__cause__) or _one_line(str(error))
        return _composition_message(error)
    if isinstance(error, OSError):
        return _one_line(str(error))
    kind = type(error)
    if kind.__name__ == "MisconfigurationException" or kind.__module__.startswith("wandb.errors"):
        return _one_line(str(error))  # a wrong argument of the trainer; no account, no network
    if isinstance(error, ValueError) and not _is_foreign(error):
        return str(error)
    return None


def mistyped(config: DictConfig | None) -> str | None:
    """Return a message about the first setting that has another type than our class declares; None if there is none.

    This is called after a failure without a message for the user: a text in place of a number can fail anywhere, in a
    comparison or steps later.
    """
    from omegaconf import OmegaConf

    pending: list[tuple[str, Any]] = [] if config is None else [("", OmegaConf.to_container(config, resolve=False))]
    while pending:
        path, node = pending.pop(0)
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        hints = _hints(node.get("_target_")) if isinstance(node, dict) else {}
        for key, value in items:
            name = f"{path}[{key}]" if isinstance(node, list) else f"{path}.{key}".lstrip(".")
            if key in hints and not _fits(value, hints[key]):
                wanted = str(hints[key]) if typing.get_args(hints[key]) else hints[key].__name__
                return f"{name} must be {re.sub(r'[a-z_]+[.]', '', wanted)}, got {value!r}"
            pending.append((name, value))
    return None


def _hints(target: object) -> dict[str, Any]:
    """Return the types of the arguments of a class or function of ours that has been imported."""
    module, _, name = str(target).rpartition(".")
    found: Any = getattr(sys.modules.get(module), name, None) if module.startswith("medssl.") else None
    try:
        return typing.get_type_hints(found.__init__ if isinstance(found, type) else found)  # type: ignore[misc]
    except (NameError, TypeError):  # names that are known to type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value fits a type; types that YAML cannot state and interpolations always fit."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, str) and ("${" in value or value == "???"):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (collections.abc.Sequence, list, tuple) or hint in (list, tuple):
        elements = [one for one in inner if one is not Ellipsis]
        return isinstance(value, list) and (len(elements) != 1 or all(_fits(one, elements[0]) for one in value))
    if origin in (collections.abc.Mapping, dict) or hint in (Mapping, dict):
        return isinstance(value, dict)
    plain: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    plain[type(None)] = (type(None),)
    return isinstance(value, plain[hint]) if hint in plain else True


def _raised_in(error: BaseException) -> str:
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] if frames else ""


def _is_foreign(error: BaseException) -> bool:
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not files or _PACKAGE in files[-1].parents:
        return False
    return "site-packages" in files[-1].parts or str(Path(os.__file__).parent) in map(str, files[-1].parents)


def _composition_message(error: Exception) -> str:
    text = str(error)
    if missing := re.search(r"Missing mandatory value: ([\w.\[\]]+)", text):
        return f"{missing[1]} is missing; give it as {missing[1]}=VALUE"
    if unknown := re.search(r"Could not override '([\w./@]+)'\.\s+To append", text):
        suggestion = _suggestion(unknown[1])
        return f"there is no key {unknown[1]!r}{suggestion}; --cfg shows all keys, +{unknown[1]}=VALUE adds one"
    if sweep := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key = sweep[1].partition("=")[0]
        return f"{sweep[1]!r} holds a comma; a list is written {key}=[1,2,3], a text with commas {key}='\"a,b\"'"
    available = r"Could not find '([^'/]+)/([^']+)'\s+Available options in '[^']+':\n((?:\t\S+\n)+)"
    if choice := re.search(available, text):
        return f"{choice[1]}={choice[2]} does not exist; {choice[1]} is one of {', '.join(choice[3].split())}"
    if hidden := re.search(r"Could not override '([\w/@]+)'\. No match in the defaults list", text):
        return f"{hidden[1]!r} is a folder of the configuration, not a key or group of this command; see --help"
    if (override := getattr(error, "override", None)) is not None:
        return f"{override!r} cannot be read ({_one_line(text)}); quote a text with special characters: KEY='\"text\"'"
    return _one_line(text)


def _suggestion(key: str) -> str:
    pattern = re.compile(r"^(?:# |  - )?([\w.]+):", re.M)
    known = {
        match for file in config_dir().glob("*.yaml") for match in pattern.findall(file.read_text(encoding="utf-8"))
    }
    close = difflib.get_close_matches(key, sorted(known - {key}), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_line(text: str) -> str:
    text = text.replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", "")
    noise = ("full_key:", "object_type=", "See https://hydra.cc", "set the environment variable HYDRA_FULL_ERROR")
    return "; ".join(line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(noise))
