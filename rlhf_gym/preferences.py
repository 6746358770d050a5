"""Human choices among K answers: what a comparison is, and how to read it from files."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_gym.errors import InputError
from rlhf_gym.prompts import Prompt, prompt_ids, read_rows

HH_TURN = "\n\nAssistant:"


@dataclass(frozen=True)
class Comparison:
    """One human choice.

    Attributes:
        prompt: Text or chat messages.
        candidates: The K answers, K ≥ 2.
        best: Index of the chosen one.
        ids: Token ids of the prompt and of each candidate where they were sampled (then nothing is
            re-tokenised, and an EOS is kept); None for text written by others.
    """

    prompt: Prompt
    candidates: tuple[str, ...]
    best: int
    ids: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None = None

    def rows(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
    ) -> list[list[int]] | None:
        """Ids of prompt + candidate for each candidate; None if one exceeds `max_tokens`.

        Text candidates are closed by the tokenizer's EOS.
        """
        if self.ids is not None:
            rows = [[*self.ids[0], *candidate] for candidate in self.ids[1]]
        else:
            eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            start = prompt_ids(self.prompt, tokenizer, eos)
            ends = tokenizer(list(self.candidates), add_special_tokens=False)["input_ids"]
            rows = [[*start, *end, *eos] for end in ends]
        return None if max_tokens and max(map(len, rows)) > max_tokens else rows


def read_comparisons(path: str | Path, skipped: list[str] | None = None) -> list[Comparison]:
    """Read a comparison file: ours (`prompt`, `candidates`, `best`) or `chosen` / `rejected`.

    Anthropic's HH files have no prompt: there it is the dialogue up to the last assistant turn
    that both sides share.

    Args:
        path: The file.
        skipped: Where given, bad rows are left out and what is wrong with each is put here.

    Raises:
        InputError: The file cannot be read, is empty, or a row is not a comparison; it is named.
    """
    comparisons = []
    for where, row in read_rows(path):
        try:
            comparisons.append(_comparison(where, row))
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not comparisons:
        raise InputError(f"{path} holds no comparisons")
    return comparisons


def write_comparisons(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Write comparisons as JSON Lines in the project's format."""
    with Path(path).open("w", encoding="utf-8") as file:
        for comparison in comparisons:
            row: dict[str, Any] = {
                "prompt": comparison.prompt,
                "candidates": list(comparison.candidates),
                "best": comparison.best,
            }
            if comparison.ids is not None:
                row["ids"] = {"prompt": comparison.ids[0], "candidates": comparison.ids[1]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _comparison(where: str, row: Any) -> Comparison:
    if not isinstance(row, dict):
        raise InputError(f"{where}: an object is needed, not {str(row)[:60]!r}")
    if {"chosen", "rejected"} <= row.keys():
        row = _from_pair(where, row)
    missing = {"prompt", "candidates", "best"} - row.keys()
    if missing:
        raise InputError(
            f"{where} lacks {sorted(missing)}; a comparison has prompt, candidates and best, or "
            "chosen and rejected"
        )
    candidates, best = row["candidates"], row["best"]
    if not isinstance(candidates, list) or len(candidates) < 2:
        raise InputError(f"{where}: candidates must be a list of at least two texts")
    ids = _ids(where, row.get("ids"), len(candidates))
    for i, text in enumerate(candidates):
        # A sampled candidate may end at once: its ids say so, and its text is empty.
        if not isinstance(text, str) or (ids is None and not text.strip()):
            raise InputError(f"{where}: candidate {i} is not a text, but {str(text)[:60]!r}")
    if not isinstance(best, int) or isinstance(best, bool) or not 0 <= best < len(candidates):
        raise InputError(f"{where}: best is {best!r}, but must be 0 to {len(candidates) - 1}")
    return Comparison(row["prompt"], tuple(candidates), best, ids)


def _ids(
    where: str, ids: Any, k: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    if ids is None:
        return None
    if not isinstance(ids, dict) or len(ids.get("candidates", ())) != k:
        raise InputError(f"{where}: ids must hold a prompt and one list for each candidate")
    return tuple(ids["prompt"]), tuple(tuple(c) for c in ids["candidates"])


def _from_pair(where: str, row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return {"prompt": row["prompt"], "candidates": [chosen, rejected], "best": 0}
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise InputError(f"{where}: chosen and rejected must be texts where there is no prompt")
    at = min(_last_shared_turn(chosen, rejected), len(chosen), len(rejected))
    if at < 0:
        raise InputError(f"{where}: chosen and rejected share no {HH_TURN!r} turn to split at")
    return {"prompt": chosen[:at], "candidates": [chosen[at:], rejected[at:]], "best": 0}


def _last_shared_turn(a: str, b: str) -> int:
    """End of the last assistant marker inside the common beginning of two dialogues, or −1."""
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    shared = a[: min(len(a), len(b)) if common is None else common]
    at = shared.rfind(HH_TURN)
    return at + len(HH_TURN) if at >= 0 else -1
