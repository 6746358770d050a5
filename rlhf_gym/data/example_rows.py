"""Examples to learn from: which columns of a row are the prompt and the response."""

from typing import Any

from rlhf_gym.data.bad_rows import RowError
from rlhf_gym.data.prompt_rows import chosen_column, instructed
from rlhf_gym.data.prompts import Prompt
from rlhf_gym.data.row_values import Read, field, plain, with_system

PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
)
"""Columns of a prompt and its response. The first pair that a row has is read."""

WHOLE = ("messages", "conversations", "text")
"""Columns of a whole chat or text. The first is read if a row has no pair."""


def example_of(where: str, row: Any, column: str | None = None) -> Read[tuple[Prompt, str]]:
    """The prompt and the response of a row; the prompt of a plain text is "".

    Args:
        where: Name of the row.
        row: A text, chat messages of which the last is the response, or an object.
        column: The column with the text or the chat messages. None takes the first of `PAIRS`, or
            else of `WHOLE`, that there is.

    Raises:
        RowError: The row has no prompt and response.
    """
    if not isinstance(row, dict):
        return Read(_whole(where, plain(where, row)))
    pair = next((p for p in PAIRS if row.keys() >= {*p}), None) if column is None else None
    if pair is not None:
        return _pair(where, row, *pair)
    name = _whole_column(where, row, column)
    value, used = field(where, row, name), [name]
    if isinstance(value, list):
        value = with_system(where, row, value)
        used.append("system")
    return Read(_whole(where, value), tuple(used))


def _whole_column(where: str, row: dict[str, Any], column: str | None) -> str:
    try:
        return chosen_column(where, row, column, WHOLE, "--column")
    except RowError as error:
        if column is not None:
            raise
        pairs = ", ".join(" and ".join(pair) for pair in PAIRS)
        message = str(error).replace("has no column ", f"has not {pairs}, and no column ", 1)
        raise RowError(message, error.reason) from error


def _pair(where: str, row: dict[str, Any], first: str, second: str) -> Read[tuple[Prompt, str]]:
    prompt, used = field(where, row, first), [first, second, "system"]
    if first == "instruction":
        prompt = instructed(where, row, prompt)
        used.append("input")
    response = field(where, row, second)
    if isinstance(response, str):
        return Read((with_system(where, row, prompt), response), tuple(used))
    if isinstance(prompt, str):
        raise RowError(
            f"{where}: a response in chat messages needs a prompt in chat messages",
            "a prompt in text with a response in messages",
        )
    return Read(_whole(where, with_system(where, row, [*prompt, *response])), tuple(used))


def _whole(where: str, value: Prompt) -> tuple[Prompt, str]:
    if isinstance(value, str):
        return "", value
    if len(value) < 2:
        raise RowError(f"{where}: a response needs a message before it", "one message")
    if value[-1]["role"] != "assistant":
        raise RowError(
            f"{where}: the last message is the response, so it must be the assistant's",
            "the last message is not the assistant's",
        )
    if value[-1].get("tool_calls"):
        raise RowError(
            f"{where}: the response calls a tool, which is no text; write the call into its "
            "content, as the model's chat template does",
            "a response that calls a tool",
        )
    return value[:-1], value[-1]["content"]
