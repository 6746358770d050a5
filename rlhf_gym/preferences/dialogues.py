"""Prompts and answers as chat messages, from the ways in which public data writes dialogues."""

from collections.abc import Sequence
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.cells import listed

Row = dict[str, Any]
Messages = list[dict[str, Any]]

SPEAKERS = {
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
"""Roles of chat messages, by the names that ShareGPT's `from` uses."""

CONTEXT = ("system", "history")
"""Columns that `with_context` reads."""


def user_message(*parts: Any) -> Messages:
    """A prompt of one user message: the parts that are not empty, with blank lines between."""
    given = [part for part in parts if part]
    for part in given:
        if not isinstance(part, str):
            raise InputError(f"the prompt must be a text, not {str(part)[:60]!r}")
    return [{"role": "user", "content": "\n\n".join(given)}]


def messages_of(value: Any) -> Messages:
    """Chat messages from a list of ``{"role", "content"}`` or of ShareGPT's ``{"from", "value"}``.

    Raises:
        InputError: It is no list of messages, or a speaker is unknown.
    """
    return [_message(one) for one in ([value] if isinstance(value, dict) else listed("it", value))]


def _message(one: Any) -> dict[str, Any]:
    if isinstance(one, dict) and {"role", "content"} <= one.keys():
        return one
    if not isinstance(one, dict) or not {"from", "value"} <= one.keys():
        raise InputError(f"a chat message has role and content, unlike {str(one)[:60]!r}")
    role = SPEAKERS.get(str(one["from"]).lower())
    if role is None:
        raise InputError(f"a message is from {one['from']!r}, not {', '.join(SPEAKERS)}")
    return {"role": role, "content": one["value"]}


def with_context(prompt: Any, row: Row) -> Any:
    """A prompt after the row's `system` message and its `history`, as chat messages.

    Args:
        prompt: A text or chat messages; returned as it is if the row has neither column.
        row: May have `system`, a text, and `history`, a list of [user, assistant] or of messages.

    Raises:
        InputError: `system` or `history` is something else, or there are two system messages.
    """
    if all(row.get(name) is None for name in CONTEXT):
        return prompt
    chat: Messages = user_message(prompt) if isinstance(prompt, str) else messages_of(prompt)
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise InputError(f"system must be a text, not {str(system)[:60]!r}")
    if system.strip() and chat[:1] and chat[0]["role"] == "system":
        if chat[0]["content"] == system:
            system = ""
        else:
            raise InputError("the prompt has a system message, and the column system another one")
    before: Messages = [{"role": "system", "content": system}] if system.strip() else []
    return [*before, *_turns(row.get("history") or []), *chat]


def _turns(history: Any) -> Messages:
    turns: Messages = []
    for turn in listed("history", history):
        if isinstance(turn, dict):
            turns.append(_message(turn))
        elif isinstance(turn, list | tuple) and len(turn) == 2:
            for role, text in zip(("user", "assistant"), turn, strict=True):
                turns.append({"role": role, "content": text})
        else:
            raise InputError(f"history must list [user, assistant], not {str(turn)[:60]!r}")
    return turns


def parted(names: str, sides: Sequence[Messages]) -> tuple[Messages, list[Any]]:
    """Split dialogues that differ in one last message, the assistant's.

    Args:
        names: What the dialogues are called in the message of an error.
        sides: The dialogues.

    Returns:
        The messages that all share, and the last message's content of each.

    Raises:
        InputError: They differ earlier, in their number of messages, or end with another speaker.
    """
    shared = [side[:-1] for side in sides]
    last = [side[-1] for side in sides if side and side[-1]["role"] == "assistant"]
    if len(last) < len(sides) or any(one != shared[0] for one in shared):
        raise InputError(f"{names} must differ in one last message, the assistant's")
    return shared[0], [message["content"] for message in last]


def answer_text(value: Any) -> Any:
    """The text of an answer that may be one message, or a list of one; else the value itself."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and ({"role", "content"} <= value.keys() or "value" in value):
        return value["content"] if "content" in value else value["value"]
    return value
