"""The environment that a policy was trained in, from its run folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import read_json

OF_TRAINING = ("split", "rows_per_prompt", "device")
"""Keywords that say how a run trained, and not what it trained for."""


@dataclass(frozen=True)
class TrainedIn:
    """What a policy was trained in.

    Attributes:
        file: Where this is recorded.
        env: Environment id.
        env_kwargs: Its keywords, as on the command line; none of `OF_TRAINING`.
    """

    file: Path
    env: str
    env_kwargs: dict[str, str]


def saved_policy(policy: str) -> str:
    """The folder `policy/` of a run folder; any other folder, and a hub name, as it is."""
    inside = Path(policy) / "policy"
    return str(inside) if (inside / "config.json").exists() else policy


def environment_of(policy: str) -> TrainedIn:
    """The environment of the run that made a policy.

    A run of the whole journey (agents/cli/rlhf.py) trains against its own reward model, with the
    simulated human as the gold scorer; neither is among the options of the environment.

    Args:
        policy: The policy's folder, or the run folder around it.

    Raises:
        InputError: There is no run folder, or its run had no environment.
    """
    folder = Path(saved_policy(policy)).parent
    # Earlier rounds of labelling are in rounds/1, rounds/2 …; the options are those of the run.
    is_round = Path(os.path.abspath(folder)).parent.name == "rounds"
    file = (folder / ".." / ".." if is_round else folder) / "config.json"
    missing = f"{policy} does not say what environment it was trained in; give --env ID"
    if not file.exists():
        raise InputError(f"{missing} (there is no {file})")
    options = read_json(file)
    if not isinstance(options, dict) or not isinstance(options.get("env"), str):
        raise InputError(f"{missing} ({file} names none)")
    keywords = {k: v for k, v in options.get("env_kwargs", {}).items() if k not in OF_TRAINING}
    if "human" in options:
        keywords |= {"reward_model": str(folder / "reward_model"), "gold": options["human"]}
    return TrainedIn(file, options["env"], keywords)
