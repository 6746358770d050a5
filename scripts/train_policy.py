"""`python scripts/train_policy.py --env ID --algorithm NAME --total-tokens N` trains a policy.

Any registered environment, any algorithm: NAME is a module under `agents` (ppo, sb3_ppo, sb3_a2c)
or the dotted path of your own; its options follow the common ones, so ask for --help together with
--algorithm. Writes policy/ (for transformers' from_pretrained), reference/, metrics.csv,
training_samples.jsonl, tensorboard/ and checkpoints/ into the run folder; with --resume a stopped
run of ppo, or of an algorithm over its rollout, goes on; others have no checkpoints and begin anew.
"""

import dataclasses
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from common import begin_run, check_same_run, device, make_env, parse_values, status
from stable_baselines3.common.utils import set_random_seed

from agents.algorithm import load_algorithm
from agents.doctor import Patient, examine
from agents.sb3.policy import CausalLMPolicy
from agents.training_run import TrainingRun
from agents.wandb_run import require_wandb
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.files import whole_folder, write_json

DEFAULT_ALGORITHM = "ppo"

COUNTS = ("batch_size", "n_epochs", "n_minibatches", "n_steps", "n_waves")
"""Options of algorithms by which less than one of something would be asked for."""


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
        wandb=config.wandb,
    )


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
    problems = examine(Patient(env, policy, fresh=fresh))
    if problems:
        raise RuntimeError("not fit to train:\n" + "\n".join(map(str, problems)))


def parse(config_class: type[Any], doc: str | None) -> Any:
    """Parse the command line in two steps: first the algorithm, then its own options with it."""
    arguments = sys.argv[1:]
    name = DEFAULT_ALGORITHM
    for i, argument in enumerate(arguments):
        if argument == "--algorithm" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--algorithm="):
            name = argument.split("=", 1)[1]
    options = load_algorithm(name).Config
    whole = dataclasses.make_dataclass(
        "Options",
        [("algorithm_options", tyro.conf.OmitArgPrefixes[options], field(default_factory=options))],
        bases=(config_class,),
        frozen=True,
    )
    return tyro.cli(whole, description=doc)


def parse_and_run(main: Any, config_class: type[Any], doc: str | None) -> None:
    """`common.run` for scripts whose options depend on the algorithm; never returns."""
    try:
        config = parse(config_class, doc)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status(main, config))


if __name__ == "__main__":
    parse_and_run(main, Config, __doc__)
