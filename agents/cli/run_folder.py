"""The environment that a policy was trained in, from its run folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import read_json

OF_TRAINING = ("split", "rows_per_prompt", "device")
"""Keywords of how a run was trained. They do not define its task, so evaluation ignores them."""


@dataclass(frozen=True)
class TrainedIn:
    """The environment that a policy was trained in.

    Attributes:
        file: The file that records it.
        env: Environment id.
        env_kwargs: Its keywords, as on the command line, without those in `OF_TRAINING`.
    """

    file: Path
    env: str
    env_kwargs: dict[str, str]


def saved_policy(policy: str) -> str:
    """Return the folder `policy/` of a run folder. Other folders and hub names stay as they are."""
    inside = Path(policy) / "policy"
    return str(inside) if (inside / "config.json").exists() else policy


def environment_of(policy: str) -> TrainedIn:
    """Find the environment that a policy was trained in.

    A run of agents/cli/rlhf.py trains against its own reward model and uses the simulated human as
    the gold scorer. Neither is in its environment keywords, so both are added here.

    Args:
        policy: The policy's folder, or the run folder that contains it.

    Raises:
        InputError: There is no run folder, or it records no environment.
    """
    folder = Path(saved_policy(policy)).parent
    # Earlier rounds are in rounds/1, rounds/2 … of the run folder, which has the only config.json.
    is_round = Path(os.path.abspath(folder)).parent.name == "rounds"
    file = (folder / ".." / ".." if is_round else folder) / "config.json"
    missing = f"cannot tell what environment {policy} was trained in; give --env ID"
    if not file.exists():
        raise InputError(f"{missing} (there is no {file})")
    options = read_json(file)
    if not isinstance(options, dict) or not isinstance(options.get("env"), str):
        raise InputError(f"{missing} ({file} names none)")
    keywords = {k: v for k, v in options.get("env_kwargs", {}).items() if k not in OF_TRAINING}
    if "human" in options:
        keywords |= {"reward_model": str(folder / "reward_model"), "gold": options["human"]}
    return TrainedIn(file, options["env"], keywords)
