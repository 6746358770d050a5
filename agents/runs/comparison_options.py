"""Options of a comparison of algorithms, and the options of each training derived from them."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from agents.runs.algorithm import load_algorithm
from agents.runs.experiments import with_options
from agents.runs.setup import env_keywords, parse_values
from rlhf_gym.errors import InputError
from rlhf_gym.utils.type_hints import misfit


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of a comparison."""

    algorithms: tuple[str, ...]
    """Algorithms to compare: modules under `agents`, or dotted paths of your own. The others are
    compared with the first."""
    envs: tuple[str, ...] = ("rlhf_gym/Exact-v0",)
    """Environment ids. Every algorithm is trained in each of them. For a task of your own give the
    module that registers it too, my_module:mine/Task-v0; the module may be a file in the current
    folder."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of all environments, KEY VALUE … Values are parsed as JSON, else taken as text;
    --env-kwargs help lists the keywords. Tuning and comparison choose the `split` to measure on,
    unless it is given here or registered with the id."""
    total_tokens: tuple[int, ...] = (260_000,)
    """Response tokens to sample in each run, at least 1: one number for all environments, or one
    per environment."""
    seeds: int = 10
    """Runs of each algorithm in each environment, at least 1. They have the seeds 0, 1, 2 …"""
    rates: tuple[float, ...] = ()
    """Multiples of the default learning rate to try before the comparison, for example 0.3 1 3.
    Each costs one more run of each algorithm in each environment. If none is given, the defaults
    are used."""
    tuned: dict[str, str] = field(default_factory=dict)
    """Option that --rates multiplies instead of the learning rate, ALGORITHM OPTION …"""
    options: dict[str, str] = field(default_factory=dict)
    """Options that replace an algorithm's defaults, ALGORITHM.NAME VALUE …"""
    num_envs: int = 256
    """Environments that run in parallel in each training, at least 1."""
    prompts: int = 64
    """Prompts to evaluate on. If the environment has fewer, all are used."""
    reference_samples: int = 1024
    """Responses of the reference to each of these prompts. They are drawn once for all runs. Not
    used where the optimum is computed exactly."""
    policy_samples: int = 64
    """Responses of each policy to each of these prompts. Not used where the policy's value is
    computed exactly."""
    workers: int = 1
    """Trainings that run at the same time, each in its own process, at least 1. The CPU cores are
    divided among them."""
    run_dir: Path = Path("runs/compare")
    """Folder for the results."""
    device: str = "auto"
    """Where to train: auto (the device registered with the environment, else the GPU if there is
    one, else the CPU), cpu or cuda."""


def check_options(options: ComparisonOptions) -> None:
    """Raise an InputError for a bad option now, not hours into the comparison."""
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
                f"--options {name}: give ALGORITHM.NAME, where ALGORITHM is one of "
                f"{list(options.algorithms)}"
            )
    for algorithm in options.algorithms:
        all_options(options, algorithm)
    check_tuned(options)


def check_tuned(options: ComparisonOptions) -> None:
    """Raise an InputError if --tuned names an unknown algorithm or --rates nothing to multiply."""
    if options.tuned and not options.rates:
        raise InputError("--tuned chooses the option that --rates multiplies; give --rates too")
    for algorithm in options.tuned:
        if algorithm not in options.algorithms:
            raise InputError(f"--tuned {algorithm}: must be one of {list(options.algorithms)}")
    if options.rates:
        for algorithm in options.algorithms:
            name, value = multiplied(options, algorithm)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InputError(f"--rates: {algorithm} has no option {name} that is a number")
            if not value:
                raise InputError(
                    f"--rates: {name} of {algorithm} is 0, and so is every multiple of it; set "
                    f"another value with --options {algorithm}.{name}"
                )


def budgets(options: ComparisonOptions) -> dict[str, int]:
    """Return the tokens of a run in each environment."""
    each = options.total_tokens * (len(options.envs) // len(options.total_tokens))
    return dict(zip(options.envs, each, strict=True))


def keywords(options: ComparisonOptions) -> dict[str, Any]:
    """Return the keywords for every environment."""
    return env_keywords(options.env_kwargs, options.device)


def own_options(options: ComparisonOptions, algorithm: str) -> dict[str, Any]:
    """Return the options that --options sets for an algorithm."""
    prefix = f"{algorithm}."
    texts = {k[len(prefix) :]: v for k, v in options.options.items() if k.startswith(prefix)}
    return parse_values(texts)


def all_options(options: ComparisonOptions, algorithm: str) -> dict[str, Any]:
    """Return all options of an algorithm, defaults included, as JSON values."""
    whole = with_options(algorithm, own_options(options, algorithm), f"{algorithm}.")
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(whole), default=str))
    return plain


def multiplied(options: ComparisonOptions, algorithm: str) -> tuple[str, Any]:
    """Return the name and value of the option that --rates multiplies.

    The value is None if the algorithm has no such option.
    """
    name = options.tuned.get(algorithm, "learning_rate")
    default = getattr(load_algorithm(algorithm).Config(), name, None)
    return name, own_options(options, algorithm).get(name, default)


def multiple(options: ComparisonOptions, algorithm: str, rate: float) -> dict[str, Any]:
    """Return the tuned option multiplied by `rate`; an integer option is rounded, at least 1."""
    name, value = multiplied(options, algorithm)
    counts = misfit(rate * value, get_type_hints(load_algorithm(algorithm).Config)[name])
    return {name: max(1, round(rate * value)) if counts else rate * value}
