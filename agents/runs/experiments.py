"""Run the trainings of a study in parallel processes, and measure each with one yardstick.

A study is a list of jobs, and each job trains one policy. A finished job is a row of results.csv.
A study can be stopped and continued, because jobs that have a row are not run again.
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
    """Read the rows of results.csv; none if the file does not exist."""
    return list(csv.DictReader(whole_lines(file)))


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], Row],
    file: Path,
    columns: Sequence[str],
    workers: int,
) -> None:
    """Run all jobs in `workers` processes, and append a row to `file` for each.

    The processes divide the CPU cores among them.

    Args:
        jobs: The jobs. They are sent to other processes, so they and `work` must pickle.
        work: Runs a job and returns its row, with a value for each of `columns`.
        file: The CSV file to append to.
        columns: Its columns.
        workers: Number of processes.

    Raises:
        Exception: The exception of the first job that fails. No further job is started; the jobs
            already running finish first, and their rows are written.
    """
    if not file.exists():
        file.write_text(",".join(columns) + "\n")
    threads = max(1, cores() // workers)
    # Spawn, because torch's threads do not survive a fork.
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
    """Train one policy and measure it, then delete the large folders of its run.

    Args:
        ruler: Measures the policy.
        algorithm: A module under `agents`, or a dotted path.
        options: Options of its `Config` that differ from its defaults.
        env: The environment to train in.
        folder: The run folder.
        total_tokens: Response tokens to sample.
        seed: Seed of training and measurement.

    Returns:
        The figures of `Yardstick.measure`, the tokens sampled and the seconds of training.

    Raises:
        InputError: The algorithm has no such option, or the option cannot have this value.
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
        resume=True,  # continues a run that was stopped midway
    ).figures
    policy = CausalLM.load(str(folder / "policy"), device=env.objective.reference.device)
    row = ruler.measure(policy, seed)
    for name in ("policy", "reference", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return {**row, "tokens": int(figures["tokens"]), "seconds": figures["seconds"]}


def with_options(algorithm: str, options: dict[str, Any], prefix: str = "") -> Any:
    """Build an algorithm's `Config` from its defaults and some checked options.

    Args:
        algorithm: A module under `agents`, or a dotted path.
        options: Options that differ from the defaults, by name.
        prefix: Text before an option's name on the command line, for error messages.

    Raises:
        InputError: The algorithm has no such option, or the option cannot have this value.
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
    """Return how many cores this process may use. More threads than that only wait."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare(threads: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    prepare_process()


def _end_with_parent() -> None:
    """End this worker when its parent ends. Otherwise a killed study would leave it training."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
