"""Train one policy: make the learner, check it, learn, save."""

import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import set_random_seed

from agents.doctor import Subject, examine
from agents.runs.algorithm import Learner, load_algorithm
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.tracking.training_run import TrainingRun
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.utils.files import folder_or_temporary, whole_folder, write_json
from rlhf_gym.utils.progress import transformers_quiet
from rlhf_gym.utils.same_data import check_same_data, digest

DEFAULT_ALGORITHM = "ppo"


COUNTS = ("batch_size", "n_epochs", "n_minibatches", "n_steps", "n_waves")
"""Options of algorithms that count something, so that a value below 1 is an error."""


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        env: The environment it trained in.
        learner: The learner. It can continue to learn.
        figures: Episodes, tokens, seconds and tokens per second.
        metrics: The metrics of each update: the rows of metrics.csv.
    """

    env: TokenVectorEnv
    learner: Learner
    figures: dict[str, float]
    metrics: list[dict[str, float]]

    @cached_property
    def policy(self) -> CausalLM:
        """The trained policy as a language model with adapters merged, as `evaluate_policy` needs.

        Computed once, at the first access.
        """
        policy = self.learner.policy
        if isinstance(policy, CausalLMPolicy):
            policy.set_training_mode(False)
            return policy.plain()
        # All that another learner must be able to do is to save its policy, so save and load it.
        with tempfile.TemporaryDirectory() as folder, transformers_quiet():
            self.learner.save(Path(folder) / "policy")
            device = self.env.objective.reference.device
            return CausalLM.load(str(Path(folder) / "policy"), device=device)


def check_counts(algorithm_config: Any, **more: int) -> None:
    """Raise a clear error for counts below 1; libraries fail on them late and in various ways.

    Args:
        algorithm_config: An algorithm's options; those in `COUNTS` are checked.
        **more: Further counts, by name.

    Raises:
        InputError: A count is below 1.
    """
    counts = {name: getattr(algorithm_config, name, 1) for name in COUNTS} | more
    for name, count in counts.items():
        if isinstance(count, int) and count < 1:
            raise InputError(f"{name} must be at least 1, not {count}")


def train(
    env: TokenVectorEnv,
    algorithm: str = DEFAULT_ALGORITHM,
    algorithm_config: Any = None,
    *,
    total_tokens: int,
    run_dir: Path | str | None = None,
    seed: int = 0,
    start: Path | None = None,
    goes_on: bool = False,
    resume: bool = False,
    wandb: bool = False,
    progress: bool = True,
) -> Trained:
    """Train a policy on an environment.

    Args:
        env: The environment. It determines the prompts, the reward and the number of rows.
        algorithm: A module under `agents`, or a dotted path.
        algorithm_config: Its options, an instance of the module's `Config`; None takes the
            defaults.
        total_tokens: Approximate number of response tokens to sample.
        run_dir: Folder for policy/, reference/, policy.json (the figures), metrics.csv,
            training_samples.jsonl, tensorboard/ and, until the training is done, checkpoints/. None
            keeps nothing on disk.
        seed: Seed of all randomness. Python's, NumPy's and torch's global generators are seeded
            too.
        start: Folder of a saved policy to start from; None starts from the reference.
        goes_on: Whether a later training will start from this policy. If so, a learner without
            `start_from` is refused now.
        resume: Whether to continue from the last checkpoint in `run_dir`, if there is one.
        wandb: Whether to log to Weights & Biases too.
        progress: Whether to show progress on stderr.

    Returns:
        The learner with its figures and metrics; `Trained.policy` is the language model.

    Raises:
        InputError: The algorithm, one of its options or the environment is bad, or `run_dir` has
            the checkpoints of a stopped run and `resume` is False.
        RuntimeError: The environment or the policy fails one of the doctor's checks.
    """
    if not isinstance(env, TokenVectorEnv):
        raise InputError(f"{env} is not a TokenVectorEnv; train on one without wrappers")
    module = load_algorithm(algorithm)
    options = module.Config() if algorithm_config is None else algorithm_config
    check_counts(options, total_tokens=total_tokens)
    if run_dir is not None and not resume and any(Path(run_dir).glob("checkpoints/tokens_*")):
        raise InputError(
            f"{run_dir} has the checkpoints of a stopped run: pass resume=True to continue it, or "
            "another run_dir"
        )
    set_random_seed(seed)
    env.reset(seed=seed)
    played = env.episodes
    with transformers_quiet(), folder_or_temporary(run_dir) as folder:
        learner = module.make(options, env)
        _start(learner, algorithm, start, goes_on)
        if isinstance(learner.policy, CausalLMPolicy):
            check(env, learner.policy, fresh=start is None)
        if run_dir is not None:
            goes_on_here = any(folder.glob("checkpoints/tokens_*"))
            check_same_data(folder, goes_on=goes_on_here, prompts=digest(env.prompts.ids))
            with whole_folder(folder / "reference") as partial:
                env.objective.reference.save_pretrained(partial)
        label = f"{algorithm} on {len(env.prompts)} prompts"
        with TrainingRun(folder, total_tokens, label, wandb=wandb, progress=progress) as run:
            learner.learn(total_tokens, run)
            seconds = run.seconds
            tokens = run.tokens
        figures = {
            "episodes": env.episodes - played,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        if run_dir is not None:
            learner.save(folder / "policy")
            write_json(folder / "policy.json", {**figures, "prompts": env.prompts.counts})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Trained(env, learner, figures, run.metrics)


def _start(learner: Learner, algorithm: str, start: Path | None, goes_on: bool) -> None:
    """Load the policy to start from, if there is one; check first that the learner can do so."""
    if (goes_on or start is not None) and not hasattr(learner, "start_from"):
        raise InputError(
            f"the learner of {algorithm!r} has no start_from(directory), which --rounds needs; "
            "implement it, or set --rounds 1"
        )
    if start is not None:
        learner.start_from(start)


def check(env: TokenVectorEnv, policy: CausalLMPolicy, *, fresh: bool) -> None:
    """Run the doctor's checks before hours of training (see scripts/doctor.py).

    Args:
        env: The environment to train in.
        policy: The learner's policy.
        fresh: Whether the policy must equal the reference, as it does before it has learned.

    Raises:
        RuntimeError: A check fails. The message lists all problems and their fixes.
    """
    problems = examine(Subject(env, policy, fresh=fresh))
    if problems:
        raise RuntimeError("not fit to train:\n" + "\n".join(map(str, problems)))
