"""Prompts and answers as chat messages, from the ways in which public data writes dialogues."""

from collections.abc import Sequence
from typing import Any

from rlhf_gym.data.row_values import ROLES
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.cells import listed

Row = dict[str, Any]
Messages = list[dict[str, Any]]

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
    role = ROLES.get(str(one["from"]).lower())
    if role is None:
        raise InputError(f"a message is from {one['from']!r}, not {', '.join(ROLES)}")
    return {"role": role, "content": one["value"]}


def with_context(prompt: Any, row: Row) -> Any:
    """A prompt after the row's `system` message and its `history`, as chat messages.

    Args:
        prompt: A text or chat messages; returned as it is if the row has neither column.
        row: May have `system`, a text, and `history`, a list of [user, assistant] or of messages.

    Raises:
        InputError: `system` or `history` is something else, there are two system messages, or
            there is no prompt.
    """
    if all(row.get(name) is None for name in CONTEXT):
        return prompt
    if prompt is None:
        raise InputError(
            "system and history come before a prompt, and there is none; name its column: "
            "--columns prompt=COLUMN"
        )
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


def joined(prompt: Messages, shared: Messages) -> Messages:
    """A prompt and the messages that all dialogues share, which may repeat the prompt.

    They repeat it if they begin with its messages; system messages and white space around texts do
    not count. If they do not, they come after it.

    Raises:
        InputError: The two have different system messages, or the user would speak twice in a row.
    """
    spoken, said = _spoken(prompt), _spoken(shared)
    if said[: len(spoken)] != spoken:
        if spoken and said and spoken[-1][0] == said[0][0] == "user":
            raise InputError(
                "the prompt ends with the user, and the dialogues begin with another message of "
                f"the user: {str(spoken[-1][1])[:40]!r} and {str(said[0][1])[:40]!r}"
            )
        if spoken and said and any(one["role"] == "system" for one in shared):
            raise InputError("the dialogues come after the prompt, but have a system message")
        return [*prompt, *shared]
    systems = [[m["content"] for m in side if m["role"] == "system"] for side in (prompt, shared)]
    if all(systems) and systems[0] != systems[1]:
        raise InputError("the prompt has a system message, and the dialogues have another one")
    if systems[1]:
        return shared
    return [*(one for one in prompt if one["role"] == "system"), *shared]


def _spoken(messages: Messages) -> list[tuple[str, Any]]:
    """Role and text of each message but the system's, without white space around the texts."""
    return [
        (one["role"], text.strip() if isinstance(text := one["content"], str) else text)
        for one in messages
        if one["role"] != "system"
    ]


def answer_text(value: Any) -> Any:
    """The text of an answer that may be one message, or a list of one; else the value itself."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and ({"role", "content"} <= value.keys() or "value" in value):
        return value["content"] if "content" in value else value["value"]
    return value
