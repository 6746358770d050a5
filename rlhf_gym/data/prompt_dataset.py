"""Prompts as token ids: tokenised once, too long ones dropped or cut, held-out ones kept apart."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.encoding import many_prompt_ids, unknown_share
from rlhf_gym.data.prompts import Prompt, is_held_out
from rlhf_gym.errors import InputError

SPLITS = ("all", "train", "held_out")


@dataclass(frozen=True)
class PromptDataset:
    """Tokenised prompts.

    Attributes:
        ids: Token ids of each prompt.
        max_tokens: The most tokens that any of them has room for.
        dropped: How many were left out: longer than that, as a prompt is cut only if the caller
            asks for it, or without tokens.
        chats: For prompts that were chat messages: the messages, by their ids.
        split: Which prompts they are: "all", "train" or "held_out".
        empty: How many of those left out were without tokens.
        bad_rows: Number of the source's rows that had no prompt and were skipped, by reason.
    """

    ids: tuple[tuple[int, ...], ...]
    max_tokens: int
    dropped: int = 0
    chats: dict[tuple[int, ...], Prompt] = field(default_factory=dict, compare=False)
    split: str = "all"
    empty: int = 0
    bad_rows: Mapping[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def from_texts(
        cls,
        prompts: Sequence[Prompt | tuple[int, ...]],
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        max_tokens: int,
        *,
        max_words: int | None = None,
        share: float | None = None,
        keep: str | None = None,
        split: str = "all",
        held_out: float = 0.1,
    ) -> "PromptDataset":
        """Tokenise prompts, drop the ones that are too long, keep one split.

        Args:
            prompts: Texts, chat messages, or token ids of the tokenizer.
            tokenizer: The policy's tokenizer.
            eos_ids: The ids that end a response.
            max_tokens: Longest prompt that is kept.
            max_words: Keep only this many first words of a text (to make prompts of whole texts).
            share: Keep only this share of a text's words, the first ones.
            keep: "first" or "last": cut a text or ids that are too long to their first or last
                `max_tokens` tokens instead of dropping them. Chat messages are always dropped.
            split: "all", "train" or "held_out"; equal prompts are always in the same split.
            held_out: Share of prompts that is held out.

        Raises:
            InputError: No prompt is left, or an option is out of range.
        """
        if split not in SPLITS:
            raise InputError(f"split must be one of {SPLITS}, not {split!r}")
        if not 0 <= held_out <= 1:
            raise InputError(f"held_out must be from 0 to 1, not {held_out}")
        prompts = _shortened(prompts, max_words, share)
        if keep not in (None, "first", "last"):
            raise InputError(f"prompt_keep must be first, last or None, not {keep!r}")
        if keep is not None:
            # Cut before splitting: two texts that are equal after the cut must be in one split.
            rows = many_prompt_ids(prompts, tokenizer, eos_ids)
            bos = tokenizer.bos_token_id
            prompts = [
                p if isinstance(p, list) else _cut(row, max_tokens, keep, bos)
                for p, row in zip(prompts, rows, strict=True)
            ]
        unique = list({json.dumps(p): p for p in prompts}.values())
        rows = many_prompt_ids(unique, tokenizer, eos_ids)
        # Two texts may have the same ids ("a" and "a " often do). They are one prompt, on one side.
        firsts = {tuple(row) or -i: i for i, row in reversed(list(enumerate(rows)))}
        places = sorted(firsts.values())
        unique, rows = [unique[i] for i in places], [rows[i] for i in places]
        there = len(unique)
        if split != "all":
            side = [is_held_out(p, held_out) == (split == "held_out") for p in unique]
            unique, rows = list(compress(unique, side)), list(compress(rows, side))
        kept = tuple(tuple(row) for row in rows if 0 < len(row) <= max_tokens)
        if not kept:
            why = _why_none(there, rows, max_tokens, split, held_out, cut=keep is not None)
            raise InputError(f"no prompt is left of {there}: {why}")
        chats: dict[tuple[int, ...], Prompt] = {
            tuple(row): p for row, p in zip(rows, unique, strict=True) if isinstance(p, list)
        }
        empty = sum(not row for row in rows)
        return cls(kept, max_tokens, len(rows) - len(kept), chats, split, empty)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> dict[str, Any]:
        """What a run records of its prompts: how many were kept and dropped, and skipped rows."""
        skipped = {"bad_rows": dict(self.bad_rows)} if self.bad_rows else {}
        return {"kept": len(self), "dropped": self.dropped, **skipped}

    @property
    def dropped_line(self) -> str | None:
        """One line about the prompts that were dropped, and the fix; None if none was."""
        if not self.dropped:
            return None
        too_long, which = self.dropped - self.empty, "" if self.split == "all" else self.split
        reasons = [f"{self.empty} without tokens"] if self.empty else []
        fix = ""
        if too_long:
            reasons.append(f"{too_long} longer than max_prompt_tokens, which is {self.max_tokens}")
            fix = "; raise max_prompt_tokens, or cut texts with prompt_keep='last'"
        return (
            f"{self.dropped} of {len(self) + self.dropped} {which} prompts are dropped: "
            f"{', '.join(reasons)}{fix}"
        ).replace("  ", " ")

    def unknown_share(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Share of the prompts' tokens that the tokenizer does not know (its <unk>)."""
        return unknown_share(self.ids, tokenizer)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """One prompt at random."""
        return self.ids[int(rng.integers(len(self.ids)))]


def _why_none(
    there: int, rows: list[list[int]], max_tokens: int, split: str, held_out: float, *, cut: bool
) -> str:
    """Say why no prompt is left, and how to fix it.

    Args:
        there: How many different prompts there were before the split.
        rows: Token ids of those in the split.
        max_tokens: Longest prompt that is kept.
        split: The split.
        held_out: Share of prompts that is held out.
        cut: Whether texts that are too long were cut.
    """
    if not there:
        return "there are none; give some"
    if not rows and split == "held_out":
        fix = "raise held_out" if held_out else "set held_out above 0"
        return (
            f"none is held out, because held_out is {held_out:g} and the hash of a prompt's text "
            f"decides; {fix}, give more prompts, or use all of them with split='all'"
        )
    if not rows:
        return (
            f"all are held out, because held_out is {held_out:g}; lower held_out, give more "
            "prompts, or use all of them with split='all'"
        )
    which = "all" if len(rows) == there else f"all {len(rows)} in split {split!r}"
    lengths = [len(row) for row in rows if row]
    if not lengths:
        return f"{which} are without tokens; give prompts that have text"
    # Chat messages are never cut.
    fix = "" if cut else ", or cut texts with prompt_keep='last'"
    return (
        f"{which} are longer than max_prompt_tokens, which is {max_tokens} (the shortest has "
        f"{min(lengths)} tokens); raise max_prompt_tokens{fix}"
    )


def _shortened(
    prompts: Sequence[Prompt | tuple[int, ...]], max_words: int | None, share: float | None
) -> Sequence[Prompt | tuple[int, ...]]:
    """The texts among prompts, cut to their first words and then to their first share of words."""
    if max_words is not None:
        if max_words < 1:
            raise InputError(f"prompt_words must be at least 1, not {max_words}")
        prompts = [" ".join(p.split()[:max_words]) if isinstance(p, str) else p for p in prompts]
    if share is not None:
        if not 0 < share <= 1:
            raise InputError(f"prompt_share must be above 0 and at most 1, not {share}")
        prompts = [_first_part(p, share) if isinstance(p, str) else p for p in prompts]
    return prompts


def _first_part(text: str, share: float) -> str:
    words = text.split(" ")
    return " ".join(words[: max(1, int(len(words) * share))])


def _cut(row: list[int], max_tokens: int, keep: str, bos: int | None) -> tuple[int, ...]:
    """The first or last tokens of a row; a BOS at its start stays there."""
    if len(row) <= max_tokens or keep == "first":
        return tuple(row[:max_tokens])
    opening = row[:1] if row[0] == bos else []
    return (*opening, *row[len(row) - max_tokens + len(opening) :])
