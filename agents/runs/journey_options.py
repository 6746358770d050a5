"""Options of the whole journey, checked before hours are spent."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.runs.labelling import SIMULATED_HUMAN
from agents.runs.training import DEFAULT_ALGORITHM, check_counts
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.record import check_sizes


@dataclass(frozen=True)
class JourneyOptions:
    """Options of the whole journey."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id; Text-v0 takes any model and any prompts."""
    algorithm: str = DEFAULT_ALGORITHM
    """A module under `agents`, or a dotted path."""
    total_tokens: int = 180_000
    """Response tokens that the policy samples while it learns."""
    num_envs: int = 256
    """Rows of the environment."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …; values are parsed as JSON, else taken as text."""
    data: Path | None = None
    """Comparisons of your own; otherwise the simulated human chooses among fresh samples."""
    comparisons: int = 3072
    """Comparisons to collect, in all rounds together."""
    rounds: int = 1
    """Rounds of labelling; comparisons and tokens are spread over them evenly."""
    candidates: int = 4
    """Responses that the simulated human chooses among, K."""
    human: str = SIMULATED_HUMAN
    """The simulated human's utility of a response, as "package.module:function"; also the gold
    score that evaluation reports, and that no training sees."""
    human_temperature: float = 0.25
    """How far from always choosing the best the simulated human is."""
    reward_epochs: float = 1.0
    """Passes over the comparisons."""
    reward_learning_rate: float = 1e-3
    """Peak of the reward model's learning rate."""
    reward_batch_size: int = 16
    """Comparisons an update of the reward model."""
    episodes: int = 1920
    """Responses of the policy in the evaluation."""
    prompts: int = 32
    """Held-out prompts in the evaluation."""
    reference_samples: int = 256
    """Responses of the reference to each of them."""
    run_dir: Path = Path("runs/rlhf")
    """Folder to write to."""
    seed: int = 0
    """Seed of everything."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""
    wandb: bool = False
    """Log the policy's training to Weights & Biases too (the package wandb)."""


def check_options(
    options: JourneyOptions, algorithm_options: Any, keywords: dict[str, Any]
) -> None:
    """Raise an InputError for what would fail hours later."""
    taken = {"split", "reward_model", "gold"} & keywords.keys()
    if taken:
        raise InputError(
            f"{', '.join(sorted(taken))}: set by the stages themselves; --human names the gold "
            "scorer, and scripts/train_policy.py takes a reward model of yours"
        )
    check_counts(algorithm_options)
    if options.candidates < 2 or options.comparisons < 2 or options.total_tokens < 1:
        raise InputError("--candidates and --comparisons must be at least 2, --total-tokens 1")
    if options.rounds < 1 or (options.rounds > 1 and options.data is not None):
        raise InputError("--rounds must be at least 1; further rounds need the simulated human")
    if min(options.comparisons, options.total_tokens) < 2 * options.rounds:
        raise InputError("--comparisons and --total-tokens must be at least twice --rounds")
    check_sizes(options.episodes, options.prompts, options.reference_samples)
