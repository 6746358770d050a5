"""Functions that a user names: "package.module:function" or "file.py:function"."""

import functools
import importlib
import importlib.util
import itertools
import re
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.utils.nearest import did_you_mean

MOVED_MODULES = {
    "rlhf_gym.human": "rlhf_gym.rewards.human",
    "rlhf_gym.shaping": "rlhf_gym.rewards.shaping",
}
"""Former names of modules whose functions a user names, so `config.json` of a run may have them.

Environments store `reward_model`, `gold`, `cuts`, `shaping` and `token_rewards` as
"module:function", and `rlhf.py` stores `human`. No other module with such functions has moved.
"""


class FileFunction:
    """A function of a file. Another process that gets a pickle of it loads the file again.

    Args:
        name: "file.py:function"; other attributes than a function's (its name, its docstring, its
            signature) are the function's own.
    """

    def __init__(self, name: str) -> None:
        absolute = absolute_name(name)
        path, _, attribute = absolute.rpartition(":")
        function = _attribute(_file_module(Path(path)), attribute, name)
        functools.update_wrapper(self, function)
        # After it: a callable object's own attributes, copied here, may have these names.
        self.name = absolute
        self.function = function

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the function."""
        return self.function(*arguments, **keywords)

    def __reduce__(self) -> tuple[type["FileFunction"], tuple[str]]:
        """Pickle the name alone."""
        return FileFunction, (self.name,)


def load_callable(name: str) -> Callable[..., object]:
    """Resolve "package.module:function" or "file.py:function".

    The modules in `MOVED_MODULES` may be named as they were.

    Raises:
        InputError: There is no such module, file or function, or it cannot be imported.
    """
    if file_of(name) is not None:
        return FileFunction(name)
    module, _, attribute = current_name(name).partition(":")
    if not (module and attribute):
        raise InputError(
            f"a callable is named 'package.module:function', not {name!r}{_with_colon(name)}"
        )
    return _attribute(_import(module, name), attribute, name)


def is_callable_name(name: str) -> bool:
    """Whether a reward is named as a function ("module:function") rather than as a model."""
    return ":" in name and not Path(name).exists()


def check_model_name(name: str) -> None:
    """Refuse the name of a function or of its file where a model is looked for.

    Raises:
        InputError: It is "module.function" (the hub has no such names), "module" of a file in the
            current folder, or "file.py".
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        raise InputError(f"{name!r} is a file of Python: name the function in it, {name}:FUNCTION")
    if path.exists():
        return
    if name.isidentifier() and path.with_suffix(".py").is_file():
        raise InputError(f"{name!r} is a module: name the function in it, {name}:FUNCTION")
    # The hub's names are OWNER/NAME; the few old ones without an owner have no dots.
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name):
        raise InputError(f"{name!r} is the name of no model{_with_colon(name)}")


def _with_colon(name: str) -> str:
    module, dot, attribute = name.rpartition(".")
    if not dot or not attribute.isidentifier():
        return ""
    return f"; did you mean the function {module}:{attribute}?"


def current_name(name: str) -> str:
    """The present name of a function that `MOVED_MODULES` has moved; other texts unchanged."""
    module, colon, attribute = name.partition(":")
    return f"{MOVED_MODULES.get(module, module)}:{attribute}" if colon else name


def file_of(name: str) -> Path | None:
    """The file of "file.py:function"; None for other names."""
    file, _, attribute = name.rpartition(":")
    return Path(file).expanduser() if file.endswith(".py") and attribute else None


def absolute_name(name: str) -> str:
    """A name that means the same in every folder: "file.py:function" with the file's whole path."""
    file = file_of(name)
    return name if file is None else f"{file.absolute()}:{name.rpartition(':')[2]}"


def absolute_names(value: Any) -> Any:
    """A value of JSON with each name in it made absolute (see `absolute_name`)."""
    if isinstance(value, str):
        return absolute_name(value)
    if isinstance(value, list):
        return [absolute_names(part) for part in value]
    if isinstance(value, dict):
        return {key: absolute_names(part) for key, part in value.items()}
    return value


def _attribute(module: ModuleType, attribute: str, name: str) -> Callable[..., object]:
    if not hasattr(module, attribute):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise InputError(
            f"cannot import {name!r}: {module.__file__ or module.__name__} has no "
            f"{attribute!r}{did_you_mean(attribute, functions)}"
        )
    found = getattr(module, attribute)
    if not callable(found):
        raise InputError(f"{name!r} is not callable")
    return found  # type: ignore[no-any-return]


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            # The module is there, but one that it needs is not.
            raise _broken(name, error) from error
        raise InputError(
            f"cannot import {name!r}: {error}; if it is your own file, name it with its path "
            "(FOLDER/FILE.py:FUNCTION), or run the command in its folder, or put that folder on "
            "the path: PYTHONPATH=. python …"
        ) from error
    except Exception as error:
        raise _broken(name, error) from error


def _file_module(path: Path) -> ModuleType:
    """The module of a file, under its own name where no other module has it."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; a function in it is named FILE.py:function")
    # Last, so that no file there can hide a module of an installed package.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
        importlib.invalidate_caches()
    stem, name = path.stem, f"{path}:"
    try:
        spec = importlib.util.find_spec(stem) if stem.isidentifier() else None
    except ValueError:  # a module that was not imported from a file, such as __main__
        spec = None
    if spec is not None and spec.origin and Path(spec.origin).absolute() == path:
        return _import(stem, name)
    # Another module has this name, so the file's module gets one that no other file has.
    stem = re.sub(r"\W", "_", stem) + f"_{zlib.crc32(str(path).encode()):08x}"
    if stem in sys.modules:
        return sys.modules[stem]
    spec = importlib.util.spec_from_file_location(stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[stem]
        raise _broken(name, error) from error
    return module


def _broken(name: str, error: Exception) -> InputError:
    """The error for a module that raises while it is imported."""
    return InputError(f"cannot import {name!r}: {last_lines(error)}")


def last_lines(error: Exception, *callers: str) -> str:
    """An exception, and the lines of a user's code that led to it.

    Args:
        error: The exception.
        *callers: Files of the code that called the user's; their frames come first and are left
            out.
    """
    ours = {__file__, importlib.__file__, *callers}
    frames = itertools.dropwhile(
        lambda frame: frame.filename in ours or frame.filename.startswith("<frozen"),
        traceback.extract_tb(error.__traceback__),
    )
    said = "".join(traceback.format_exception_only(error)).strip()
    return f"{said}\n{''.join(traceback.format_list(list(frames)[-3:]))}".rstrip()
