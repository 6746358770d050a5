"""Algorithms by name: any module with a dataclass `Config` and `make(config, env)`."""

import importlib
import pkgutil
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import agents
from agents.tracking.training_run import TrainingRun
from rlhf_gym.errors import InputError
from rlhf_gym.utils.nearest import did_you_mean


def algorithm_names() -> list[str]:
    """The modules at the top of `agents`; they are looked up, so that no list has to be kept."""
    return [module.name for module in pkgutil.iter_modules(agents.__path__) if not module.ispkg]


def load_algorithm(name: str) -> ModuleType:
    """The module that `name` stands for: one of `agents`, or a dotted path of your own.

    Raises:
        InputError: There is none, or it lacks `Config` or `make`.
    """
    dotted = name if "." in name else f"agents.{name}"
    try:
        module = importlib.import_module(dotted)
    except ImportError as error:
        names = algorithm_names()
        # One that is there, and cannot be imported, lacks a package.
        if "." not in name and name not in names and (hint := did_you_mean(name, names)):
            raise InputError(f"no algorithm {name!r}{hint}") from error
        raise InputError(
            f"cannot import the algorithm {name!r} (as {dotted}): {error}\nName a module of "
            "`agents`, such as ppo, or the dotted path of your own; for a file of your own put its "
            "folder on the path: PYTHONPATH=. python scripts/…"
        ) from error
    if not is_dataclass(getattr(module, "Config", None)) or not callable(
        getattr(module, "make", None)
    ):
        raise InputError(f"{dotted} is no algorithm: it needs a dataclass Config and make")
    return module


class Learner(Protocol):
    """What `make(config, env)` of an algorithm's module returns."""

    @property
    def policy(self) -> object:
        """The network that acts."""
        ...

    def learn(self, total_tokens: int, run: TrainingRun | None = None) -> None:
        """Sample about so many tokens and learn from them; measurements go to `run`."""
        ...

    def start_from(self, directory: Path) -> None:
        """Go on with the policy that `save` wrote, instead of the reference."""
        ...

    def save(self, directory: Path) -> None:
        """Write the policy for transformers' `from_pretrained`, tokenizer included."""
        ...
