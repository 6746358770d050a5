"""Options from a file: your own YAML or JSON, or the record that a run folder keeps of its run."""

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
    """A YAML loader that reads `1e-4` as a number, as YAML 1.2 does.

    PyYAML follows YAML 1.1, where a float needs a dot, so it would read a learning rate as text.
    """


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
        values: The options by name, as written in the file.
        run_dir: The run folder, if the file is that folder's own record; else None.
    """

    path: Path
    values: dict[str, Any]
    run_dir: Path | None

    def check_same(self, config: Any) -> None:
        """Check that a run is continued with the options it was started with.

        Raises:
            InputError: The file is the record of the run in ``config.run_dir``, and an option that
                affects the result differs from it.
        """
        if self.run_dir is None or config.run_dir != self.run_dir:
            return
        now = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        before = flat({k: v for k, v in self.values.items() if k not in PLACES})
        now = {name: value for name, value in flat(now).items() if name in before}
        if other := apart(before, now):
            raise InputError(
                f"{self.path} is the record of a run with {listed(other)}; give the same options "
                "to continue that run, or --run-dir to start a new one"
            )


def read_options(path: Path, kept_as: str) -> OptionsFile:
    """Read a file of options.

    Args:
        path: The file, or a run folder.
        kept_as: Name of the file in a run folder that records the run's options.

    Raises:
        InputError: The file cannot be read, or it does not map names to values.
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
    # Compare names, not paths: the run folder may have been moved since.
    is_record = is_folder or (
        file.name == kept_as
        and isinstance(recorded, str)
        and Path(recorded).name == file.resolve().parent.name
    )
    return OptionsFile(file, values, file.parent if is_record else None)


def _parse(file: Path, text: str) -> Any:
    """Parse YAML or JSON text. Errors name the line."""
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
        raise InputError(f"{file} is not valid YAML: {error}") from error


def default_instance(kind: type[Any], file: OptionsFile | None) -> Any:
    """Return the options as they are before the command line is applied.

    Args:
        kind: The dataclass of the options. The file may put the options of its nested dataclass
            `algorithm_options` under that name or at the top level.
        file: The file of options; None gives the defaults of `kind`.

    Returns:
        An instance of `kind`. A required option that the file does not have is `tyro.MISSING`.

    Raises:
        InputError: The file has an unknown option, or a value of the wrong type.
    """
    if file is None:
        return _instance(kind, {})
    values = dict(file.values)
    if file.run_dir is not None:
        if "run_dir" in get_type_hints(kind):
            values["run_dir"] = str(file.run_dir)
        # --resume is a decision for each call, not a property of the run.
        values.pop("resume", None)
    return _instance(kind, _fitted(kind, values, file.path))


def _fitted(kind: type[Any], values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Check the values of a file and convert them to the types of the dataclass's fields."""
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
        # Like on the command line, where each value is text that `parse_values` reads as JSON.
        return {
            str(key): inner if isinstance(inner, str) else json.dumps(inner, default=str)
            for key, inner in value.items()
        }
    try:
        return as_hinted(value, hint)
    except InputError as error:
        raise InputError(f"{file}: {name}: {error}") from error


def _instance(kind: type[Any], values: dict[str, Any]) -> Any:
    """Build an instance from values and defaults; `tyro.MISSING` where a field has neither."""
    missing = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return kind(**{**missing, **values})
