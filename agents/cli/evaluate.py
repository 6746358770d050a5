"""`python scripts/evaluate.py --policy DIR --env ID --episodes N` measures a policy.

On held-out prompts, next to its reference: score, gold, exact KL, the objective J, optimality,
perplexity under the reference, distinct n-grams, length, ends and win rates, each with a standard
error; samples side by side. Without --env the environment is that of the run folder around DIR.
Writes evaluation.json, samples.jsonl and evaluation_config.json, which says what was evaluated,
into the run folder, which may be that of the training; one that holds another evaluation is
refused.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from agents.cli.command import device, run
from agents.cli.run_folder import environment_of, saved_policy
from agents.runs.setup import listed, make_env, other_options, parse_values
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.record import check_sizes, evaluate_policy
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.reports.terminal import table
from rlhf_gym.utils.files import write_json

OPTIONS = "evaluation_config.json"
"""What evaluation.json is of."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    policy: str
    """The policy: a folder that from_pretrained can load, a run folder, or a hub name."""
    env: str | None = None
    """Environment id; if not given, that of the run folder around the policy."""
    episodes: int = 2304
    """Responses of the policy in all."""
    prompts: int = 48
    """Held-out prompts that they are spread over."""
    reference_samples: int = 128
    """Responses of the reference to each prompt; they carry the estimate of J*."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; `split` is held_out unless given. Without
    --env the run's keywords apply too, and its reward model."""
    run_dir: Path = Path("runs/evaluation")
    """Folder to write to."""
    seed: int = 0
    """Seed of prompts and responses."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""


def main(config: Config) -> dict[str, Any]:
    """Make the environment, measure the policy, and print the figures; the figures."""
    check_sizes(config.episodes, config.prompts, config.reference_samples)
    config = with_environment(config)
    assert config.env is not None
    check_same_evaluation(config)
    keywords = {"split": "held_out", **parse_values(config.env_kwargs)}
    env = make_env(config.env, 1, {"device": device(config.device), **keywords})
    policy = CausalLM.load(config.policy, device=env.objective.reference.device)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    # First, so that figures are never there without what they are of.
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
    """The options with the policy and the environment that a run folder stands for.

    Raises:
        InputError: No environment is given, and the policy is in no run folder that has one.
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
    """Raise an InputError if the folder holds the figures of another evaluation."""
    figures, options = config.run_dir / "evaluation.json", config.run_dir / OPTIONS
    if not figures.exists():
        return
    if not options.exists():
        raise InputError(f"{figures} is another script's; give another --run-dir")
    if other := other_options(options, asdict(config)):
        raise InputError(
            f"{figures} is of an evaluation with {listed(other)}; give another --run-dir"
        )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog, kept_as=OPTIONS)
