"""Prompts as text or chat messages: reading them, checking them, and which are held out."""

import json
import zlib
from typing import Any

from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError

Prompt = str | list[dict[str, str]]
"""A prompt is plain text or a list of chat messages, ``{"role": …, "content": …}`` each."""

HALF_A_CHARACTER = "a text contains half a character (a lone surrogate), which no tokenizer reads"

# For models that were not trained on chats: the format of Anthropic's HH dialogues.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '\n\nHuman: ' if message['role'] == 'user' else "
    "'\n\nAssistant: ' if message['role'] == 'assistant' else '' }}"
    "{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
)


def load_texts(
    source: str, *, column: str | None = None, split: str = "train", revision: str | None = None
) -> list[Prompt]:
    """Texts (or chat messages) from a local file or a dataset of the `datasets` library.

    Args:
        source: A path (see `read_rows`), a dataset's name, or one JSON file of a hub dataset as
            "hf://datasets/OWNER/NAME/FILE".
        column: The field to read if a row is an object; "prompt" or "text" if None.
        split: Split of a `datasets` dataset.
        revision: Commit or tag of a hub dataset.

    Raises:
        InputError: The source is missing or empty, or a row has no such text; the message names
            the row.
    """
    rows = load_rows(source, split=split, revision=revision)
    return [text_field(where, row, column) for where, row in rows]


def text_field(where: str, row: Any, column: str | None) -> Prompt:
    """The text (or chat messages) of a row: the row itself, or its field.

    Raises:
        InputError: There is none; the message names the row.
    """
    if isinstance(row, dict):
        names = [column] if column else ["prompt", "text"]
        found = [name for name in names if name in row]
        if not found:
            raise InputError(f"{where} has no column {' or '.join(names)}; it has {sorted(row)}")
        row = row[found[0]]
    if has_half_a_character(row):
        raise InputError(f"{where}: {HALF_A_CHARACTER}; repair the file")
    if is_prompt(row):
        return row  # type: ignore[no-any-return]
    raise InputError(f"{where}: a text or a list of chat messages is needed, not {str(row)[:60]!r}")


def has_half_a_character(value: Any) -> bool:
    """Whether a text, or a text inside lists and dicts, has a lone surrogate, as JSON can hold."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def is_prompt(value: Any) -> bool:
    """Whether a value is a text or a list of chat messages, and not empty."""
    if isinstance(value, list) and value:
        return all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in value
        )
    return isinstance(value, str) and bool(value)


def is_held_out(prompt: Prompt | tuple[int, ...], share: float, *, salt: str = "") -> bool:
    """Whether a prompt belongs to the held-out share; this depends only on its text.

    By a hash and not by position, so that adding rows or another order moves no prompt from one
    split to the other.

    Args:
        prompt: Text, chat messages or token ids.
        share: Share of all prompts that is held out.
        salt: Another salt makes another, independent split.
    """
    key = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return zlib.crc32((salt + key).encode()) % 10_000 < share * 10_000
