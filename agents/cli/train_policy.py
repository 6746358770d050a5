"""`python scripts/train_policy.py --env ID --algorithm NAME --total-tokens N` trains a policy.

Any registered environment, any algorithm: NAME is a module under `agents` (ppo, sb3_ppo, sb3_a2c)
or the dotted path of your own; its options follow the common ones, so ask for --help together with
--algorithm. Writes policy/ (for transformers' from_pretrained), reference/, metrics.csv,
training_samples.jsonl, tensorboard/ and checkpoints/ into the run folder; with --resume a stopped
run of ppo, or of an algorithm over its rollout, goes on; others have no checkpoints and begin anew.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from agents.cli.command import command_line, device, results_and_next, run
from agents.runs.setup import begin_run, check_same_run, make_env, parse_values
from agents.runs.training import DEFAULT_ALGORITHM, check_counts, train
from agents.tracking.wandb import require_wandb


@dataclass(frozen=True)
class Config:
    """Options that all algorithms share."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id."""
    algorithm: str = DEFAULT_ALGORITHM
    """A module under `agents`, or a dotted path."""
    total_tokens: int = 260_000
    """Response tokens to sample in all."""
    num_envs: int = 256
    """Rows of the environment; ppo plays one episode in each a wave."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; values are parsed as JSON, else taken as text."""
    run_dir: Path = Path("runs/policy")
    """Folder to write to."""
    seed: int = 0
    """Seed of everything."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda."""
    resume: bool = False
    """Go on from the run folder's last checkpoint, if there is one."""
    wandb: bool = False
    """Log to Weights & Biases too (the package wandb)."""


def main(config: Config) -> None:
    """Make environment and learner, learn, save."""
    if config.wandb:
        require_wandb()
    algorithm_config = config.algorithm_options  # type: ignore[attr-defined]
    check_counts(algorithm_config, total_tokens=config.total_tokens)
    done = (config.run_dir / "policy.json").exists()
    plain = dataclasses.asdict(config)
    check_same_run(config.run_dir, plain, resume=config.resume or done)
    if done:
        print(f"{config.run_dir}/policy.json is there already: nothing to do")
        return
    env = make_env(
        config.env,
        config.num_envs,
        {"device": device(config.device), **parse_values(config.env_kwargs)},
    )
    begin_run(config.run_dir, plain)
    if config.resume and not any((config.run_dir / "checkpoints").glob("tokens_*")):
        print(f"no checkpoint in {config.run_dir}: training begins anew")
    train(
        env,
        config.algorithm,
        algorithm_config,
        total_tokens=config.total_tokens,
        run_dir=config.run_dir,
        seed=config.seed,
        resume=config.resume,
        wandb=config.wandb,
    )


def next_steps(config: Config) -> str:
    """Where the results are, and how to measure and read them."""
    return results_and_next(
        f"{config.run_dir} (the policy is in {config.run_dir / 'policy'})",
        command_line("evaluate", "--policy", config.run_dir, "--run-dir", config.run_dir),
        command_line("report", "--run-dir", config.run_dir),
    )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog, with_algorithm=True, then=next_steps)
