"""Prompts: read from text, JSON, JSON Lines or `datasets`, tokenised once, held-out ones apart."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError

Prompt = str | list[dict[str, str]]
"""A prompt is plain text or a list of chat messages, ``{"role": …, "content": …}`` each."""

# For models that were never taught to chat: Anthropic HH's way of writing a dialogue.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '\n\nHuman: ' if message['role'] == 'user' else "
    "'\n\nAssistant: ' if message['role'] == 'assistant' else '' }}"
    "{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
)


SPLITS = ("all", "train", "held_out")


def load_texts(
    source: str, *, column: str | None = None, split: str = "train", revision: str | None = None
) -> list[Prompt]:
    """Texts (or chat messages) from a local file or a dataset of the `datasets` library.

    Args:
        source: A path (see `read_rows`), a dataset's name, or one JSON file of a hub dataset as
            "hf://datasets/OWNER/NAME/FILE".
        column: The field to take where a row is an object; "prompt" or "text" if None.
        split: Split of a `datasets` dataset.
        revision: Commit or tag of a hub dataset.

    Raises:
        InputError: The source is missing or empty, or a row has no such text; it is named.
    """
    rows = load_rows(source, split=split, revision=revision)
    return [text_field(where, row, column) for where, row in rows]


def text_field(where: str, row: Any, column: str | None) -> Prompt:
    """The text (or chat messages) of a row: the row itself, or its field.

    Raises:
        InputError: There is none; the row is named.
    """
    if isinstance(row, dict):
        names = [column] if column else ["prompt", "text"]
        found = [name for name in names if name in row]
        if not found:
            raise InputError(f"{where} has no column {' or '.join(names)}; it has {sorted(row)}")
        row = row[found[0]]
    if is_prompt(row):
        return row  # type: ignore[no-any-return]
    raise InputError(f"{where}: a text or a list of chat messages is needed, not {str(row)[:60]!r}")


def is_prompt(value: Any) -> bool:
    """Whether a value is a text or a list of chat messages, and not empty."""
    if isinstance(value, list) and value:
        return all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in value
        )
    return isinstance(value, str) and bool(value)


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as one text; chat messages by the tokenizer's template.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template, or one that refuses them.
    """
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise InputError(
            f"the prompts are chat messages, but the tokenizer of {tokenizer.name_or_path!r} "
            "has no chat template; give plain text, a tokenizer that has one, or in "
            "train_reward_model.py --chat-template plain"
        )
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} refuses {str(prompt)[:80]}: {error}"
        ) from error
    return str(text)


def prompt_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]
) -> list[int]:
    """Token ids of a prompt: with BOS where the tokenizer has one, never closed by an EOS.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    if not isinstance(prompt, str):
        text = prompt_text(prompt, tokenizer)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # Some tokenizers close every text by themselves; the response comes after a prompt.
    if len(ids) > 1 and ids[-1] in eos_ids and bare[-1:] != ids[-1:]:
        ids.pop()
    return ids


def continued_ids(
    prompt: Prompt,
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of each response that continues it, with no EOS added.

    Prompt and response are tokenised as one text where the border allows it: a tokenizer that opens
    each text with a space would else put one between the two.
    """
    start = prompt_ids(prompt, tokenizer, eos_ids)
    if isinstance(prompt, str):
        wholes = _tokenised([prompt + response for response in responses], tokenizer, eos_ids)
    else:
        text = prompt_text(prompt, tokenizer)
        joined = [text + response for response in responses]
        wholes = list(tokenizer(joined, add_special_tokens=False)["input_ids"])
    alone = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    rest = [
        list(whole[len(start) :] if whole[: len(start)] == start else by_itself)
        for whole, by_itself in zip(wholes, alone, strict=True)
    ]
    return start, rest


def _tokenised(
    prompts: Sequence[Prompt | tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """`prompt_ids` of many prompts, the texts among them in one call of the tokenizer."""
    texts = [p for p in prompts if isinstance(p, str)]
    found = iter(tokenizer(texts)["input_ids"] if texts else [])
    rows = []
    for prompt in prompts:
        if isinstance(prompt, tuple):
            rows.append(list(prompt))
        elif isinstance(prompt, str):
            row = list(next(found))
            # The rare text that ends with an EOS is looked at alone: is it the tokenizer's?
            closed = len(row) > 1 and row[-1] in eos_ids
            rows.append(prompt_ids(prompt, tokenizer, eos_ids) if closed else row)
        else:
            rows.append(prompt_ids(prompt, tokenizer, eos_ids))
    return rows


def _cut(row: list[int], max_tokens: int, keep: str, bos: int | None) -> tuple[int, ...]:
    """The first or last tokens of a row; a BOS at its start stays there."""
    if len(row) <= max_tokens or keep == "first":
        return tuple(row[:max_tokens])
    opening = row[:1] if row[0] == bos else []
    return (*opening, *row[len(row) - max_tokens + len(opening) :])


def _first_part(text: str, share: float) -> str:
    words = text.split(" ")
    return " ".join(words[: max(1, int(len(words) * share))])


def is_held_out(prompt: Prompt | tuple[int, ...], share: float, *, salt: str = "") -> bool:
    """Whether a prompt belongs to the held-out share; it depends on nothing but its text.

    Args:
        prompt: Text, chat messages or token ids.
        share: Share of all prompts that is held out.
        salt: Another salt makes another, independent split.
    """
    key = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return zlib.crc32((salt + key).encode()) % 10_000 < share * 10_000


@dataclass(frozen=True)
class PromptDataset:
    """Tokenised prompts.

    Attributes:
        ids: Token ids of each prompt.
        max_tokens: The budget that all of them keep.
        dropped: How many were too long for it; none is cut midway unless that is asked for.
        chats: The messages that a prompt's ids were, where it was a chat.
    """

    ids: tuple[tuple[int, ...], ...]
    max_tokens: int
    dropped: int = 0
    chats: dict[tuple[int, ...], Prompt] = field(default_factory=dict, compare=False)

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
            max_words: Keep only so many first words of a text (to make prompts of whole texts).
            share: Keep only this share of a text's words, the first ones.
            keep: "first" or "last": cut a text or ids that are too long to so many first or last
                tokens instead of dropping them. Chat messages are dropped all the same.
            split: "all", "train" or "held_out"; equal prompts are always on one side.
            held_out: Share of prompts that is held out.

        Raises:
            InputError: No prompt is left, or an option is out of range.
        """
        if split not in SPLITS:
            raise InputError(f"split must be one of {SPLITS}, not {split!r}")
        if max_words is not None:
            if max_words < 1:
                raise InputError(f"prompt_words must be at least 1, not {max_words}")
            prompts = [
                " ".join(p.split()[:max_words]) if isinstance(p, str) else p for p in prompts
            ]
        if share is not None:
            if not 0 < share <= 1:
                raise InputError(f"prompt_share must be above 0 and at most 1, not {share}")
            prompts = [_first_part(p, share) if isinstance(p, str) else p for p in prompts]
        if keep not in (None, "first", "last"):
            raise InputError(f"prompt_keep must be first, last or None, not {keep!r}")
        if keep is not None:
            # Cut first, so that what is alike after the cut is on one side of the split.
            rows = _tokenised(prompts, tokenizer, eos_ids)
            bos = tokenizer.bos_token_id
            prompts = [
                p if isinstance(p, list) else _cut(row, max_tokens, keep, bos)
                for p, row in zip(prompts, rows, strict=True)
            ]
        unique = list({json.dumps(p): p for p in prompts}.values())
        if split != "all":
            unique = [p for p in unique if is_held_out(p, held_out) == (split == "held_out")]
        rows = _tokenised(unique, tokenizer, eos_ids)
        kept = tuple(tuple(row) for row in rows if 0 < len(row) <= max_tokens)
        if not kept:
            longest = min(map(len, rows), default=0)
            raise InputError(
                f"no prompt is left of {len(unique)} in split {split!r}: max_prompt_tokens is "
                f"{max_tokens}, the shortest has {longest}; raise max_prompt_tokens, or give more "
                "prompts"
            )
        chats: dict[tuple[int, ...], Prompt] = {
            tuple(row): p for row, p in zip(rows, unique, strict=True) if isinstance(p, list)
        }
        return cls(kept, max_tokens, len(rows) - len(kept), chats)

    def __len__(self) -> int:
        return len(self.ids)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """One prompt at random."""
        return self.ids[int(rng.integers(len(self.ids)))]
