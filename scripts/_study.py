"""What studies of training share: runs in parallel processes that can be stopped, and a yardstick.

A study is a list of jobs, one trained policy each. Every finished job is a row of results.csv; what
is there already is not done again.
"""

import csv
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
import train_policy
from common import progress_bar, quiet

from agents.algorithm import load_algorithm
from rlhf_gym.enumeration import Enumeration, listable
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation import draw_responses
from rlhf_gym.files import whole_lines
from rlhf_gym.hints import misfit
from rlhf_gym.lm import CausalLM
from rlhf_gym.optimum import best_of_n, best_value, optimality
from rlhf_gym.process import prepare_process

Job = TypeVar("Job")
Row = dict[str, Any]
Floats = npt.NDArray[np.float64]


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of results.csv, none where it is not there."""
    return list(csv.DictReader(whole_lines(file)))


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], Row],
    file: Path,
    columns: Sequence[str],
    workers: int,
) -> None:
    """Do all jobs, a row of `file` each, in `workers` processes that share the cores out.

    Args:
        jobs: What is to be done; each must pickle, and so must `work`.
        work: Does a job; its row, with every one of `columns`.
        file: A CSV file to append to.
        columns: Its columns.
        workers: How many processes.

    Raises:
        Exception: What the first job to fail raised, once the rows of those beside it are written;
            no further one is begun.
    """
    if not file.exists():
        file.write_text(",".join(columns) + "\n")
    threads = max(1, cores() // workers)
    # Spawned, since torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(threads,)) as pool,
        progress_bar("runs", len(jobs)) as advance,
    ):
        running = [pool.submit(work, job) for job in jobs]
        failure: BaseException | None = None
        try:
            for done in as_completed(running):
                if done.cancelled():
                    continue
                if error := done.exception():
                    failure = failure or error
                    for job in running:
                        job.cancel()
                    continue
                row = done.result()
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                with file.open("a", newline="") as out:
                    csv.DictWriter(out, columns).writerow(row)
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failure is not None:
        raise failure


def train_and_measure(
    ruler: "Yardstick",
    algorithm: str,
    options: dict[str, Any],
    env: TokenVectorEnv,
    folder: Path,
    *,
    total_tokens: int,
    seed: int,
) -> Row:
    """Train one policy and measure it; of its run folder only the metrics are kept.

    Args:
        ruler: Measures the policy.
        algorithm: A module under `agents`, or a dotted path.
        options: Options of its `Config` that differ from its defaults.
        env: Where it trains.
        folder: Its run folder.
        total_tokens: Response tokens to sample.
        seed: Seed of training and measurement.

    Raises:
        InputError: The algorithm has no such option, or it may not be that.
    """
    quiet()
    config = with_options(algorithm, options)
    folder.mkdir(parents=True, exist_ok=True)
    figures = train_policy.train(
        env, algorithm, config, total_tokens=total_tokens, run_dir=folder, seed=seed
    )
    policy = CausalLM.load(str(folder / "policy"), device=env.objective.reference.device)
    row = ruler.measure(policy, seed)
    for name in ("policy", "reference", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return {**row, "tokens": int(figures["tokens"]), "seconds": figures["seconds"]}


def with_options(algorithm: str, options: dict[str, Any], prefix: str = "") -> Any:
    """An algorithm's options, those that differ from its defaults checked first.

    Args:
        algorithm: A module under `agents`, or a dotted path.
        options: Names and values.
        prefix: What the command line has before a name.

    Raises:
        InputError: The algorithm has no such option, or it may not be that.
    """
    kind = load_algorithm(algorithm).Config
    hints = get_type_hints(kind)
    for name, value in options.items():
        if name not in hints:
            raise InputError(f"--options {prefix}{name}: {algorithm} has no option {name!r}")
        if problem := misfit(value, hints[name]):
            raise InputError(f"--options {prefix}{name}: {problem}")
    config = kind(**options)
    train_policy.check_counts(config)
    return config


def cores() -> int:
    """Cores that this process may use: threads beyond them would wait for each other."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare(threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    prepare_process()


def _end_with_parent() -> None:
    """A worker whose study was killed would else train on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Yardstick:
    """Measures policies on the same held-out prompts against the same J_ref and J*.

    Exact where all responses can be listed. Elsewhere the reference's responses are drawn once and
    kept in a file, so that all policies of a study are held against one figure.

    Args:
        env: The environment of the held-out prompts.
        file: Where the reference's scores are kept, .npz.
        n_prompts: P, how many prompts.
        n_reference: Responses of the reference to each.
        n_policy: Responses of a policy to each.
    """

    def __init__(
        self, env: TokenVectorEnv, file: Path, n_prompts: int, n_reference: int, n_policy: int
    ) -> None:
        self._objective, self._gold, self._n_policy = env.objective, env.gold, n_policy
        self._limits: dict[str, Any] = {
            "max_new_tokens": env.max_new_tokens,
            "stop_at_eos": env.stop_at_eos,
        }
        order = np.random.default_rng(0).permutation(len(env.prompts))[:n_prompts]
        self._ids = [env.prompts.ids[i] for i in order]
        self._task: Enumeration | None = None
        if listable(env.objective, len(self._ids), env.max_new_tokens, env.stop_at_eos):
            self._task = Enumeration(env.objective, self._ids, **self._limits)
            self.before = self._task.value(self._task.reference).objective
            self.best, self.ess = self._task.best_value, float("inf")
            return
        self._scores = self._reference_scores(file, n_reference)
        found = best_value(self._scores, env.objective.kl_coef)
        self.before, self.best = self._scores.mean(1), found.value
        self.ess = float(found.ess.mean())

    def measure(self, policy: CausalLM, seed: int) -> Row:
        """Optimality, objective, score, KL (nats a sequence) and gold score of a policy.

        `gold` is None without a gold scorer, and where the figures are exact.
        """
        gold = None
        policy = policy.following(self._objective.reference)
        if self._task is not None:
            exact = self._task.value(self._task.log_probs(policy))
            value, score, kl = exact.objective, exact.score, exact.kl
        else:
            drawn = draw_responses(
                policy,
                policy,
                self._objective,
                self._ids,
                self._n_policy,
                gold=self._gold,
                generator=torch.Generator(policy.device).manual_seed(seed),
                **self._limits,
            )
            gold = None if drawn.gold is None else float(drawn.gold.mean())
            score, kl = drawn.scores, drawn.kl
            value = (score - self._objective.kl_coef * kl).mean(1)
        return {
            "optimality": self.share(value),
            "objective": float(value.mean()),
            "score": float(score.mean()),
            "kl": float(kl.mean()),
            "gold": gold,
        }

    def share(self, value: Floats) -> float:
        """Optimality of J (P,) on these prompts."""
        return optimality(value, self.before, self.best, resamples=1)["value"]

    def best_of(self, n: int) -> float:
        """Optimality of the best of n responses of the reference."""
        if self._task is not None:
            return self.share(self._task.best_of_n(n).objective)
        return self.share(best_of_n(self._scores, n, self._objective.kl_coef))

    def best_deterministic(self) -> float | None:
        """Optimality of the best deterministic policy; None where it is unknown."""
        if self._task is None:
            return None
        return self.share(self._task.best_deterministic.objective)

    def _reference_scores(self, file: Path, n: int) -> Floats:
        if not file.exists():
            reference = self._objective.reference
            with progress_bar("reference samples", n * len(self._ids)) as advance:
                drawn = draw_responses(
                    reference,
                    reference,
                    self._objective,
                    self._ids,
                    n,
                    generator=torch.Generator(reference.device).manual_seed(0),
                    progress=advance,
                    **self._limits,
                )
            partial = file.with_name(f".{file.name}.partial.npz")
            np.savez(partial, scores=drawn.scores)
            partial.rename(file)
        scores: Floats = np.load(file)["scores"]
        return scores


def interval(values: Floats) -> float:
    """Half the width of a 95 % t interval over seeds; NaN for one."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
