"""Load an algorithm by name: any module with a dataclass `Config` and `make(config, env)`."""

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
    """List the modules at the top of `agents`. A new algorithm needs no entry in any list."""
    return [module.name for module in pkgutil.iter_modules(agents.__path__) if not module.ispkg]


def load_algorithm(name: str) -> ModuleType:
    """Import an algorithm's module.

    Args:
        name: A module under `agents`, or the dotted path of your own module.

    Raises:
        InputError: The module cannot be imported, or it lacks `Config` or `make`.
    """
    dotted = name if "." in name else f"agents.{name}"
    try:
        module = importlib.import_module(dotted)
    except ImportError as error:
        names = algorithm_names()
        # No suggestion for a module that exists: its import fails because a package is missing.
        if "." not in name and name not in names and (hint := did_you_mean(name, names)):
            raise InputError(f"no algorithm {name!r}{hint}") from error
        raise InputError(
            f"cannot import the algorithm {name!r} (as {dotted}): {error}\nGive a module under "
            "`agents`, such as ppo, or the dotted path of your own. If your module is a file, run "
            "the command in its folder, or put that folder on the path: PYTHONPATH=FOLDER"
        ) from error
    if not is_dataclass(getattr(module, "Config", None)) or not callable(
        getattr(module, "make", None)
    ):
        raise InputError(
            f"{dotted} is not an algorithm: it needs a dataclass Config and a function make"
        )
    return module


class Learner(Protocol):
    """The interface of what `make(config, env)` of an algorithm's module returns."""

    @property
    def policy(self) -> object:
        """The network that chooses the tokens."""
        ...

    def learn(self, total_tokens: int, run: TrainingRun | None = None) -> None:
        """Sample about `total_tokens` tokens and learn from them; `run` records the metrics."""
        ...

    def start_from(self, directory: Path) -> None:
        """Start from a policy that `save` wrote, instead of from the reference."""
        ...

    def save(self, directory: Path) -> None:
        """Write the policy for transformers' `from_pretrained`, tokenizer included."""
        ...
