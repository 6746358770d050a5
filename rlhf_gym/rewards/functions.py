"""Reward functions: their types, and how they are called."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rlhf_gym.data.prompts import Prompt
from rlhf_gym.errors import InputError, RewardError
from rlhf_gym.rewards.callables import last_lines, load_callable
from rlhf_gym.rewards.ensemble import RewardEnsemble
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel

TextReward = Callable[..., Sequence[float]]
"""A reward as a plain function: (prompts, responses), N each, to N finite numbers.

Responses are texts. A prompt is a text, or the list of its messages where it was a chat. TRL's form
works too: a function with a parameter `completions` gets the responses there, and the prompts if it
takes `prompts`.
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


def load_reward(name: str) -> TextReward:
    """A reward function by name (see `load_callable`), after a look at its parameters.

    Raises:
        InputError: It cannot be imported, or needs other arguments than prompts and responses.
    """
    scorer = cast(TextReward, load_callable(name))
    _arguments(scorer, [], [])
    return scorer


def judged_by(scorer: TextReward, responses: Responses) -> npt.NDArray[np.float64]:
    """The scores that a function of (prompts, responses) gives, (N,).

    Raises:
        RewardError: It fails, or does not return one finite number for each response.
    """
    scores = called(scorer, responses)
    check_scores(reward_name(scorer), scores, responses)
    return scores


def called(scorer: TextReward, responses: Responses) -> npt.NDArray[np.float64]:
    """What a function of (prompts, responses) returns, (N,), not yet checked to be finite.

    Raises:
        RewardError: As in `scores_of`.
    """
    return scores_of(scorer, responses.asked, responses.texts)


def scores_of(
    scorer: TextReward, prompts: Sequence[Prompt], responses: list[str]
) -> npt.NDArray[np.float64]:
    """What a reward function returns for N prompts and responses, as N numbers.

    Raises:
        RewardError: It raises an exception, or does not return one number for each response.
    """
    positional, named = _arguments(scorer, prompts, responses)
    try:
        found = scorer(*positional, **named)
    except InputError:
        raise  # it says itself what to do
    except Exception as error:
        raise RewardError(
            f"the reward {reward_name(scorer)} failed on {len(responses)} responses, of which the "
            f"first is {_shown(responses)}: {last_lines(error, __file__)}"
        ) from error
    try:
        return _numbers(found, len(responses))
    except ValueError as error:
        raise RewardError(
            f"the reward {reward_name(scorer)} returned {error} for {len(responses)} responses, of "
            f"which the first is {_shown(responses)}; it must return a list of one number for each"
        ) from error


def _arguments(
    scorer: TextReward, prompts: Sequence[Prompt], responses: list[str]
) -> tuple[tuple[Sequence[Any], ...], dict[str, Sequence[Any]]]:
    """The arguments that a reward function takes, by position and by name.

    Raises:
        InputError: It needs others.
    """
    try:
        parameters = inspect.signature(scorer).parameters
    except (TypeError, ValueError):  # some functions of C have none
        return (prompts, responses), {}
    known: dict[str, Sequence[Any]] = {
        "prompts": prompts,
        "responses": responses,
        "completions": responses,
    }
    named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in named if p.default is p.empty]
    names = {p.name for p in named if p.kind is not p.POSITIONAL_ONLY}
    if {*needed} <= names & known.keys() and names & {"completions", "responses"}:
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            names.add("prompts")
        return (), {name: known[name] for name in names & known.keys()}
    # Other names, as in (_, responses), say nothing unless they contradict the order.
    if "completions" not in names and needed[:1] != ["responses"]:
        try:
            inspect.signature(scorer).bind(prompts, responses)
            return (prompts, responses), {}
        except TypeError:
            pass
    others = [name for name in needed if name not in known]
    raise InputError(
        f"the reward {reward_name(scorer)} takes ({', '.join(needed)}), but it is called with "
        "(prompts, responses), or by name with prompts and completions; give "
        f"{', '.join(others) or 'the others'} a default, or take them from the prompt"
    )


def _numbers(found: Any, n: int) -> npt.NDArray[np.float64]:
    """What a reward function returned, as (N,) float64.

    Raises:
        ValueError: It is something else; the message says what.
    """
    if found is None:
        raise ValueError("None (has it a `return`?)")
    if isinstance(found, Tensor):
        found = found.detach().cpu().double().numpy()
    if isinstance(found, list | tuple):
        parts = [x.detach().cpu().double().numpy() if isinstance(x, Tensor) else x for x in found]
        kept = np.asarray(parts, dtype=object)
    else:
        kept = np.asarray(found)
    if kept.ndim != 1:
        kind = f"a {type(found).__name__}: {str(found)[:40]}"
        raise ValueError(f"shape {kept.shape}" if kept.ndim else kind)
    if kept.shape != (n,):
        raise ValueError(f"{len(kept)} values")
    if kept.dtype.kind not in "biuf":
        kept = np.array([_number(value, i) for i, value in enumerate(kept)])
    return kept.astype(np.float64)


def _number(value: Any, place: int) -> float:
    if not isinstance(value, str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass
    raise ValueError(f"{str(value)[:40]!r} ({type(value).__name__}) for response {place}")


def _shown(responses: list[str]) -> str:
    return repr(responses[0][:80]) if responses else "not there"


def check_scores(name: str, scores: npt.NDArray[np.floating[Any]], responses: Responses) -> None:
    """Refuse scores that are not one finite number for each response.

    A NaN would pass silently through advantages into every weight, so it is refused here, while the
    response that caused it is still known.

    Raises:
        RewardError: There are too few or too many scores, or a NaN or infinity.
    """
    n = len(responses.sequences.tokens)
    if scores.shape != (n,):
        raise RewardError(
            f"the reward {name} returned shape {scores.shape} for {n} responses; it must return "
            "one number for each"
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise RewardError(
            f"the reward {name} returned {scores[bad[0]]} for response {bad[0]} of {n}: "
            f"{responses.texts[bad[0]][:80]!r}; it must be finite"
        )


def reward_name(reward: Reward) -> str:
    """What messages call a reward: its models, or the function."""
    if isinstance(reward, RewardEnsemble):
        return " + ".join(map(reward_name, reward.members))
    if isinstance(reward, RewardModel):
        return repr(reward.model.name_or_path)
    return repr(getattr(reward, "__qualname__", type(reward).__name__))
