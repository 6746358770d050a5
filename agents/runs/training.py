"""A training: make the learner, check it, learn, save."""

import shutil
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import set_random_seed

from agents.doctor import Subject, examine
from agents.runs.algorithm import load_algorithm
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import whole_folder, write_json

DEFAULT_ALGORITHM = "ppo"


COUNTS = ("batch_size", "n_epochs", "n_minibatches", "n_steps", "n_waves")
"""Options of algorithms by which less than one of something would be asked for."""


def check_counts(algorithm_config: Any, **more: int) -> None:
    """Refuse counts below 1, which algorithms of other libraries trip over in their own ways.

    Args:
        algorithm_config: An algorithm's options.
        **more: Further counts.

    Raises:
        InputError: One is.
    """
    counts = {name: getattr(algorithm_config, name, 1) for name in COUNTS} | more
    for name, count in counts.items():
        if isinstance(count, int) and count < 1:
            raise InputError(f"{name} must be at least 1, not {count}")


def train(
    env: TokenVectorEnv,
    algorithm: str,
    algorithm_config: Any,
    *,
    total_tokens: int,
    run_dir: Path,
    seed: int,
    start: Path | None = None,
    goes_on: bool = False,
    wandb: bool = False,
) -> dict[str, float]:
    """Learn on `env` and write policy/, reference/ and policy.json; the figures of the latter.

    The policy starts as the reference, or as one that was saved to `start`; with `goes_on`, what is
    saved here will be such a start.
    """
    set_random_seed(seed)
    env.reset(seed=seed)
    learner = load_algorithm(algorithm).make(algorithm_config, env)
    if (goes_on or start is not None) and not hasattr(learner, "start_from"):
        raise InputError(
            f"the learner of {algorithm!r} has no start_from(directory), which --rounds needs; add "
            "it, or do one round"
        )
    if start is not None:
        learner.start_from(start)
    if isinstance(learner.policy, CausalLMPolicy):
        check(env, learner.policy, fresh=start is None)
    reference = env.objective.reference
    with whole_folder(run_dir / "reference") as folder:
        reference.save_pretrained(folder)
    label = f"{algorithm} on {len(env.prompts)} prompts"
    with TrainingRun(run_dir, total_tokens, label, wandb=wandb) as run:
        learner.learn(total_tokens, run)
        seconds = run.seconds
        tokens = run.tokens
    learner.save(run_dir / "policy")
    figures = {
        "episodes": env.episodes,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    write_json(run_dir / "policy.json", figures)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return figures


def check(env: TokenVectorEnv, policy: CausalLMPolicy, *, fresh: bool) -> None:
    """Examine both before hours are spent on them (see scripts/doctor.py).

    Raises:
        RuntimeError: Something that must hold does not.
    """
    problems = examine(Subject(env, policy, fresh=fresh))
    if problems:
        raise RuntimeError("not fit to train:\n" + "\n".join(map(str, problems)))
