"""Options of a comparison of algorithms, and what they say of each of its trainings."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from agents.runs.algorithm import load_algorithm
from agents.runs.experiments import with_options
from agents.runs.setup import parse_values
from rlhf_gym.errors import InputError
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.type_hints import misfit


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of a comparison."""

    algorithms: tuple[str, ...]
    """Modules under `agents`, or dotted paths; the first is what the others are compared with."""
    envs: tuple[str, ...] = ("rlhf_gym/Exact-v0",)
    """Environment ids."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of all environments, KEY VALUE …; values are parsed as JSON, else taken as text."""
    total_tokens: tuple[int, ...] = (260_000,)
    """Response tokens of each run: one number, or one for each environment."""
    seeds: int = 10
    """Seeds 0 to n − 1."""
    rates: tuple[float, ...] = ()
    """Multiples of the default learning rate to try first; none takes the default."""
    tuned: dict[str, str] = field(default_factory=dict)
    """What --rates multiplies in place of the learning rate, ALGORITHM OPTION …"""
    options: dict[str, str] = field(default_factory=dict)
    """Options that differ from an algorithm's defaults, ALGORITHM.NAME VALUE …"""
    num_envs: int = 256
    """Rows of the environment."""
    prompts: int = 64
    """Prompts in an evaluation."""
    reference_samples: int = 1024
    """Responses of the reference to each of them, drawn once for all runs."""
    policy_samples: int = 64
    """Responses of each policy to each of them."""
    workers: int = 1
    """Processes; they share the cores out."""
    run_dir: Path = Path("runs/compare")
    """Folder to write to."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda."""


def check_options(options: ComparisonOptions) -> None:
    """Raise an InputError before hours are spent."""
    if min(options.seeds, options.workers, *options.total_tokens) < 1:
        raise InputError("--seeds, --workers and --total-tokens must be at least 1")
    if len(options.total_tokens) not in (1, len(options.envs)):
        raise InputError(
            f"--total-tokens takes one number or one for each of the {len(options.envs)} "
            f"environments, not {len(options.total_tokens)}"
        )
    for name in options.options:
        if name.rpartition(".")[0] not in options.algorithms:
            raise InputError(
                f"--options {name}: say ALGORITHM.NAME with one of {list(options.algorithms)}"
            )
    for algorithm in options.algorithms:
        all_options(options, algorithm)
    check_tuned(options)


def check_tuned(options: ComparisonOptions) -> None:
    """Raise an InputError if --tuned names no algorithm, or --rates has nothing to multiply."""
    if options.tuned and not options.rates:
        raise InputError("--tuned says what --rates multiplies; give --rates too")
    for algorithm in options.tuned:
        if algorithm not in options.algorithms:
            raise InputError(f"--tuned {algorithm}: say one of {list(options.algorithms)}")
    if options.rates:
        for algorithm in options.algorithms:
            name, value = multiplied(options, algorithm)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InputError(f"--rates: {algorithm} has no option {name} that is a number")
            if not value:
                raise InputError(
                    f"--rates: {name} of {algorithm} is 0, and so is every multiple; give it "
                    f"another value by --options {algorithm}.{name}"
                )


def budgets(options: ComparisonOptions) -> dict[str, int]:
    """Tokens of a run in each environment."""
    each = options.total_tokens * (len(options.envs) // len(options.total_tokens))
    return dict(zip(options.envs, each, strict=True))


def keywords(options: ComparisonOptions) -> dict[str, Any]:
    """Keywords of every environment."""
    return {"device": resolve_device(options.device), **parse_values(options.env_kwargs)}


def own_options(options: ComparisonOptions, algorithm: str) -> dict[str, Any]:
    """What --options says of an algorithm."""
    prefix = f"{algorithm}."
    texts = {k[len(prefix) :]: v for k, v in options.options.items() if k.startswith(prefix)}
    return parse_values(texts)


def all_options(options: ComparisonOptions, algorithm: str) -> dict[str, Any]:
    """The same and its defaults, as JSON has them."""
    whole = with_options(algorithm, own_options(options, algorithm), f"{algorithm}.")
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(whole), default=str))
    return plain


def multiplied(options: ComparisonOptions, algorithm: str) -> tuple[str, Any]:
    """The option that --rates multiplies, and its value; None if there is no such option."""
    name = options.tuned.get(algorithm, "learning_rate")
    default = getattr(load_algorithm(algorithm).Config(), name, None)
    return name, own_options(options, algorithm).get(name, default)


def multiple(options: ComparisonOptions, algorithm: str, rate: float) -> dict[str, Any]:
    """What --rates multiplies, times a rate; what counts something stays a whole number."""
    name, value = multiplied(options, algorithm)
    counts = misfit(rate * value, get_type_hints(load_algorithm(algorithm).Config)[name])
    return {name: max(1, round(rate * value)) if counts else rate * value}
