"""Prompts of files and datasets: which columns of a row are the prompt."""

from typing import Any

from rlhf_gym.data.bad_rows import BadRows, RowError
from rlhf_gym.data.prompts import Prompt
from rlhf_gym.data.row_reader import convert_rows
from rlhf_gym.data.row_values import CHATS, Read, field, optional_text, plain, with_system

PROMPT_COLUMNS = (
    "prompt",
    "text",
    "messages",
    "question",
    "instruction",
    "query",
    "conversations",
)
"""Columns that are a prompt, if none is named. The first that a row has is read."""

ANSWERED = "the assistant's messages at the end of a prompt are answers to it, and are left out"


def load_texts(
    source: str,
    *,
    column: str | None = None,
    split: str = "train",
    revision: str | None = None,
    bad_rows: BadRows | None = None,
) -> list[Prompt]:
    """Prompts from a local file or a dataset of the `datasets` library.

    Args:
        source: See `load_rows`.
        column: The field to read if a row is an object; None takes the first of `PROMPT_COLUMNS`.
        split: Split of a folder or a dataset.
        revision: Commit or tag of a hub dataset.
        bad_rows: If given, rows without a prompt are left out and added to it.

    Raises:
        InputError: The source is missing or empty, or rows have no prompt; the message names the
            first of them.
    """

    def convert(where: str, row: Any) -> Read[Prompt]:
        return unanswered(where, prompt_of(where, row, column))

    return convert_rows(
        source,
        convert,
        split=split,
        revision=revision,
        bad_rows=bad_rows,
        skip="on_bad_row='skip' (in commands --env-kwargs on_bad_row skip)",
    )


def prompt_of(where: str, row: Any, column: str | None = None) -> Read[Prompt]:
    """The prompt of a row.

    Args:
        where: Name of the row.
        row: A text, chat messages, or an object with one of them in a column.
        column: The column. None takes the first of `PROMPT_COLUMNS` that there is, with `input`
            after an `instruction`, and a column `system` as the system message. A column that is
            named is read without `input`, and `system` belongs only to chat messages in it.

    Raises:
        RowError: The row has no prompt.
    """
    if not isinstance(row, dict):
        return Read(plain(where, row))
    name = chosen_column(where, row, column, PROMPT_COLUMNS, "prompt_column")
    prompt, used = field(where, row, name), [name]
    if column is None and name == "instruction":
        prompt = instructed(where, row, prompt)
        used.append("input")
    if column is None or isinstance(prompt, list):
        prompt = with_system(where, row, prompt)
        used.append("system")
    return Read(prompt, tuple(used))


def chosen_column(
    where: str, row: dict[str, Any], column: str | None, guesses: tuple[str, ...], option: str
) -> str:
    """The column that is named, or the first of the guesses that the row has.

    Raises:
        RowError: The row lacks it.
    """
    names = guesses if column is None else (column,)
    for name in names:
        if name in row:
            return name
    *others, last = names
    wanted = f"{', '.join(others)} or {last}" if others else repr(last)
    raise RowError(
        f"{where} has no column {wanted}; it has {', '.join(sorted(map(str, row))) or 'none'}; "
        f"name the column to read with {option}",
        "no such column",
    )


def instructed(where: str, row: dict[str, Any], instruction: Prompt) -> Prompt:
    """An instruction, and after an empty line the row's `input` if it is not empty.

    Raises:
        RowError: The instruction is messages, but the row has an input, or this is not a text.
    """
    more = optional_text(where, row, "input")
    if not more:
        return instruction
    if isinstance(instruction, str):
        return f"{instruction}\n\n{more}"
    raise RowError(f"{where}: an input cannot follow an instruction in messages", "not a text")


def unanswered(where: str, read: Read[Prompt]) -> Read[Prompt]:
    """A prompt without the answer at its end, if it was read from a whole chat.

    A column that is a prompt by its name may end with the beginning of an answer (a prefill), which
    the policy continues.

    Raises:
        RowError: It has no message before the answer, or only a system message.
    """
    prompt = read.value
    if isinstance(prompt, str):
        return read
    end = len(prompt)
    if not read.used or read.used[0] in CHATS:
        while end and prompt[end - 1]["role"] == "assistant":
            end -= 1
    if all(message["role"] == "system" for message in prompt[:end]):
        raise RowError(f"{where}: the chat has no message of the user", "no message of the user")
    return read if end == len(prompt) else read._replace(value=prompt[:end], note=ANSWERED)
