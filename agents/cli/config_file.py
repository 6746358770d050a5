"""Options from a file: YAML or JSON of your own, or what a run folder keeps of its run."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tyro
import yaml

from agents.runs.setup import PLACES, apart, flat, listed
from rlhf_gym.errors import InputError
from rlhf_gym.utils.nearest import did_you_mean
from rlhf_gym.utils.type_hints import as_hinted


class _Loader(yaml.SafeLoader):
    """PyYAML reads `1e-4` as text, since YAML 1.1 wants a dot in it; in YAML 1.2 it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass(frozen=True)
class OptionsFile:
    """A file of options.

    Attributes:
        path: The file.
        values: Its options by name, as the file has them.
        run_dir: The run folder whose own record the file is; None for any other file.
    """

    path: Path
    values: dict[str, Any]
    run_dir: Path | None

    def check_same(self, config: Any) -> None:
        """Refuse to go on with the run that the file is of under other options than it had.

        Raises:
            InputError: An option that matters to a result differs.
        """
        if self.run_dir is None or config.run_dir != self.run_dir:
            return
        now = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        before = flat({k: v for k, v in self.values.items() if k not in PLACES})
        now = {name: value for name, value in flat(now).items() if name in before}
        if other := apart(before, now):
            raise InputError(
                f"{self.path} is of a run with {listed(other)}; give --run-dir for a new run, or "
                "the same options to go on"
            )


def read_options(path: Path, kept_as: str) -> OptionsFile:
    """Read a file of options.

    Args:
        path: The file, or a run folder.
        kept_as: Name of the file in which a run folder keeps the options of the run.

    Raises:
        InputError: It cannot be read, or does not map names to values.
    """
    is_folder = path.is_dir()
    file = path / kept_as if is_folder else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        what = f"the folder {path} has no {kept_as}" if is_folder else f"there is no file {path}"
        raise InputError(f"--config: {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config: cannot read {file}: {error}") from error
    values = _parse(file, text)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{file} must map names of options to values")
    values = {name.replace("-", "_"): value for name, value in values.items()}
    recorded = values.get("run_dir")
    # A folder may have been moved, so its name is enough.
    is_record = is_folder or (
        file.name == kept_as
        and isinstance(recorded, str)
        and Path(recorded).name == file.resolve().parent.name
    )
    return OptionsFile(file, values, file.parent if is_record else None)


def _parse(file: Path, text: str) -> Any:
    """What a text of YAML or JSON says; errors name the line."""
    try:
        if file.suffix == ".json":
            return json.loads(text)
        return yaml.load(text, _Loader)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise InputError(f"{file}{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no YAML: {error}") from error


def default_instance(kind: type[Any], file: OptionsFile | None) -> Any:
    """The options as they are before the command line is read.

    Args:
        kind: The dataclass of the options. The file may have those of a nested one,
            `algorithm_options`, under that name or next to the others.
        file: Where the options come from; None for the defaults of `kind`.

    Returns:
        An instance of `kind`; what is required, and not in the file, is `tyro.MISSING`.

    Raises:
        InputError: The file has an unknown option, or one of the wrong type.
    """
    if file is None:
        return _instance(kind, {})
    values = dict(file.values)
    if file.run_dir is not None:
        values["run_dir"] = str(file.run_dir)
        # Whether to go on is asked each time.
        values.pop("resume", None)
    return _instance(kind, _fitted(kind, values, file.path))


def _fitted(kind: type[Any], values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The values of a file as the fields of a dataclass have them, checked."""
    hints = get_type_hints(kind)
    groups: dict[str, Any] = {
        n: hint for n, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    group_of = {f.name: group for group, hint in groups.items() for f in dataclasses.fields(hint)}
    grouped: dict[str, dict[str, Any]] = {group: {} for group in groups}
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name in groups:
            if not isinstance(value, dict):
                raise InputError(f"{file}: {name}: {value!r} is not a mapping of names to values")
            grouped[name] |= {str(key).replace("-", "_"): inner for key, inner in value.items()}
        elif name in hints:
            out[name] = _value(name, value, hints[name], file)
        elif name in group_of:
            grouped[group_of[name]].setdefault(name, value)
        else:
            raise InputError(
                f"{file}: no option {name!r}{did_you_mean(name, {**hints, **group_of})}"
            )
    for group, inner in grouped.items():
        out[group] = _instance(groups[group], _fitted(groups[group], inner, file))
    return out


def _value(name: str, value: Any, hint: Any, file: Path) -> Any:
    if hint == dict[str, str] and isinstance(value, dict):
        # As on the command line, where values are JSON or else text.
        return {
            str(key): inner if isinstance(inner, str) else json.dumps(inner, default=str)
            for key, inner in value.items()
        }
    try:
        return as_hinted(value, hint)
    except InputError as error:
        raise InputError(f"{file}: {name}: {error}") from error


def _instance(kind: type[Any], values: dict[str, Any]) -> Any:
    """An instance with these values, defaults, and `tyro.MISSING` where there is neither."""
    missing = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return kind(**{**missing, **values})
