"""Values of a row: texts, numbers as texts, and chat messages in either of their two forms."""

import json
import math
from decimal import Decimal
from typing import Any, Generic, NamedTuple, TypeVar

from rlhf_gym.data.bad_rows import RowError
from rlhf_gym.data.prompts import HALF_A_CHARACTER, Prompt, has_half_a_character

T = TypeVar("T")

CHATS = ("messages", "conversations")
"""Columns that hold chat messages; a table, which has only texts, holds them as JSON."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles of ShareGPT's messages, ``{"from": …, "value": …}``, by the small letters of `from`."""


class Read(NamedTuple, Generic[T]):
    """What was read from a row.

    Attributes:
        value: The prompt, or the example.
        used: The columns that it was read from.
        note: What of these columns was left out; the same words for each such row.
    """

    value: T
    used: tuple[str, ...] = ()
    note: str | None = None


def plain(where: str, value: Any) -> Prompt:
    """A text that is not empty, or a list of chat messages.

    Raises:
        RowError: It is neither.
    """
    if has_half_a_character(value):
        raise RowError(f"{where}: {HALF_A_CHARACTER}; repair the file", "half a character")
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [_message(where, one) for one in value]
    raise RowError(
        f"{where}: a text or a list of chat messages is needed, not {str(value)[:60]!r}",
        "empty" if value in (None, "", []) else "not a text",
    )


def field(where: str, row: dict[str, Any], name: str) -> Prompt:
    """The text or the chat messages in a column; a number becomes its text.

    Raises:
        RowError: There are none in it.
    """
    value, where = row[name], f"{where}: column {name!r}"
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{where}: {value} is no number", "not a text")
        return str(value)
    if name in CHATS and isinstance(value, str):
        value = _chat_of(where, value)
    return plain(where, value)


def optional_text(where: str, row: dict[str, Any], name: str) -> str:
    """The text in a column that a row may lack, or leave empty; then ''.

    Raises:
        RowError: It has something else.
    """
    if row.get(name) in (None, ""):
        return ""
    value = field(where, row, name)
    if isinstance(value, str):
        return value
    raise RowError(f"{where}: column {name!r}: a text is needed, not messages", "not a text")


def with_system(where: str, row: dict[str, Any], prompt: Prompt) -> Prompt:
    """A prompt after the system message of the row's column `system`, if that has one.

    Raises:
        RowError: The messages have another system message.
    """
    said = optional_text(where, row, "system")
    if not said:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    opening = {"role": "system", "content": said}
    if messages[0]["role"] != "system":
        return [opening, *messages]
    if messages[0]["content"] == said:
        return messages
    raise RowError(
        f"{where}: the column 'system' and the first message are two different system messages",
        "two system messages",
    )


def _chat_of(where: str, text: str) -> Any:
    """The chat messages that a text column of a table holds as JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list):
        return value
    raise RowError(
        f"{where}: chat messages are needed, not the text {text[:60]!r}; save the data as .jsonl "
        "or .parquet, or name another column",
        "not chat messages",
    )


def _message(where: str, message: dict[str, Any]) -> dict[str, str]:
    """A chat message as ``{"role": …, "content": …}``, its other entries included."""
    # Tables give every message the keys of all, empty where it has none.
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
        return message
    role, content = message.get("from"), message.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(
            f"{where}: a chat message has role and content, or from and value, as texts; not "
            f"{str(message)[:60]!r}",
            "not chat messages",
        )
    if role.lower() not in ROLES:
        raise RowError(
            f"{where}: a message is from {role!r}; known are {', '.join(ROLES)}", "unknown role"
        )
    others = {k: v for k, v in message.items() if k not in ("from", "value", "role", "content")}
    return {"role": ROLES[role.lower()], "content": content, **others}
