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

import torch

from agents.runs.algorithm import load_algorithm
from agents.runs.training import check_counts, train
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.yardstick import Row, Yardstick
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.utils.files import whole_lines
from rlhf_gym.utils.nearest import did_you_mean
from rlhf_gym.utils.process import prepare_process
from rlhf_gym.utils.progress import progress_bar, quiet
from rlhf_gym.utils.type_hints import misfit

Job = TypeVar("Job")


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
    figures = train(
        env,
        algorithm,
        config,
        total_tokens=total_tokens,
        run_dir=folder,
        seed=seed,
        resume=True,  # a study that was stopped goes on
    ).figures
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
            raise InputError(
                f"--options {prefix}{name}: {algorithm} has no option {name!r}"
                f"{did_you_mean(name, hints)}"
            )
        if problem := misfit(value, hints[name]):
            raise InputError(f"--options {prefix}{name}: {problem}")
    config = kind(**options)
    check_counts(config)
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
