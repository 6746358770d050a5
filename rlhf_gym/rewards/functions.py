"""Reward functions: their types, and how they are found and called."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rlhf_gym.errors import InputError
from rlhf_gym.rewards.ensemble import RewardEnsemble
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel

TextReward = Callable[[list[Any], list[str]], Sequence[float]]
"""A reward as a plain function: (prompts, responses), N each, to N finite numbers.

Responses are texts. A prompt is a text, or the list of its messages where it was a chat.
"""

Reward = RewardModel | RewardEnsemble | TextReward

Cut = Callable[[Responses], Responses]
"""A pure function of (x, y): the part of each response that is scored."""

Shaping = Callable[[Responses, Tensor], Tensor]
"""A pure function of (x, y): (responses, scores so far (N,)) to new scores (N,)."""

TokenReward = Callable[[Responses], Tensor]
"""A reward for each chosen token, (M,).

It may depend on the prompt, on the tokens up to its own, and for the last token on
`Responses.ended`; not on tokens after it, because `step` pays it before they exist.
"""

MOVED_MODULES = {
    "rlhf_gym.human": "rlhf_gym.rewards.human",
    "rlhf_gym.shaping": "rlhf_gym.rewards.shaping",
}
"""Former names of modules whose functions a user names, so `config.json` of a run may have them.

Environments store `reward_model`, `gold`, `cuts`, `shaping` and `token_rewards` as
"module:function", and `rlhf.py` stores `human`. No other module with such functions has moved.
"""


def judged_by(scorer: TextReward, responses: Responses) -> npt.NDArray[np.float64]:
    """The scores that a function of (prompts, responses) gives, (N,).

    Raises:
        InputError: It returned the wrong number of scores, or a NaN or infinity.
    """
    scores = called(scorer, responses)
    check_scores(reward_name(scorer), scores, responses)
    return scores


def called(scorer: TextReward, responses: Responses) -> npt.NDArray[np.float64]:
    """What a function of (prompts, responses) returns, as numbers that are not yet checked.

    An exception gets a note with the function's name and its first response.
    """
    try:
        return np.asarray(scorer(responses.asked, responses.texts), dtype=np.float64)
    except Exception as error:
        error.add_note(
            f"The reward {reward_name(scorer)} failed on {len(responses.texts)} responses; the "
            f"first is {responses.texts[0][:80]!r}."
        )
        raise


def check_scores(name: str, scores: npt.NDArray[np.floating[Any]], responses: Responses) -> None:
    """Refuse scores that are not one finite number for each response.

    A NaN would pass silently through advantages into every weight, so it is refused here, while the
    response that caused it is still known.

    Raises:
        InputError: There are too few or too many scores, or a NaN or infinity.
    """
    n = len(responses.sequences.tokens)
    if scores.shape != (n,):
        raise InputError(
            f"the reward {name} returned shape {scores.shape} for {n} responses; it must return "
            "one number for each"
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise InputError(
            f"the reward {name} returned {scores[bad[0]]} for response {bad[0]} of {n}: "
            f"{responses.texts[bad[0]][:80]!r}; it must be finite"
        )


def current_name(name: str) -> str:
    """The present name of a function that `MOVED_MODULES` has moved; other texts unchanged."""
    module, colon, attribute = name.partition(":")
    return f"{MOVED_MODULES.get(module, module)}:{attribute}" if colon else name


def load_callable(name: str) -> Callable[..., object]:
    """Resolve "package.module:function"; `MOVED_MODULES` may be named as they were.

    Raises:
        InputError: There is no such module or function.
    """
    module, _, attribute = current_name(name).partition(":")
    if not attribute:
        raise InputError(f"a callable is named 'package.module:function', not {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InputError(
            f"cannot import {name!r}: {error}; if it is your own file, run the command in its "
            "folder, or put that folder on the path: PYTHONPATH=. python …"
        ) from error
    except AttributeError as error:
        raise InputError(f"cannot import {name!r}: {error}") from error
    if not callable(found):
        raise InputError(f"{name!r} is not callable")
    return found  # type: ignore[no-any-return]


def reward_name(reward: Reward) -> str:
    """What messages call a reward: its models, or the function."""
    if isinstance(reward, RewardEnsemble):
        return " + ".join(map(reward_name, reward.members))
    if isinstance(reward, RewardModel):
        return repr(reward.model.name_or_path)
    return repr(getattr(reward, "__qualname__", type(reward).__name__))
