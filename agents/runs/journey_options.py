"""Options of a run of all of RLHF, and their checks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agents.runs.labelling import SIMULATED_HUMAN
from agents.runs.training import DEFAULT_ALGORITHM, check_counts
from rlhf_gym.errors import InputError
from rlhf_gym.evaluation.record import check_sizes
from rlhf_gym.rewards.callables import is_callable_name
from rlhf_gym.tasks.registered import find_spec


@dataclass(frozen=True)
class JourneyOptions:
    """Options of a run of all of RLHF."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id. rlhf_gym/Text-v0 takes any model and any prompts. For a task of your own give
    the module that registers it too, my_module:mine/Task-v0; the module may be a file in the
    current folder."""
    algorithm: str = DEFAULT_ALGORITHM
    """Algorithm that trains the policy: a module under `agents`, or the dotted path of your own."""
    total_tokens: int = 180_000
    """Response tokens that the policy samples in training, over all rounds; at least 2 per
    round."""
    num_envs: int = 256
    """Environments that run in parallel in the policy's training, at least 1."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE … Values are parsed as JSON, else taken as text;
    --env-kwargs help lists the keywords. Training uses `split` train and evaluation held_out,
    unless it is given here or registered with the id."""
    data: str | None = None
    """Your own comparisons: a file, a pattern of files, a folder, or the name of a dataset. None
    lets the simulated human choose among samples of the reference."""
    data_split: str = "train"
    """Split to read from a folder or a dataset of --data. Ignored for a file."""
    format: str | None = None
    """Format of --data, a key of `FORMATS` in rlhf_gym/preferences/known_formats.py. None
    recognises each row by its keys."""
    columns: tuple[str, ...] = ()
    """Which column of --data is what, in place of a format, as in `prompt=question chosen=answer_a
    rejected=answer_b`. See docs/reward-models.md for all words."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row of --data that is not a comparison: stop (error), or print the problem
    and leave out the row, or only its bad candidate (skip)."""
    comparisons: int = 3072
    """Comparisons to collect over all rounds, at least 2 per round. Not used with --data."""
    rounds: int = 1
    """Rounds of labelling, reward model and policy training, at least 1. Comparisons and tokens are
    divided evenly among them. More than 1 cannot be combined with --data."""
    candidates: int = 4
    """Responses per comparison, from which the simulated human chooses one; at least 2."""
    human: str | None = None
    """Function that returns the simulated human's utility of each response,
    "package.module:function". It is also the gold score in the evaluation; the policy is never
    trained on it. With --data there is no gold score unless you name it. None takes the `gold`
    function registered with the environment's id, else a `reward_model` registered there that is a
    function, else rlhf_gym.rewards.human:compound."""
    human_temperature: float = 0.25
    """Temperature of the simulated human's choices, at least 0: P(choice) ∝ exp(utility /
    temperature). 0 always chooses the best response."""
    reward_epochs: float = 1.0
    """Passes over the comparisons in the reward model's training, above 0."""
    reward_learning_rate: float = 1e-3
    """Peak of the reward model's learning rate, above 0."""
    reward_batch_size: int = 16
    """Comparisons per update of the reward model, at least 1."""
    episodes: int = 1920
    """Responses of the policy in the evaluation, over all prompts; at least one per prompt."""
    prompts: int = 32
    """Held-out prompts in the evaluation, at least 2. If the environment has fewer, all are
    used."""
    reference_samples: int = 256
    """Responses of the reference to each of these prompts, at least 1. They determine how precise
    the estimate of the optimum J* is."""
    run_dir: Path = Path("runs/rlhf")
    """Folder for the results."""
    seed: int = 0
    """Seed of all randomness in the run."""
    device: str = "auto"
    """Where to run: auto (the device registered with the environment, else the GPU if there is
    one, else the CPU), cpu or cuda."""
    wandb: bool = False
    """Also log the policy's training to Weights & Biases. Needs the package wandb."""


def simulated_human(options: JourneyOptions) -> str:
    """Return the name of the function that chooses, see `JourneyOptions.human`."""
    if options.human is not None:
        return options.human
    registered = find_spec(options.env).kwargs
    gold, reward = registered.get("gold"), registered.get("reward_model")
    if isinstance(gold, str):
        return gold
    if isinstance(reward, str) and is_callable_name(reward):
        return reward
    return SIMULATED_HUMAN


def check_options(
    options: JourneyOptions, algorithm_options: Any, keywords: dict[str, Any]
) -> None:
    """Raise an InputError now for an option that would fail hours later."""
    taken = {"reward_model", "gold"} & keywords.keys()
    if taken:
        raise InputError(
            f"{', '.join(sorted(taken))}: the stages set this keyword; --human chooses the gold "
            "scorer, and scripts/train_policy.py accepts your own reward model"
        )
    check_counts(algorithm_options)
    if options.data is None and (options.format or options.columns):
        raise InputError("--format and --columns describe --data; give that too")
    if options.candidates < 2 or options.comparisons < 2 or options.total_tokens < 1:
        raise InputError(
            "--candidates and --comparisons must be at least 2, --total-tokens at least 1"
        )
    if options.rounds < 1 or (options.rounds > 1 and options.data is not None):
        raise InputError(
            "--rounds must be at least 1; with --data it must be 1, because further rounds need "
            "the simulated human"
        )
    if min(options.comparisons, options.total_tokens) < 2 * options.rounds:
        raise InputError("--comparisons and --total-tokens must be at least twice --rounds")
    check_sizes(options.episodes, options.prompts, options.reference_samples)
