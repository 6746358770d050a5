"""The whole of RLHF in one run folder: comparisons, reward model, policy, evaluation, summary.

A journey that was stopped goes on when it is called again with the same options.
"""

import dataclasses
import time
from typing import Any

from rich.console import Console

from agents.runs.algorithm import load_algorithm
from agents.runs.journey_options import JourneyOptions, check_options
from agents.runs.setup import begin_run, check_same_run, make_env, parse_values
from agents.runs.stages import Journey, collect, evaluate, fit_reward, learn, summarise
from agents.tracking.wandb import require_wandb
from rlhf_gym.reports.run_page import write_report
from rlhf_gym.reports.terminal import print_samples, table
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.progress import transformers_quiet


def run_journey(
    options: JourneyOptions, algorithm_options: Any = None, *, progress: bool = True
) -> dict[str, Any]:
    """Run every stage in turn, or go on where an earlier call with these options stopped.

    Args:
        options: Its options; ``options.run_dir`` is the folder that gets everything.
        algorithm_options: Those of the algorithm, an instance of its module's `Config`; the
            defaults if None.
        progress: Whether to print what is done, and progress.

    Returns:
        What summary.json says.

    Raises:
        InputError: An option does not fit, or the folder has another run.
    """
    if options.wandb:
        require_wandb()  # now, not when the policy's turn comes
    if algorithm_options is None:
        algorithm_options = load_algorithm(options.algorithm).Config()
    with transformers_quiet():
        return _run(options, algorithm_options, Console(quiet=not progress))


def _run(options: JourneyOptions, algorithm_options: Any, console: Console) -> dict[str, Any]:
    begun = time.monotonic()
    keywords = {"device": resolve_device(options.device), **parse_values(options.env_kwargs)}
    check_options(options, algorithm_options, keywords)
    # The reward does not matter to the two stages that make it.
    env = make_env(options.env, 1, {**keywords, "reward_model": options.human})
    held_out = {**keywords, "split": "held_out"}
    make_env(
        options.env, 1, {**held_out, "reward_model": options.human}
    )  # fail now, not at the end
    plain = dataclasses.asdict(options)
    plain |= {"algorithm_options": dataclasses.asdict(algorithm_options)}
    check_same_run(options.run_dir, plain, resume=True)
    begin_run(options.run_dir, plain)
    journey = Journey(options, algorithm_options, keywords, console)
    previous = None
    for stage in journey.rounds:
        stage.folder.mkdir(parents=True, exist_ok=True)
        collect(journey, env, stage, previous)
        fit_reward(journey, env, stage)
        learn(journey, stage, previous)
        previous = stage
    figures = evaluate(journey)
    summary = summarise(journey, figures)
    write_json(options.run_dir / "summary.json", summary)
    page = write_report(options.run_dir)
    print_samples(options.run_dir, console)
    console.print(table(figures))
    console.print(f"report: {page} ({time.monotonic() - begun:.0f} s)", highlight=False)
    return summary
