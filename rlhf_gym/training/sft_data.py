"""Data of supervised fine-tuning: tokenise texts, cut them to fit, and pack them into rows.

With packing, several examples share a row. Positions restart at 0 with each example, and from this
transformers' attention masks know that the examples must not see each other.

Notation: N rows, L columns.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.bad_rows import BadRows, RowError
from rlhf_gym.data.encoding import check_known, continued_ids
from rlhf_gym.data.endings import end_of_policy, opened, turn_end
from rlhf_gym.data.example_rows import example_of
from rlhf_gym.data.prompts import is_held_out
from rlhf_gym.data.row_reader import convert_rows
from rlhf_gym.data.row_values import Read
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import context_length
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.tokens import Sequences, model_ids, pad_rows

IGNORED = -100
"""The label of a token without loss, as transformers defines it."""


class SFTExample(NamedTuple):
    """A prompt and the response to learn, as token ids.

    Attributes:
        prompt_ids: The prompt. If the whole text is the response, only the BOS, or nothing.
        response_ids: The response.
        held_out: Whether the example is held out from training.
        chat: Whether the prompt was chat messages.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    held_out: bool = False
    chat: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt_ids + self.response_ids

    @property
    def start(self) -> int:
        """Index of the first token with a loss; at least 1, as nothing predicts the first token."""
        return max(len(self.prompt_ids), 1)


class SFTData(NamedTuple):
    """Training and held-out examples, none longer than `max_tokens`.

    Attributes:
        train: Examples to train on. Each ends with EOS unless it was cut.
        held_out: Examples to measure on, in the same form.
        max_tokens: Most tokens of an example, and the width of a packed row.
        eos_token_id: The EOS that ends the responses.
        cut: Number of responses that were too long and lost their end, EOS included.
        dropped: Number of examples left out because their prompt leaves no room for a response.
    """

    train: list[SFTExample]
    held_out: list[SFTExample]
    max_tokens: int
    eos_token_id: int
    cut: int
    dropped: int


def load_examples(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    *,
    column: str | None = None,
    held_out: float = 0.1,
    split: str = "train",
    bad_rows: BadRows | None = None,
) -> list[SFTExample]:
    """Read and tokenise examples. `prepare` adds the EOS to their responses later.

    A row has a prompt and a response in the columns of `rlhf_gym.data.example_rows`, or it is one
    plain text, which is all response, or one list of chat messages, of which the last is the
    response.

    Args:
        source: See `load_rows`.
        tokenizer: The model's tokenizer.
        eos_ids: The ids that end a response.
        column: Field with the text or the messages. None takes the documented columns (see
            `example_of`).
        held_out: Share of the examples that is held out, at least 0 and below 1. Examples with
            equal prompts are on the same side.
        split: Split of a folder or a dataset.
        bad_rows: If given, rows that are no example are left out and added to it.

    Raises:
        InputError: The source is missing or empty, rows have none of these forms (the message names
            the first ones), or `held_out` is out of range.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held_out must be at least 0 and below 1, not {held_out}")

    def convert(where: str, row: Any) -> Read[SFTExample]:
        (prompt, response), used, note = example_of(where, row, column)
        try:
            start, (rest,) = continued_ids(prompt, [response], tokenizer, eos_ids)
        except InputError as error:
            if not tokenizer.chat_template:  # no row can be at fault for that
                raise
            reason = "refused by the chat template"
            raise RowError(f"{where}: {error}", reason) from error
        held = is_held_out(prompt or response, held_out)
        example = SFTExample(tuple(start), tuple(rest), held, not isinstance(prompt, str))
        return Read(example, used, note)

    return convert_rows(source, convert, split=split, bad_rows=bad_rows, skip="--on-bad-row skip")


def prepare(
    lm: CausalLM,
    examples: Sequence[SFTExample],
    max_tokens: int,
    eos_token_id: int | None = None,
) -> SFTData:
    """Add an EOS to each response, and make every example fit into `max_tokens`.

    Args:
        lm: The model to train.
        examples: Examples from `load_examples`.
        max_tokens: Most tokens of an example. A longer response is cut; an example whose prompt
            leaves no room for a single response token is dropped.
        eos_token_id: One of the model's EOS ids. None takes the one with which the chat template
            ends an answer, for chats; else the one to which the untrained model gives the highest
            probability after these responses.

    Raises:
        InputError: `max_tokens` or `eos_token_id` does not fit the model, or no example is left to
            train on.
    """
    limit = context_length(lm.model)
    if not 2 <= max_tokens <= (limit or max_tokens):
        raise InputError(
            f"max_tokens is {max_tokens}, but it must be at least 2 and at most the model's "
            f"{limit} positions"
        )
    # A text may end with an EOS of its own, which need not be one at which generation stops, or
    # with all that the chat template writes after an answer.
    ends = {*lm.eos_ids, lm.tokenizer.eos_token_id}
    closing = turn_end(lm.tokenizer)
    bare = [e._replace(response_ids=tuple(opened(e.response_ids, closing, ends))) for e in examples]
    check_known((example.response_ids for example in examples), lm.tokenizer, "the examples")
    if eos_token_id is None:
        eos_token_id = own_end(lm, bare, max_tokens)
    if eos_token_id not in lm.eos_ids:
        raise InputError(
            f"eos_token_id is {eos_token_id}, but generation with this model ends at {lm.eos_ids}; "
            "choose one of these, or add it to the model's generation_config.json"
        )
    fitted, cut = [], 0
    for example in bare:
        response = (*example.response_ids, eos_token_id)
        room = max(max_tokens - len(example.prompt_ids), 0)
        short = example._replace(response_ids=response[:room])
        if len(short.ids) > short.start:
            fitted.append(short)
            cut += len(response) > room
    dropped = len(examples) - len(fitted)
    train = [example for example in fitted if not example.held_out]
    if not train:
        raise InputError(
            f"no example is left to train on: of {len(examples)}, {dropped} have prompts that do "
            f"not fit into max_tokens ({max_tokens}), and the others are held out; raise "
            "max_tokens, lower held_out, or give more examples"
        )
    held_out = [example for example in fitted if example.held_out]
    return SFTData(train, held_out, max_tokens, eos_token_id, cut, dropped)


def own_end(lm: CausalLM, examples: Sequence[SFTExample], max_tokens: int) -> int:
    """The EOS id with which the model's own responses end (see `rlhf_gym.data.endings`)."""
    chat = any(example.chat for example in examples)
    end = end_of_policy(lm.tokenizer, lm.eos_ids, chat=chat)
    return likeliest_eos(lm, examples, max_tokens) if end is None else end


def likeliest_eos(lm: CausalLM, examples: Sequence[SFTExample], max_tokens: int) -> int:
    """Return the EOS id with the highest mean log-prob after (some of) the responses.

    A model with several EOS ids uses different ones, for example at the end of a turn and of a
    document; its own probabilities show which one it uses after such responses.
    """
    some = [example.ids for example in examples if 0 < len(example.ids) < max_tokens][:32]
    if len(lm.eos_ids) == 1 or not some:
        return lm.eos_ids[0]
    lengths = torch.tensor([len(ids) for ids in some])

    def mean(eos: int) -> float:
        rows = torch.from_numpy(pad_rows([[*ids, eos] for ids in some]))
        ends = Sequences(rows, lengths, torch.ones_like(lengths))
        return float(lm.log_probs(ends.to(lm.device)).mean())

    return max(lm.eos_ids, key=mean)


def pack(examples: Sequence[SFTExample], max_tokens: int) -> list[list[SFTExample]]:
    """Pack examples into few rows of at most `max_tokens` tokens (best-fit decreasing)."""
    rows: list[list[SFTExample]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for example in sorted(examples, key=lambda e: len(e.ids), reverse=True):
        at = bisect_left(free, (len(example.ids), 0))
        if at == len(free):
            free.append((max_tokens, len(rows)))
            rows.append([])
        left, row = free.pop(at)
        rows[row].append(example)
        insort(free, (left - len(example.ids), row))
    return rows


def collate(rows: Sequence[Sequence[SFTExample]]) -> dict[str, Tensor]:
    """Turn rows of one or more examples into inputs of a causal LM.

    Returns:
        input_ids, position_ids (from 0 for each example, and again for the padding after the last)
        and labels (`IGNORED` for tokens without loss), each (N, L) int64.
    """
    tokens = torch.from_numpy(pad_rows([[t for e in row for t in e.ids] for row in rows]))
    labels = torch.full_like(tokens, IGNORED)
    positions = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        at = 0
        for example in row:
            end = at + len(example.ids)
            labels[i, at + example.start : end] = tokens[i, at + example.start : end]
            positions[i, at:end] = torch.arange(end - at)
            at = end
        positions[i, at:] = torch.arange(tokens.shape[1] - at)
    return {"input_ids": model_ids(tokens), "position_ids": positions, "labels": labels}


def collate_alone(rows: Sequence[Sequence[SFTExample]]) -> dict[str, Tensor]:
    """Turn rows of one example each into inputs without positions, which the model then makes."""
    inputs = collate(rows)
    del inputs["position_ids"]
    return inputs


def as_sequences(examples: Sequence[SFTExample]) -> Sequences:
    """Return the examples as sequences, one per row; the tokens with a loss are the chosen ones."""
    starts = torch.tensor([e.start for e in examples])
    lengths = torch.tensor([len(e.ids) for e in examples]) - starts
    return Sequences(torch.from_numpy(pad_rows([e.ids for e in examples])), starts, lengths)
