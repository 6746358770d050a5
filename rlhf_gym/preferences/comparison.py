"""Human choices among K answers: the `Comparison` class and its JSON Lines format."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.encoding import Encoded, continued_ids, decodes_to
from rlhf_gym.data.endings import closed, closing_ids, opened
from rlhf_gym.data.prompts import Prompt
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.likelihood import Choice, ranking_choices

LABELS = ("best", "ranking", "scores", "votes", "pairs")

Ids = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Comparison:
    """One prompt, K answers and a human judgement of them, in exactly one of five forms.

    Attributes:
        prompt: Text or chat messages.
        candidates: The K answers, K ≥ 2.
        best: Index of the chosen one.
        ranking: Groups of indices, best first, ties together; candidates not listed were not
            compared.
        scores: A number for each candidate; only their order counts, unless a soft temperature is
            given.
        votes: For each candidate, the number of annotators who chose it.
        pairs: (winner, loser) for each pair that was judged; they need not be transitive.
        ties: With `votes`: the number of annotators who found the candidates equal.
        ids: For sampled candidates: token ids of the prompt and of each candidate, so that nothing
            is re-tokenised and an EOS is kept. None for text written by others.
        finish_reasons: "stop" or "length" for each sampled candidate.
    """

    prompt: Prompt
    candidates: tuple[str, ...]
    best: int | None = None
    ranking: tuple[tuple[int, ...], ...] | None = None
    scores: tuple[float, ...] | None = None
    votes: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, int], ...] | None = None
    ties: int = 0
    ids: Ids | None = None
    finish_reasons: tuple[str, ...] | None = None

    def choices(self, soft_temperature: float | None = None) -> list[Choice]:
        """The choices that the label consists of (see `rlhf_gym.preferences.likelihood`).

        Args:
            soft_temperature: If given, `scores` are soft labels, softmax(scores / temperature).

        Raises:
            InputError: The temperature is not positive.
        """
        if soft_temperature is not None and not soft_temperature > 0:
            raise InputError(f"soft_temperature must be positive, not {soft_temperature}")
        everyone = tuple(range(len(self.candidates)))
        if self.best is not None:
            return [(everyone, tuple(float(i == self.best) for i in everyone))]
        if self.votes is not None:
            total = sum(self.votes) + self.ties
            even = self.ties / len(everyone)
            return [(everyone, tuple((n + even) / total for n in self.votes))]
        if self.pairs is not None:
            return [(pair, (1 / len(self.pairs), 0.0)) for pair in self.pairs]
        if self.scores is not None and soft_temperature is not None:
            peak = max(self.scores)
            powers = [math.exp((s - peak) / soft_temperature) for s in self.scores]
            return [(everyone, tuple(p / sum(powers) for p in powers))]
        return ranking_choices(self._groups)

    @cached_property
    def preferred(self) -> tuple[tuple[int, int], ...]:
        """Every (winner, loser) that the label implies; ties imply none."""
        if self.pairs is not None:
            return self.pairs
        groups = self._groups
        return tuple(
            (winner, loser)
            for place, group in enumerate(groups)
            for later in groups[place + 1 :]
            for winner in group
            for loser in later
        )

    @cached_property
    def compared(self) -> tuple[int, ...]:
        """The candidates that the label ranks above or below another."""
        return tuple(sorted({i for pair in self.preferred for i in pair}))

    @cached_property
    def tops(self) -> tuple[int, ...]:
        """The candidates that beat another and that no other beats; none if all are equal."""
        winners, losers = ({pair[i] for pair in self.preferred} for i in (0, 1))
        return tuple(sorted(winners - losers))

    @property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        if self.ranking is not None:
            return self.ranking
        if self.best is not None:
            rest = tuple(i for i in range(len(self.candidates)) if i != self.best)
            return ((self.best,), rest)
        values = self.votes if self.votes is not None else self.scores
        assert values is not None
        return tuple(
            tuple(i for i, v in enumerate(values) if v == level)
            for level in sorted(set(values), reverse=True)
        )

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, closing: Sequence[int] | None = None
    ) -> Encoded:
        """Token ids of the prompt and of each candidate, as a causal model reads them.

        Sampled ids are kept as they are, so one that the budget cut has no EOS. Text is closed
        unless `finish_reasons` say that a budget cut it.

        Args:
            tokenizer: The model's tokenizer.
            closing: What ends candidates that are text; None takes the tokenizer's own end (see
                `rlhf_gym.data.endings.closing_ids`).
        """
        if self.ids is not None:
            return Encoded(list(self.ids[0]), [list(candidate) for candidate in self.ids[1]])
        if closing is None:
            closing = closing_ids(tokenizer, chat=not isinstance(self.prompt, str))
        ends = closing_ids(tokenizer, chat=False)
        start, rest = continued_ids(self.prompt, self.candidates, tokenizer, ends)
        reasons = self.finish_reasons or ["stop"] * len(rest)
        return Encoded(
            start,
            [
                (closed if reason == "stop" else opened)(ids, closing, ends)
                for ids, reason in zip(rest, reasons, strict=True)
            ],
        )

    def with_own_ids(self, tokenizer: PreTrainedTokenizerBase, vocab: int) -> "Comparison":
        """This comparison; without its token ids if they are not this tokenizer's.

        They are if they decode to its texts. Comparing names of tokenizers would not do: files of
        comparisons do not record one.

        Args:
            tokenizer: The tokenizer of the model that reads it.
            vocab: Number of ids that the model embeds.
        """
        if self.ids is None:
            return self
        prompt, candidates = self.ids
        pairs = list(zip(candidates, self.candidates, strict=True))
        if isinstance(self.prompt, str):  # a chat's roles may be special tokens, without a text
            pairs.append((prompt, self.prompt))
        own = max(prompt, default=0) < vocab and all(
            max(ids, default=0) < vocab and decodes_to(ids, text, tokenizer) for ids, text in pairs
        )
        return self if own else replace(self, ids=None)

    def shortened(self) -> "Comparison | None":
        """This comparison without the dialogue's first turns, up to the next human turn.

        Returns:
            None if the dialogue has only one human turn.
        """
        if isinstance(self.prompt, str):
            starts = [m.start() for m in re.finditer(r"\n\nHuman:", self.prompt)]
            cut: Prompt = self.prompt[starts[1] :] if len(starts) > 1 else ""
        else:
            system = [m for m in self.prompt[:1] if m["role"] == "system"]
            turns = self.prompt[len(system) :]
            later = [i for i, m in enumerate(turns) if i and m["role"] == "user"]
            cut = [*system, *turns[later[0] :]] if later else []
        return replace(self, prompt=cut, ids=None) if cut else None

    def row(self) -> dict[str, Any]:
        """The comparison as a row of the project's format."""
        row: dict[str, Any] = {"prompt": self.prompt, "candidates": self.candidates}
        label = next(name for name in LABELS if getattr(self, name) is not None)
        row[label] = getattr(self, label)
        if self.ties:
            row["ties"] = self.ties
        if self.ids is not None:
            row["ids"] = {"prompt": self.ids[0], "candidates": self.ids[1]}
        if self.finish_reasons is not None:
            row["finish_reasons"] = self.finish_reasons
        return row


def write_comparisons(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Write comparisons as JSON Lines in the project's format."""
    with Path(path).open("w", encoding="utf-8") as file:
        for comparison in comparisons:
            file.write(json.dumps(comparison.row(), ensure_ascii=False) + "\n")
