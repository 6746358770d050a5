"""Compare algorithms with the same tokens and the same tuning budget, on seeds not tuned on."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agents.runs.comparison_options import (
    ComparisonOptions,
    all_options,
    budgets,
    check_options,
    keywords,
    multiple,
    multiplied,
    own_options,
)
from agents.runs.experiments import read_rows, run_jobs, train_and_measure
from agents.runs.setup import (
    apart,
    begin_run,
    check_same_run,
    listed,
    make_env,
    with_absolute_files,
)
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.yardstick import Row, Yardstick
from rlhf_gym.reports.comparison_page import write_report
from rlhf_gym.tasks.registered import short_id
from rlhf_gym.utils.files import read_json, write_json

COLUMNS = "env,algorithm,tuning,rate,seed,optimality,objective,score,kl,gold,tokens,seconds".split(
    ","
)

FIRST_TUNING_SEED = 1000
"""First seed used for tuning. The comparison uses seeds from 0, so no seed is used in both."""

BEST_OF = (4, 16)
"""The n of the best-of-n baselines: no training, but n times the sampling cost."""


class Job(NamedTuple):
    """One training.

    Attributes:
        env: Environment id.
        algorithm: Name of the algorithm.
        tuning: True for a trial that helps to choose the rate, False for a run of the comparison.
        rate: Multiple of the default learning rate, or of the option in `ComparisonOptions.tuned`.
        seed: Seed of the training and of its evaluation.
    """

    env: str
    algorithm: str
    tuning: bool
    rate: float
    seed: int

    @property
    def split(self) -> str:
        """The prompts to measure on. Tuning must not see the held-out prompts.

        A split that is registered with the id, or given in --env-kwargs, wins over this one.
        """
        return "train" if self.tuning else "held_out"

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        kind = "tuning" if self.tuning else "seed"
        # With the namespace, because two tasks may have the same name in different ones.
        env = short_id(self.env).removeprefix("rlhf_gym/").replace("/", "_")
        parts = (env, self.algorithm, f"{kind}-{self.rate:g}-{self.seed}")
        return "-".join(parts)


def compare(options: ComparisonOptions) -> None:
    """Tune the algorithms, compare them, and write the results into ``options.run_dir``.

    Call it again to continue a stopped comparison. The new call may add algorithms, environments,
    rates and seeds.

    Raises:
        InputError: An option is bad, or the folder contains a comparison with other options.
    """
    options = dataclasses.replace(options, env_kwargs=with_absolute_files(options.env_kwargs))
    check_options(options)
    plain = dataclasses.asdict(options)
    # These may grow from call to call. `check_same_terms` checks them per environment and
    # algorithm instead.
    growing = "algorithms envs total_tokens seeds rates tuned options workers".split()
    fixed = {k: v for k, v in plain.items() if k not in growing}
    check_same_run(options.run_dir, fixed, resume=True)
    begin_run(options.run_dir, fixed)
    check_same_terms(options)
    file = options.run_dir / "results.csv"
    pairs = [(env, algorithm) for env in options.envs for algorithm in options.algorithms]
    for split in ("train", "held_out") if options.rates else ("held_out",):
        for env in options.envs:
            # Draw the reference's samples now, once: otherwise each worker would draw them.
            yardstick(options, env, split)
    trials = [
        Job(env, algorithm, True, rate, FIRST_TUNING_SEED)
        for rate in options.rates
        for env, algorithm in pairs
    ]
    do(options, trials, file)
    chosen = best_rates(read_rows(file), pairs, options.rates)
    jobs = [
        Job(env, algorithm, False, chosen[env, algorithm], seed)
        for seed in range(options.seeds)
        for env, algorithm in pairs
    ]
    do(options, jobs, file)
    scales = {env: scale(yardstick(options, env, "held_out")) for env in options.envs}
    compared = {(job.env, job.algorithm, job.rate, job.seed) for job in jobs}
    rows = [row for row in read_rows(file) if row["tuning"] == "0"]
    rows = [
        row
        for row in rows
        # results.csv may have rows of a rate that was best when fewer rates had been tried.
        if (row["env"], row["algorithm"], float(row["rate"]), int(row["seed"])) in compared
    ]
    shown = {k: v for k, v in plain.items() if k not in ("run_dir", "workers")}
    write_report(options.run_dir, shown, rows, scales, chosen)


def check_same_terms(options: ComparisonOptions) -> None:
    """Record each environment's tokens and each algorithm's options, and refuse a later change.

    All options of an algorithm are recorded, not only those that differ from its defaults. So a
    default that changed between two versions is noticed too.

    Raises:
        InputError: The rows already in results.csv were made with other tokens or options.
    """
    file = options.run_dir / "terms.json"
    before = read_json(file) if file.exists() else {"tuned": {}}
    # Files written before --tuned existed multiplied the learning rate.
    before.setdefault("tuned", dict.fromkeys(before.get("options", ()), "learning_rate"))
    terms: dict[str, dict[str, Any]] = {
        "tokens": budgets(options),
        "options": {name: all_options(options, name) for name in options.algorithms},
        "tuned": {n: multiplied(options, n)[0] for n in options.algorithms if options.rates},
    }
    for kind, now in terms.items():
        for name, value in now.items():
            there = before.setdefault(kind, {}).setdefault(name, value)
            if other := apart({name: there}, {name: value}):
                raise InputError(
                    f"{options.run_dir} contains a comparison with {kind} {listed(other)}; give "
                    "the same ones to continue it, or another --run-dir"
                )
    write_json(file, before)


def do(options: ComparisonOptions, jobs: list[Job], file: Path) -> None:
    """Run the jobs that have no row in `file` yet."""
    done = {
        (r["env"], r["algorithm"], r["tuning"], float(r["rate"]), int(r["seed"]))
        for r in read_rows(file)
    }
    left = [
        job
        for job in jobs
        if (job.env, job.algorithm, str(int(job.tuning)), job.rate, job.seed) not in done
    ]
    run_jobs(left, partial(trained, options), file, COLUMNS, options.workers)


def trained(options: ComparisonOptions, job: Job) -> Row:
    """Train and measure one job, and return its row of results.csv."""
    own = own_options(options, job.algorithm)
    if options.rates:
        own |= multiple(options, job.algorithm, job.rate)
    measure = partial(
        train_and_measure,
        yardstick(options, job.env, job.split),
        job.algorithm,
        own,
        make_env(job.env, options.num_envs, keywords(options)),
        options.run_dir / "runs" / job.folder,
        total_tokens=budgets(options)[job.env],
        seed=job.seed,
    )
    if not job.tuning:
        return {**job._asdict(), "tuning": 0, **measure()}
    try:
        row = measure()
    except InputError as error:
        # Diverging at a rate is a result: give it the worst score, so that another rate is chosen.
        name, _ = multiplied(options, job.algorithm)
        print(f"{job.algorithm} at {job.rate:g} times its {name}: {error}")
        row = {name: float("-inf") for name in COLUMNS[5:9]} | {"tokens": 0, "seconds": 0.0}
    return {**job._asdict(), "tuning": 1, **row}


def yardstick(options: ComparisonOptions, env_id: str, split: str) -> Yardstick:
    """Return the yardstick that measures all runs in an environment.

    Args:
        options: The options of the comparison.
        env_id: The environment.
        split: The prompts to measure on, unless the id or --env-kwargs names others.
    """
    name = short_id(env_id).replace("/", "_")
    env = make_env(env_id, 1, keywords(options), {"split": split})
    return Yardstick(
        env,
        options.run_dir / f"reference_{name}_{env.prompts.split}.npz",
        options.prompts,
        options.reference_samples,
        options.policy_samples,
    )


def scale(ruler: Yardstick) -> dict[str, Any]:
    """Return an environment's baselines: reference, optimum, best-of-n, best deterministic."""
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
    """Return the rate with the highest optimality on training prompts, or 1 without `rates`."""
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
