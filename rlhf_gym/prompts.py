"""Prompts: read from text, JSON, JSON Lines or `datasets`, tokenised once, held-out ones apart."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_gym.errors import InputError, UnreachableError

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

HUB = "hf://datasets/"

SPLITS = ("all", "train", "held_out")


def read_rows(path: str | Path, *, skipped: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Rows of a local file, each with a name for error messages ("FILE, row 3").

    ``.json`` holds one list; ``.jsonl`` one JSON value a line; ``.jsonl.gz`` the same, compressed;
    anything else one text a line.

    Args:
        path: The file.
        skipped: Where given, lines that cannot be read are left out and named here.

    Raises:
        InputError: The file is missing, is not UTF-8, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.suffix == ".json":
        yield from _json_list(path)
        return
    is_json = path.name.endswith((".jsonl", ".jsonl.gz"))
    for i, line in enumerate(_lines(path, skipped), 1):
        where = f"{path}, line {i}"
        try:
            text = line.decode("utf-8")
            if text.strip():
                yield where, json.loads(text) if is_json else text.rstrip("\r\n")
            continue
        except UnicodeDecodeError as error:
            problem = f"{where} is not UTF-8 text ({error}); convert the file first"
        except (ValueError, RecursionError) as error:
            problem = f"{where}: not valid JSON: {error}"
        if skipped is None:
            raise InputError(problem)
        skipped.append(problem)


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} holds a JSON {type(rows).__name__}; a list is needed")
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))


def _lines(path: Path, skipped: list[str] | None) -> Iterator[bytes]:
    read = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                read += 1
                yield line
    except (EOFError, OSError, zlib.error) as error:
        problem = f"{path} cannot be read after line {read}: {error}"
        if skipped is None:
            raise InputError(problem) from error
        skipped.append(problem)


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


def load_rows(
    source: str,
    *,
    split: str = "train",
    revision: str | None = None,
    skipped: list[str] | None = None,
) -> list[tuple[str, Any]]:
    """Rows of a local file or of a dataset, each with a name for error messages.

    Raises:
        InputError: The source is missing or empty.
    """
    suffixes = {".json", ".jsonl", ".gz", ".txt"}
    if not source.startswith(HUB) and (Path(source).suffix in suffixes or Path(source).is_file()):
        rows = list(read_rows(source, skipped=skipped))
    else:
        rows = _dataset_rows(source, split, revision)
    if not rows:
        raise InputError(f"{source} holds no rows; at least one is needed")
    return rows


def _dataset_rows(name: str, split: str, revision: str | None) -> list[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        if name.startswith(HUB):
            data = load_dataset("json", data_files=_pinned(name, revision), split="train")
        else:
            data = load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises a dozen types; all mean the same to a user
        raise UnreachableError(
            f"cannot load the dataset {name!r} (split {split!r}): {error}\n"
            "Give an existing file, or a dataset that this machine can reach."
        ) from error
    return [(f"{name}, row {i}", row) for i, row in enumerate(data, 1)]


def _pinned(file: str, revision: str | None) -> str:
    """A file of a hub dataset at a revision, hf://datasets/OWNER/NAME@REVISION/FILE."""
    parts = file.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise InputError(f"{file!r} names no file; a hub file is {HUB}OWNER/NAME/FILE")
    owner, name, rest = parts
    return f"{HUB}{owner}/{name}{f'@{revision}' if revision else ''}/{rest}"


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
