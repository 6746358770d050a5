"""`python scripts/train_policy.py --env ID --algorithm NAME --total-tokens N` trains a policy.

The environment can be any registered one. NAME is a module under `agents`, such as ppo, sb3_ppo or
sb3_a2c, or the dotted path of your own. Each algorithm has its own options, and --help together
with --algorithm NAME lists them after the common ones.

Writes policy/ (for transformers' from_pretrained), reference/, metrics.csv, training_samples.jsonl,
tensorboard/ and checkpoints/ into the run folder. --resume continues a stopped run from its last
checkpoint. Only ppo and the algorithms built on its rollout write checkpoints; the others restart
from scratch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from agents.cli.command import command_line, results_and_next, run
from agents.runs.setup import (
    begin_run,
    check_same_run,
    env_keywords,
    make_env,
    with_absolute_files,
)
from agents.runs.training import DEFAULT_ALGORITHM, check_counts, train
from agents.tracking.wandb import require_wandb


@dataclass(frozen=True)
class Config:
    """Options that all algorithms share."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id. For a task of your own give the module that registers it too,
    my_module:mine/Task-v0; the module may be a file in the current folder."""
    algorithm: str = DEFAULT_ALGORITHM
    """Algorithm: a module under `agents`, or the dotted path of your own."""
    total_tokens: int = 260_000
    """Response tokens to sample over the whole training, at least 1. The training may end a little
    above it, because each update is completed."""
    num_envs: int = 256
    """Environments that run in parallel, at least 1. ppo plays one episode in each of them per
    wave."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE … Values are parsed as JSON, else taken as text;
    --env-kwargs help lists the keywords."""
    run_dir: Path = Path("runs/policy")
    """Folder for the results."""
    seed: int = 0
    """Seed of all randomness in the run."""
    device: str = "auto"
    """Where to train: auto (the device registered with the environment, else the GPU if there is
    one, else the CPU), cpu or cuda."""
    resume: bool = False
    """Continue from the last checkpoint in the run folder. Without a checkpoint, the training
    starts from scratch."""
    wandb: bool = False
    """Also log to Weights & Biases. Needs the package wandb."""


def main(config: Config) -> None:
    """Make the environment and the learner, train, and save the policy."""
    if config.wandb:
        require_wandb()
    config = dataclasses.replace(config, env_kwargs=with_absolute_files(config.env_kwargs))
    algorithm_config = config.algorithm_options  # type: ignore[attr-defined]
    check_counts(algorithm_config, total_tokens=config.total_tokens)
    done = (config.run_dir / "policy.json").exists()
    plain = dataclasses.asdict(config)
    check_same_run(config.run_dir, plain, resume=config.resume or done)
    if done:
        print(f"{config.run_dir}/policy.json already exists: nothing to do")
        return
    env = make_env(config.env, config.num_envs, env_keywords(config.env_kwargs, config.device))
    begin_run(config.run_dir, plain)
    if config.resume and not any((config.run_dir / "checkpoints").glob("tokens_*")):
        print(f"no checkpoint in {config.run_dir}: training starts from scratch")
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
    """Return the lines that say where the results are and how to evaluate the policy."""
    return results_and_next(
        f"{config.run_dir} (the policy is in {config.run_dir / 'policy'})",
        command_line("evaluate", "--policy", config.run_dir, "--run-dir", config.run_dir),
        command_line("report", "--run-dir", config.run_dir),
    )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog, with_algorithm=True, then=next_steps)
