"""Prompts as text or chat messages: their form, and which are held out."""

import json
import zlib
from typing import Any

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
