"""Comparisons as token ids, and how many of them fit a model's context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_gym.data.encoding import Encoded
from rlhf_gym.data.endings import closed
from rlhf_gym.data.prompts import is_held_out
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import context_length, embedded
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.likelihood import Choice
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.tokens import pad_rows

TooLong = Literal["drop", "cut_turns"]


@dataclass(frozen=True)
class EncodedComparison:
    """A comparison as token ids.

    Attributes:
        prompt: Ids of the prompt.
        candidates: Ids of each of K candidates.
        choices: What its label consists of (see `rlhf_gym.preferences.likelihood`).
        comparison: The comparison that was encoded, cut if it had to be.
    """

    prompt: list[int]
    candidates: list[list[int]]
    choices: list[Choice]
    comparison: Comparison

    @property
    def width(self) -> int:
        """Tokens of the prompt and the longest candidate."""
        return len(self.prompt) + max(map(len, self.candidates))

    @property
    def rows(self) -> list[list[int]]:
        """Ids of prompt and candidate, for each candidate."""
        return [[*self.prompt, *candidate] for candidate in self.candidates]


@dataclass
class Fit:
    """How many comparisons fitted a model's context, and how.

    Attributes:
        whole: Fitted as they are.
        cut: Fitted after turns at the front of their dialogue were removed.
        dropped: Did not fit at all.
        retokenised: Had token ids of another tokenizer, so their text was tokenised instead.
    """

    whole: int = 0
    cut: int = 0
    dropped: int = 0
    retokenised: int = 0

    def __str__(self) -> str:
        fitted = f"{self.whole} whole, {self.cut} cut by turns, {self.dropped} dropped as too long"
        return f"{fitted}, {self.retokenised} re-tokenised" if self.retokenised else fitted

    def __add__(self, other: "Fit") -> "Fit":
        return Fit(
            self.whole + other.whole,
            self.cut + other.cut,
            self.dropped + other.dropped,
            self.retokenised + other.retokenised,
        )


def encode_comparisons(
    comparisons: Sequence[Comparison],
    model: RewardModel,
    max_tokens: int | None,
    *,
    too_long: TooLong = "drop",
    soft_temperature: float | None = None,
    unfinished: float = 0.0,
) -> tuple[list[EncodedComparison], Fit]:
    """Tokenise comparisons as the reward model reads them; drop or cut those above `max_tokens`.

    Args:
        comparisons: N comparisons.
        model: The reward model.
        max_tokens: Longest prompt + candidate, at most the model's context; None for no limit.
        too_long: "drop", or "cut_turns": remove whole turns from the front of the dialogue until
            the longest candidate fits. All candidates keep the same prompt. A dialogue of one turn
            is dropped.
        soft_temperature: As in `Comparison.choices`.
        unfinished: Share of the candidates that are text to read without their end, as if a budget
            had cut them. A hash of the candidate decides. A reward model that never saw an answer
            without its end may give it any score.

    Returns:
        The encoded comparisons, and the counts.

    Raises:
        InputError: None is left, `max_tokens` is above the model's context, or the tokenizer has
            ids that the model cannot embed.
    """
    context = context_length(model.model)
    if max_tokens and context and max_tokens > context:
        raise InputError(
            f"max_tokens is {max_tokens}, but the model {model.model.name_or_path!r} has a context "
            f"of {context} tokens; give at most that"
        )
    encoded: list[EncodedComparison] = []
    fit = Fit()
    vocab = embedded(model.model)
    for i, comparison in enumerate(comparisons, 1):
        one: Comparison | None = comparison
        own = comparison.with_own_ids(model.tokenizer, vocab)
        if own is not comparison:
            one = comparison = own
            fit.retokenised += 1
        while one is not None:
            prompt, candidates = _ids(one, model, unfinished)
            if not max_tokens or len(prompt) + max(map(len, candidates)) <= max_tokens:
                break
            one = one.shortened() if too_long == "cut_turns" else None
        if one is None:
            fit.dropped += 1
            continue
        highest = max(max(row, default=0) for row in [prompt, *candidates])
        if highest >= vocab:
            raise InputError(
                f"comparison {i} has token ids up to {highest}, but the reward model embeds "
                f"{vocab}; its tokenizer belongs to another model"
            )
        fit.whole += one is comparison
        fit.cut += one is not comparison
        choices = one.choices(soft_temperature)
        encoded.append(EncodedComparison(prompt, candidates, choices, one))
    if not comparisons:
        raise InputError("there are no comparisons to encode")
    if not encoded:
        raise InputError(
            f"all {len(comparisons)} comparisons exceed max_tokens = {max_tokens}; raise it, or "
            "cut their dialogues by turns"
        )
    return encoded, fit


def _ids(comparison: Comparison, model: RewardModel, unfinished: float) -> Encoded:
    """Token ids as the model will read them when it is the reward."""
    if comparison.ids is None:
        reasons = comparison.finish_reasons
        finished = [
            not is_held_out(text, unfinished, salt="unfinished")
            if reasons is None
            else reasons[i] == "stop"
            for i, text in enumerate(comparison.candidates)
        ]
        return model.encode_all(comparison.prompt, comparison.candidates, finished)
    # Sampled ids are kept, so the model is trained on the very tokens that it will score. A model
    # that is not causal takes prompt and response as one row.
    start = model.chat_ids(comparison.prompt) or list(comparison.ids[0])
    rest = [list(ids) for ids in comparison.ids[1]]
    if not model.causal:
        return Encoded([], [[*comparison.ids[0], *ids] for ids in rest])
    # The policy may have several EOS ids; the model reads them as one end, as `Objective` gives it.
    closing = model.closing(chat=not isinstance(comparison.prompt, str))
    said = comparison.finish_reasons
    stopped = [
        ids[-1] in model.end_ids if said is None else said[i] == "stop"
        for i, ids in enumerate(rest)
    ]
    if closing:
        # A policy's EOS that is none of the model's ends is a special token at least.
        ends = model.end_ids.union(model.tokenizer.all_special_ids)
        rest = [
            closed(ids, closing, ends) if ended else ids
            for ids, ended in zip(rest, stopped, strict=True)
        ]
    return Encoded(start, rest)


def candidate_rows(comparisons: Sequence[EncodedComparison], at_most: int | None = None) -> Tensor:
    """Prompt + candidate rows (B, L), all, or about `at_most` from evenly spaced comparisons."""
    each = sum(len(c.candidates) for c in comparisons) / len(comparisons)
    step = 1 if at_most is None else max(1, int(len(comparisons) * each / at_most))
    return torch.from_numpy(pad_rows([row for c in comparisons[::step] for row in c.rows]))
