"""All of RLHF in one run folder: comparisons, reward model, policy, evaluation, summary.

Call `run_journey` again with the same options to continue a stopped run.
"""

import dataclasses
import time
from typing import Any

from rich.console import Console

from agents.runs.algorithm import load_algorithm
from agents.runs.journey_options import JourneyOptions, check_options, simulated_human
from agents.runs.labelling import SIMULATED_HUMAN
from agents.runs.setup import (
    begin_run,
    check_same_run,
    env_keywords,
    make_env,
    with_absolute_files,
)
from agents.runs.stages import Journey, collect, evaluate, fit_reward, learn, summarise
from agents.tracking.wandb import require_wandb
from rlhf_gym.evaluation.record import check_prompts
from rlhf_gym.reports.run_page import write_report
from rlhf_gym.reports.terminal import print_samples, table
from rlhf_gym.rewards.callables import absolute_name
from rlhf_gym.tasks.registered import find_spec
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.progress import transformers_quiet


def run_journey(
    options: JourneyOptions, algorithm_options: Any = None, *, progress: bool = True
) -> dict[str, Any]:
    """Run all stages in order, or continue where an earlier call with these options stopped.

    Args:
        options: The options. All results go into the folder ``options.run_dir``.
        algorithm_options: The algorithm's options, an instance of its module's `Config`; None takes
            the defaults.
        progress: Whether to print each stage and show progress.

    Returns:
        The content of summary.json.

    Raises:
        InputError: An option is bad, or the folder contains another run.
    """
    if options.wandb:
        require_wandb()  # fail now, not when the policy's training starts
    if algorithm_options is None:
        algorithm_options = load_algorithm(options.algorithm).Config()
    with transformers_quiet():
        return _run(options, algorithm_options, Console(quiet=not progress))


def _run(options: JourneyOptions, algorithm_options: Any, console: Console) -> dict[str, Any]:
    begun = time.monotonic()
    # From here on the options name the function itself, so that the run folder records it. Where
    # people chose, nobody knows the utility that they chose by, unless the user names one.
    human = options.human if options.data is not None else simulated_human(options)
    options = dataclasses.replace(
        options,
        human=None if human is None else absolute_name(human),
        env_kwargs=with_absolute_files(options.env_kwargs),
    )
    keywords = env_keywords(options.env_kwargs, options.device)
    check_options(options, algorithm_options, keywords)
    chosen_by = options.human if options.data is None else options.data
    replaced = find_spec(options.env).kwargs.get("reward_model")
    if replaced is not None:
        console.print(
            f"{options.env} is registered with the reward {replaced}; this run pays the reward "
            f"model that it trains on the choices of {chosen_by}",
            highlight=False,
            soft_wrap=True,
        )
    # The first two stages use only this environment's prompts and reference. It pays a function,
    # because the reward model does not exist yet.
    utility = {**keywords, "reward_model": options.human or SIMULATED_HUMAN}
    env = make_env(options.env, 1, utility)
    # Make the evaluation's environment once, so that a bad keyword or too few prompts fail now and
    # not at the end.
    check_prompts(make_env(options.env, 1, utility, {"split": "held_out"}))
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
