"""`python scripts/compare.py --algorithms ppo rloo grpo --run-dir DIR` compares algorithms.

Every algorithm gets the same tokens in the same environments, and the same effort in tuning: with
--rates, it is first trained once for each multiple of its own default learning rate (or of what
--tuned names), and measured on training prompts; the best multiple goes into the comparison. That
is over --seeds other seeds and on held-out prompts (`Exact-v0` holds none out: there only the seeds
differ), with intervals by stratified bootstrap over seeds (rliable). Runs go in parallel processes
(--workers). Writes results.csv (a row a run; done rows are skipped when it is run again),
compare.json, compare.md, compare.png and compare.html.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_type_hints

import numpy as np

from agents.cli.command import device, run
from agents.runs.algorithm import load_algorithm
from agents.runs.experiments import read_rows, run_jobs, train_and_measure, with_options
from agents.runs.setup import apart, begin_run, check_same_run, listed, make_env, parse_values
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.yardstick import Row, Yardstick
from rlhf_gym.reports.comparison_page import write_report
from rlhf_gym.utils.files import read_json, write_json
from rlhf_gym.utils.type_hints import misfit

COLUMNS = "env,algorithm,tuning,rate,seed,optimality,objective,score,kl,gold,tokens,seconds".split(
    ","
)

FIRST_TUNING_SEED = 1000
"""Seeds from here on are for tuning, so that the comparison has seen none of its own."""

BEST_OF = (4, 16)
"""Best-of-n of the reference, which costs nothing to train and n times as much to sample."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    algorithms: tuple[str, ...]
    """Modules under `agents`, or dotted paths; the first is what the others are held against."""
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


class Job(NamedTuple):
    """One training.

    Attributes:
        env: Environment id.
        algorithm: Its name.
        tuning: Whether it is one of the trials that choose the learning rate.
        rate: Multiple of the default learning rate, or of what `Config.tuned` names.
        seed: The seed.
    """

    env: str
    algorithm: str
    tuning: bool
    rate: float
    seed: int

    @property
    def split(self) -> str:
        """Whose prompts it is measured on."""
        return "train" if self.tuning else "held_out"

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        kind = "tuning" if self.tuning else "seed"
        parts = (self.env.split("/")[-1], self.algorithm, f"{kind}-{self.rate:g}-{self.seed}")
        return "-".join(parts)


def main(config: Config) -> None:
    """Tune, compare, and write what came out."""
    check_options(config)
    plain = dataclasses.asdict(config)
    # More algorithms, environments, rates and seeds may be added to a comparison later.
    growing = "algorithms envs total_tokens seeds rates tuned options workers".split()
    fixed = {k: v for k, v in plain.items() if k not in growing}
    check_same_run(config.run_dir, fixed, resume=True)
    begin_run(config.run_dir, fixed)
    check_same_terms(config)
    file = config.run_dir / "results.csv"
    pairs = [(env, algorithm) for env in config.envs for algorithm in config.algorithms]
    for split in ("train", "held_out") if config.rates else ("held_out",):
        for env in config.envs:
            yardstick(config, env, split)  # drawn before the processes need it
    trials = [
        Job(env, algorithm, True, rate, FIRST_TUNING_SEED)
        for rate in config.rates
        for env, algorithm in pairs
    ]
    do(config, trials, file)
    chosen = best_rates(read_rows(file), pairs, config.rates)
    jobs = [
        Job(env, algorithm, False, chosen[env, algorithm], seed)
        for seed in range(config.seeds)
        for env, algorithm in pairs
    ]
    do(config, jobs, file)
    scales = {env: scale(yardstick(config, env, "held_out")) for env in config.envs}
    compared = {(job.env, job.algorithm, job.rate, job.seed) for job in jobs}
    rows = [row for row in read_rows(file) if row["tuning"] == "0"]
    rows = [
        row
        for row in rows
        # Rows of another rate are left from when fewer had been tried.
        if (row["env"], row["algorithm"], float(row["rate"]), int(row["seed"])) in compared
    ]
    options = {k: v for k, v in plain.items() if k not in ("run_dir", "workers")}
    write_report(config.run_dir, options, rows, scales, chosen)


def budgets(config: Config) -> dict[str, int]:
    """Tokens of a run in each environment."""
    each = config.total_tokens * (len(config.envs) // len(config.total_tokens))
    return dict(zip(config.envs, each, strict=True))


def check_same_terms(config: Config) -> None:
    """Note every environment's tokens and every algorithm's options; refuse other ones later.

    The options are all of them: a default that has changed since makes other terms too.

    Raises:
        InputError: Rows that are there already were made under other terms.
    """
    file = config.run_dir / "terms.json"
    before = read_json(file) if file.exists() else {"tuned": {}}
    # Before there was --tuned it was the learning rate.
    before.setdefault("tuned", dict.fromkeys(before.get("options", ()), "learning_rate"))
    terms: dict[str, dict[str, Any]] = {
        "tokens": budgets(config),
        "options": {name: all_options(config, name) for name in config.algorithms},
        "tuned": {n: multiplied(config, n)[0] for n in config.algorithms if config.rates},
    }
    for kind, now in terms.items():
        for name, value in now.items():
            there = before.setdefault(kind, {}).setdefault(name, value)
            if other := apart({name: there}, {name: value}):
                raise InputError(
                    f"{config.run_dir} holds a comparison with {kind} {listed(other)}; give the "
                    "same ones to go on, or another --run-dir"
                )
    write_json(file, before)


def own_options(config: Config, algorithm: str) -> dict[str, Any]:
    """What --options says of an algorithm."""
    prefix = f"{algorithm}."
    texts = {k[len(prefix) :]: v for k, v in config.options.items() if k.startswith(prefix)}
    return parse_values(texts)


def all_options(config: Config, algorithm: str) -> dict[str, Any]:
    """The same and its defaults, as JSON has them."""
    whole = with_options(algorithm, own_options(config, algorithm), f"{algorithm}.")
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(whole), default=str))
    return plain


def check_options(config: Config) -> None:
    """Raise an InputError before hours are spent."""
    if min(config.seeds, config.workers, *config.total_tokens) < 1:
        raise InputError("--seeds, --workers and --total-tokens must be at least 1")
    if len(config.total_tokens) not in (1, len(config.envs)):
        raise InputError(
            f"--total-tokens takes one number or one for each of the {len(config.envs)} "
            f"environments, not {len(config.total_tokens)}"
        )
    for name in config.options:
        if name.rpartition(".")[0] not in config.algorithms:
            raise InputError(
                f"--options {name}: say ALGORITHM.NAME with one of {list(config.algorithms)}"
            )
    for algorithm in config.algorithms:
        all_options(config, algorithm)
    check_tuned(config)


def check_tuned(config: Config) -> None:
    """Raise an InputError if --tuned names no algorithm, or --rates has nothing to multiply."""
    if config.tuned and not config.rates:
        raise InputError("--tuned says what --rates multiplies; give --rates too")
    for algorithm in config.tuned:
        if algorithm not in config.algorithms:
            raise InputError(f"--tuned {algorithm}: say one of {list(config.algorithms)}")
    if config.rates:
        for algorithm in config.algorithms:
            name, value = multiplied(config, algorithm)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InputError(f"--rates: {algorithm} has no option {name} that is a number")
            if not value:
                raise InputError(
                    f"--rates: {name} of {algorithm} is 0, and so is every multiple; give it "
                    f"another value by --options {algorithm}.{name}"
                )


def multiplied(config: Config, algorithm: str) -> tuple[str, Any]:
    """The option that --rates multiplies, and its value; None if there is no such option."""
    name = config.tuned.get(algorithm, "learning_rate")
    default = getattr(load_algorithm(algorithm).Config(), name, None)
    return name, own_options(config, algorithm).get(name, default)


def multiple(config: Config, algorithm: str, rate: float) -> dict[str, Any]:
    """What --rates multiplies, times a rate; what counts something stays a whole number."""
    name, value = multiplied(config, algorithm)
    counts = misfit(rate * value, get_type_hints(load_algorithm(algorithm).Config)[name])
    return {name: max(1, round(rate * value)) if counts else rate * value}


def do(config: Config, jobs: list[Job], file: Path) -> None:
    """Train whatever of `jobs` has no row yet."""
    done = {
        (r["env"], r["algorithm"], r["tuning"], float(r["rate"]), int(r["seed"]))
        for r in read_rows(file)
    }
    left = [job for job in jobs if job._replace(tuning=str(int(job.tuning))) not in done]  # type: ignore[arg-type]
    run_jobs(left, partial(trained, config), file, COLUMNS, config.workers)


def trained(config: Config, job: Job) -> Row:
    """Train and measure."""
    options = own_options(config, job.algorithm)
    if config.rates:
        options |= multiple(config, job.algorithm, job.rate)
    measure = partial(
        train_and_measure,
        yardstick(config, job.env, job.split),
        job.algorithm,
        options,
        make_env(job.env, config.num_envs, keywords(config)),
        config.run_dir / "runs" / job.folder,
        total_tokens=budgets(config)[job.env],
        seed=job.seed,
    )
    if not job.tuning:
        return {**job._asdict(), "tuning": 0, **measure()}
    try:
        row = measure()
    except InputError as error:
        # A rate at which it breaks is an answer too; the comparison goes on with another.
        name, _ = multiplied(config, job.algorithm)
        print(f"{job.algorithm} at {job.rate:g} times its {name}: {error}")
        row = {name: float("-inf") for name in COLUMNS[5:9]} | {"tokens": 0, "seconds": 0.0}
    return {**job._asdict(), "tuning": 1, **row}


def keywords(config: Config) -> dict[str, Any]:
    """Keywords of every environment."""
    return {"device": device(config.device), **parse_values(config.env_kwargs)}


def yardstick(config: Config, env_id: str, split: str) -> Yardstick:
    """What all runs in an environment are measured by."""
    name = env_id.replace("/", "_")
    return Yardstick(
        make_env(env_id, 1, {"split": split, **keywords(config)}),
        config.run_dir / f"reference_{name}_{split}.npz",
        config.prompts,
        config.reference_samples,
        config.policy_samples,
    )


def scale(ruler: Yardstick) -> dict[str, Any]:
    """What an environment's figures are held against."""
    return {
        "objective_reference": float(ruler.before.mean()),
        "objective_optimum": float(ruler.best.mean()),
        "effective_sample_size": ruler.ess if np.isfinite(ruler.ess) else None,
        "best_of_n_optimality": {str(n): ruler.best_of(n) for n in BEST_OF},
        "best_deterministic_optimality": ruler.best_deterministic(),
    }


def best_rates(
    rows: list[dict[str, str]], pairs: list[tuple[str, str]], rates: tuple[float, ...]
) -> dict[tuple[str, str], float]:
    """The one of `rates` with the highest optimality on training prompts; 1 if there are none."""
    chosen = {}
    for env, algorithm in pairs:
        found = {
            float(r["rate"]): float(np.nan_to_num(float(r["optimality"]), nan=-np.inf))
            for r in rows
            if r["tuning"] == "1"
            and (r["env"], r["algorithm"]) == (env, algorithm)
            and float(r["rate"]) in rates
        }
        chosen[env, algorithm] = max(found, key=found.__getitem__, default=1.0)
    return chosen


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog)
