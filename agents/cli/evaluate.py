"""`python scripts/evaluate.py --policy DIR --env ID --episodes N` measures a policy.

It compares the policy with its reference on held-out prompts: score, gold score, exact KL, the
objective J, optimality, perplexity under the reference, distinct n-grams, length, how responses
end, and win rates. Every figure has a standard error. Without --env, the environment is read from
the run folder that contains DIR.

Writes evaluation.json, samples.jsonl (responses of both, side by side) and evaluation_config.json
(the options) into --run-dir. That may be the training's own folder, but not a folder with another
evaluation.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from agents.cli.command import run
from agents.cli.run_folder import environment_of, saved_policy
from agents.runs.setup import (
    env_keywords,
    listed,
    make_env,
    other_options,
    with_absolute_files,
)
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.record import check_sizes, evaluate_policy
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.reports.terminal import table
from rlhf_gym.utils.files import check_folder, write_json

OPTIONS = "evaluation_config.json"
"""File in the run folder with the options that produced evaluation.json."""


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    policy: str
    """The policy: a run folder, a folder that from_pretrained can load, or a hub name."""
    env: str | None = None
    """Environment id. None takes the environment that the policy was trained in, from its run
    folder. For a task of your own give the module that registers it too, my_module:mine/Task-v0;
    the module may be a file in the current folder."""
    episodes: int = 2304
    """Responses of the policy over all prompts, at least one per prompt. Each prompt gets
    episodes / prompts of them, rounded down."""
    prompts: int = 48
    """Held-out prompts to evaluate on, at least 2. If the environment has fewer, all are used."""
    reference_samples: int = 128
    """Responses of the reference to each prompt, at least 1. They determine how precise the
    estimate of J* is."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE … Values are parsed as JSON, else taken as text;
    --env-kwargs help lists the keywords. `split` is held_out unless it is given or
    registered with the id. Without --env, the training run's keywords and reward model are used
    too."""
    run_dir: Path = Path("runs/evaluation")
    """Folder for the results."""
    seed: int = 0
    """Seed of the choice of prompts and of the responses."""
    device: str = "auto"
    """Where to run: auto (the device registered with the environment, else the GPU if there is
    one, else the CPU), cpu or cuda."""


def main(config: Config) -> dict[str, Any]:
    """Make the environment, measure the policy, print the figures and return them."""
    check_sizes(config.episodes, config.prompts, config.reference_samples)
    config = replace(config, env_kwargs=with_absolute_files(config.env_kwargs))
    config = with_environment(config)
    assert config.env is not None
    check_same_evaluation(config)
    keywords = env_keywords(config.env_kwargs, config.device)
    env = make_env(config.env, 1, keywords, {"split": "held_out"})
    policy = CausalLM.load(config.policy, device=env.objective.reference.device)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    # Write the options first, so that figures never exist without the options behind them.
    write_json(config.run_dir / OPTIONS, asdict(config))
    figures = evaluate_policy(
        policy,
        env,
        episodes=config.episodes,
        prompts=config.prompts,
        reference_samples=config.reference_samples,
        seed=config.seed,
        run_dir=config.run_dir,
    )
    Console().print(table(figures))
    return figures


def with_environment(config: Config) -> Config:
    """Replace a run folder by its policy, and fill in the run's environment if none is given.

    Raises:
        InputError: No environment is given, and no run folder around the policy records one.
    """
    policy = saved_policy(config.policy)
    if config.env is not None:
        return replace(config, policy=policy)
    run = environment_of(config.policy)
    keywords = {**run.env_kwargs, **config.env_kwargs}
    said = " ".join([f"--env {run.env}", *(f"{k} {v}" for k, v in keywords.items())])
    print(f"environment of {run.file}: {said}")
    return replace(config, policy=policy, env=run.env, env_kwargs=keywords)


def check_same_evaluation(config: Config) -> None:
    """Raise an InputError if the folder contains another evaluation."""
    check_folder(config.run_dir)
    figures, options = config.run_dir / "evaluation.json", config.run_dir / OPTIONS
    if not figures.exists():
        return
    if not options.exists():
        raise InputError(f"{figures} was written by another script; give another --run-dir")
    if other := other_options(options, asdict(config)):
        raise InputError(
            f"{figures} is from an evaluation with {listed(other)}; give another --run-dir"
        )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog, kept_as=OPTIONS)
