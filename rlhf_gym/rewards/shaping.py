"""Common reward shaping as pure functions of (x, y), so that J* and `play` include it.

Each function here is a factory: it takes the reference and options, and returns a cut, a shaping or
a token reward. A cut chooses the part of a response that is scored; a shaping changes the score; a
token reward is paid after each token. Environments name them, as in
`shaping=[["length_penalty", {"coef": 0.01}]]`; a name without a module is looked up here.

Notation: N responses, M tokens in all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.rewards.callables import load_callable
from rlhf_gym.rewards.functions import Cut, Shaping, TokenReward
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel

Named = str | Sequence[Any]
"""A factory's name, or a list of the name and its options."""


def length_penalty(reference: CausalLM, coef: float, free: int = 0) -> Shaping:
    """Subtract `coef` for every token beyond the first `free`, the EOS included."""

    def shape(responses: Responses, scores: Tensor) -> Tensor:
        return scores - coef * (responses.sequences.lengths - free).clamp(min=0)

    return shape


def missing_eos(
    reference: CausalLM, *, score: float | None = None, penalty: float | None = None
) -> Shaping:
    """Replace the score of a response that did not end with an EOS, or subtract a penalty.

    Replacing it by −1 is the EOS trick of Huang et al. 2024 (arXiv 2403.17031).

    Raises:
        InputError: Not exactly one of the two is given.
    """
    if (score is None) == (penalty is None):
        raise InputError("missing_eos takes either a score (to replace) or a penalty (to subtract)")

    def shape(responses: Responses, scores: Tensor) -> Tensor:
        instead = scores - penalty if penalty is not None else torch.full_like(scores, score or 0.0)
        return torch.where(responses.stopped, scores, instead)

    return shape


def missing_token(reference: CausalLM, token: str, score: float) -> Shaping:
    """Replace the score of a response that does not end with this token (after a cut there).

    Ziegler et al. (2019) pay −1 if there is no full stop to cut at.
    """
    wanted = token_id(reference, token)

    def shape(responses: Responses, scores: Tensor) -> Tensor:
        return torch.where(_last(responses) == wanted, scores, torch.full_like(scores, score))

    return shape


def clip(reference: CausalLM, low: float = -float("inf"), high: float = float("inf")) -> Shaping:
    """Keep the score between two bounds."""
    if not low < high:
        raise InputError(f"clip needs low < high, not {low} and {high}")
    return lambda responses, scores: scores.clamp(low, high)


def repetition_penalty(reference: CausalLM, coef: float, n: int = 3) -> Shaping:
    """Subtract `coef` times the share of a response's token n-grams that occurred before in it."""

    def shape(responses: Responses, scores: Tensor) -> Tensor:
        shares = []
        tokens, starts, lengths = (part.tolist() for part in responses.sequences)
        for row, s, length in zip(tokens, starts, lengths, strict=True):
            grams = [tuple(row[i : i + n]) for i in range(s, s + length - n + 1)]
            shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        return scores - coef * torch.tensor(shares, device=scores.device)

    return shape


def stop_token(reference: CausalLM, token: str, after: int = 0) -> Cut:
    """Score a response up to and including the first `token` after its first `after` tokens.

    A response without that token stays whole. Ziegler et al. (2019) cut at the first full stop
    after token 16.
    """
    wanted = token_id(reference, token)

    def cut(responses: Responses) -> Responses:
        tokens, starts, lengths = responses.sequences
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        place = columns - starts[:, None]
        found = (tokens == wanted) & (place >= after) & (place < lengths[:, None])
        kept = torch.where(found.any(1), found.int().argmax(1) - starts + 1, lengths)
        return responses.cut(kept)

    return cut


def stop_strings(reference: CausalLM, strings: Sequence[str], included: bool = True) -> Cut:
    """Score a response up to the token that completes the first of these strings.

    Args:
        reference: The reference.
        strings: The stop strings.
        included: Whether the string is scored too. If not, the response is cut before the first
            token that has a part of it (one token remains if the string is at the very start).
    """
    if isinstance(strings, str) or not all(strings):
        raise InputError("stop_strings takes a list of non-empty strings")

    def cut(responses: Responses) -> Responses:
        kept = responses.sequences.lengths.clone()
        rows = zip(*(part.tolist() for part in responses.sequences), strict=True)
        for i, ((row, s, length), text) in enumerate(zip(rows, responses.texts, strict=True)):
            if any(string in text for string in strings):
                prompt = len(responses.prompts[i])
                wholes = reference.texts([row[: s + k] for k in range(1, length + 1)])
                heads = [whole[prompt:] for whole in wholes]
                kept[i] = 1 + next(
                    (k for k, head in enumerate(heads) if any(t in head for t in strings)),
                    length - 1,
                )
                if not included:
                    at = min(text.find(string) for string in strings if string in text)
                    kept[i] = max(1, sum(len(head) <= at for head in heads))
        return responses.cut(kept)

    return cut


def token_bonus(reference: CausalLM, bonus: Mapping[str, float]) -> TokenReward:
    """Pay this bonus each time one of these tokens is chosen."""
    table = torch.zeros(reference.vocab_size)
    for token, value in bonus.items():
        table[token_id(reference, token)] = value

    def reward(responses: Responses) -> Tensor:
        chosen = responses.sequences.chosen()
        return table.to(chosen.device)[chosen]

    return reward


def along_the_way(reward_model: RewardModel) -> TokenReward:
    """Potential-based dense reward: pay the change in the reward model's score after each token.

    The potential (Ng, Harada and Russell 1999) is 0 at the prompt and at the end. So these rewards
    sum to 0 over a response and J is unchanged, but the score's signal comes earlier.
    """

    def reward(responses: Responses) -> Tensor:
        sequences = responses.sequences
        potential = reward_model.scores_along(sequences)
        last = torch.cumsum(sequences.lengths, 0) - 1
        potential[last] = torch.where(responses.ended, 0.0, potential[last])
        before = potential.roll(1)
        before[last - sequences.lengths + 1] = 0.0
        return potential - before

    return reward


def make(kind: str, named: Sequence[Named], reference: CausalLM) -> list[Any]:
    """The functions that a list of names and options describes.

    Raises:
        InputError: An entry is neither a name nor a name with options, its function is of another
            kind, or the function does not take the options.
    """
    return [_make_one(kind, entry, reference) for entry in named]


def _make_one(kind: str, entry: Named, reference: CausalLM) -> Callable[..., Any]:
    parts: list[Any] = (
        [entry] if isinstance(entry, str) or not isinstance(entry, Sequence) else list(entry)
    )
    name, options = [*parts, {}][:2]
    if not isinstance(name, str) or not isinstance(options, Mapping) or len(parts) > 2:
        raise InputError(f"an entry of {kind} is a name or [name, {{options}}], not {entry!r}")
    factory = load_callable(name if ":" in name else f"{__name__}:{name}")
    kinds: dict[Any, str] = {Cut: "cuts", Shaping: "shaping", TokenReward: "token_rewards"}
    belongs = kinds.get(getattr(factory, "__annotations__", {}).get("return"), kind)
    if belongs != kind:
        raise InputError(f"{name} belongs in {belongs}, not in {kind}")
    try:
        return factory(reference, **options)  # type: ignore[return-value]
    except TypeError as error:
        raise InputError(f"{kind}: {name} does not take {dict(options)}: {error}") from error


def token_id(reference: CausalLM, token: str) -> int:
    """The id of one token, given by its name in the vocabulary or by its text.

    Raises:
        InputError: There is no such token, or the text is several tokens.
    """
    vocabulary = reference.tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    ids = list(reference.tokenizer(token, add_special_tokens=False)["input_ids"])
    # Text that the tokenizer does not know becomes <unk>, which decodes to something else.
    if len(ids) != 1 or reference.texts([ids])[0].strip() != token.strip():
        raise InputError(f"{token!r} is not one token of {reference.model.name_or_path!r}: {ids}")
    return int(ids[0])


def _last(responses: Responses) -> Tensor:
    tokens, starts, lengths = responses.sequences
    return tokens.gather(1, (starts + lengths - 1)[:, None])[:, 0]
