"""Prompt + response as token ids: the one encoder, for the policy, reward models and fine-tuning.

Each caller says what it needs:

* `prompt_ids`: a prompt alone, as a policy reads it before it answers;
* `continued_ids`: responses that continue a prompt, without an end (fine-tuning chooses the EOS);
* `read_ids`: the same as a causal reward model reads them: finished ones have its end (see
  `rlhf_gym.data.endings`), unfinished ones have none;
* `joined_ids`: prompt and response as one text, as an encoder (BERT …) reads them.

A text may have its BOS or EOS already, because a chat template wrote it; it gets no second one.

Ids that were sampled are never made here: who has them keeps them, EOS included (see
`Comparison.encode` and `Objective`).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakSet

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.endings import closed, closing_ids, opened
from rlhf_gym.data.prompts import Prompt
from rlhf_gym.errors import InputError

logger = logging.getLogger(__name__)

MOST_UNKNOWN = 0.1
"""Share of unknown tokens above which a model is not trained on texts."""

ANCHORS = ("\n", ":", "a")
"""Texts to tokenise in front of a response so that it does not open a text."""

_named: "WeakSet[PreTrainedTokenizerBase]" = WeakSet()


class Encoded(NamedTuple):
    """A prompt and the responses to it as token ids.

    Attributes:
        prompt: Ids of the prompt; empty if the responses contain it.
        responses: Ids of each response.
    """

    prompt: list[int]
    responses: list[list[int]]

    @property
    def rows(self) -> list[list[int]]:
        """Ids of prompt and response together, for each response."""
        return [[*self.prompt, *response] for response in self.responses]


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as one text; chat messages by the tokenizer's template.

    A chat that ends with an assistant's message is continued there (a prefill).

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
    begun = prompt[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            tokenize=False,
        )
    # A ValueError: the template does not show the message that is to be continued.
    except (TemplateError, ValueError) as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} refuses {str(prompt)[:80]}: {error}"
        ) from error
    return str(text)


def prompt_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]
) -> list[int]:
    """Token ids of a prompt: with a BOS if the tokenizer adds one, never closed by an EOS.

    Args:
        prompt: Text or chat messages.
        tokenizer: The model's tokenizer.
        eos_ids: The ids that end a response.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    if not isinstance(prompt, str):
        return _chat_ids([_opening(prompt, tokenizer)[0]], tokenizer)[0]
    before, bare, after = _parts(prompt, tokenizer)
    # Some tokenizers close every text with an EOS (T5's do); here the response is still to come.
    # An EOS that the text itself names is in `bare`, and stays.
    if after and after[-1] in eos_ids and (before or bare or len(after) > 1):
        after = after[:-1]
    return [*before, *bare, *after]


def _parts(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, the text's own ids, those after it.

    Special tokens that the text has already are not repeated.
    """
    ids = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    n = len(bare)
    at = next((i for i in range(len(ids) - n + 1) if ids[i : i + n] == bare), None)
    if at is None:
        return [], ids, []
    before, after = ids[:at], ids[at + n :]
    before = [] if before and bare[: len(before)] == before else before
    after = [] if after and bare[n - len(after) :] == after else after
    return before, bare, after


def _is_unsure(row: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a special token at either end of a row may be there twice."""
    special = tokenizer.all_special_ids
    return len(row) > 1 and any(
        one == other and one in special for one, other in (row[:2], row[-2:])
    )


def _opening(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A prompt's text, and the spaces at its end that belong to the response.

    A template that ends in "Assistant: " leaves the space to the response: tokenizers join a space
    with the word after it, so a prompt that ends with one is no beginning of such a text. A prompt
    that is text stays as its author wrote it.
    """
    text = prompt_text(prompt, tokenizer)
    if isinstance(prompt, str) or prompt[-1]["role"] == "assistant":
        return text, ""
    bare = text.rstrip(" ")
    return bare, text[len(bare) :]


def many_prompt_ids(
    prompts: Sequence[Prompt | tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """`prompt_ids` of many prompts; ids stay as they are.

    All texts go through the tokenizer in one call, many times faster than one by one.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    tokenised = iter(tokenizer(texts)["input_ids"] if texts else [])
    rows = []
    for prompt in prompts:
        if isinstance(prompt, tuple):
            rows.append(list(prompt))
        elif isinstance(prompt, str):
            row = list(next(tokenised))
            # A text that ends with an EOS, or has one special token twice, needs the second look of
            # `prompt_ids`: is it the text's own or the tokenizer's?
            unsure = (len(row) > 1 and row[-1] in eos_ids) or _is_unsure(row, tokenizer)
            rows.append(prompt_ids(prompt, tokenizer, eos_ids) if unsure else row)
        else:
            rows.append(prompt_ids(prompt, tokenizer, eos_ids))
    return rows


def continued_ids(
    prompt: Prompt,
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
) -> Encoded:
    """A prompt and the responses that continue it, with no EOS added.

    Prompt and response are tokenised as one text and split where the prompt ends. Where a tokenizer
    would merge across this border ("ti" + "me"), the response is tokenised by itself, in such a way
    that the two read as one text. If that cannot be, a warning says so, once per tokenizer.

    Args:
        prompt: Text or chat messages.
        responses: Texts.
        tokenizer: The model's tokenizer.
        eos_ids: The ids that end a response.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    start = prompt_ids(prompt, tokenizer, eos_ids)
    opening, space = _opening(prompt, tokenizer)
    responses = [_after(space, text) for text in responses]
    if isinstance(prompt, str):
        wholes = many_prompt_ids([opening + text for text in responses], tokenizer, eos_ids)
    else:
        wholes = _chat_ids([opening + text for text in responses], tokenizer)
    rest = [
        whole[len(start) :]
        if whole[: len(start)] == start
        else _by_itself(start, whole, text, tokenizer)
        for whole, text in zip(wholes, responses, strict=True)
    ]
    return Encoded(start, rest)


def _after(space: str, response: str) -> str:
    """A response with the spaces that its prompt left to it, unless it has its own."""
    return response if response[:1].isspace() else space + response


def _by_itself(
    start: list[int], whole: list[int], response: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of a response after a prompt that is no prefix of the two as one text."""
    wanted = _read(whole, tokenizer)
    alone = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    if _read([*start, *alone], tokenizer) == wanted:
        return alone
    # Tokenizers in the manner of Llama 2 put a space at the beginning of each text. After another
    # text there is none.
    for anchor in ANCHORS:
        before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        both = tokenizer(anchor + response, add_special_tokens=False)["input_ids"]
        ids = list(both[len(before) :])
        if both[: len(before)] == before and _read([*start, *ids], tokenizer) == wanted:
            return ids
    if tokenizer not in _named:
        _named.add(tokenizer)
        logger.warning(
            "the tokenizer %r cannot keep a prompt's ids and read on where the response begins: "
            "the two are %r as one text, but %r here; end prompts between two words",
            tokenizer.name_or_path,
            wanted[-60:],
            _read([*start, *alone], tokenizer)[-60:],
        )
    return alone


def _read(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def read_ids(
    prompt: Prompt,
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    finished: Sequence[bool],
) -> Encoded:
    """`continued_ids` as a causal reward model reads them.

    Args:
        prompt: Text or chat messages.
        responses: Texts.
        tokenizer: The model's tokenizer.
        finished: For each response whether it ended by itself, and so has the model's end.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    closing = closing_ids(tokenizer, chat=not isinstance(prompt, str))
    ends = closing_ids(tokenizer, chat=False)
    start, rest = continued_ids(prompt, responses, tokenizer, ends)
    return Encoded(
        start,
        [
            (closed if whole else opened)(ids, closing, ends)
            for ids, whole in zip(rest, finished, strict=True)
        ],
    )


def joined_ids(
    prompt: Prompt, responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Prompt and response as one text, with all special tokens that the tokenizer adds.

    An encoder has its own special tokens ([CLS] … [SEP]) at fixed places, and no EOS to close with.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    opening, space = _opening(prompt, tokenizer)
    return Encoded(
        [], many_prompt_ids([opening + _after(space, text) for text in responses], tokenizer, ())
    )


def decodes_to(ids: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token ids decode to a text, whitespace ignored.

    Tokenizers treat spaces at the border of two texts in many ways; and a text may name its special
    tokens or leave them out, so both decodings count.
    """
    wanted = "".join(text.split())
    return any(
        "".join(str(tokenizer.decode(list(ids), skip_special_tokens=skip)).split()) == wanted
        for skip in (True, False)
    )


def unknown_share(rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the ids of some rows that are the tokenizer's <unk>."""
    unknown = tokenizer.unk_token_id
    # GPT-2's <unk> is its EOS, and its bytes leave nothing unknown.
    if unknown is None or unknown == tokenizer.eos_token_id:
        return 0.0
    counts = Counter(token == unknown for row in rows for token in row)
    return counts[True] / max(counts.total(), 1)


def check_known(
    rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, what: str
) -> None:
    """Check that a tokenizer knows the texts that a model is to learn from.

    Args:
        rows: Their ids.
        tokenizer: The tokenizer.
        what: What the texts are, for the message.

    Raises:
        InputError: More than a tenth of the ids are its <unk>.
    """
    share = unknown_share(rows, tokenizer)
    if share > MOST_UNKNOWN:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} does not know {share:.0%} of the tokens "
            f"of {what}, which would all be one; take a model whose tokenizer knows them (in "
            "rlhf: --env rlhf_gym/Text-v0 --env-kwargs reference MODEL prompts FILE)"
        )


def _chat_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of rendered chats, whose template has written all special tokens already."""
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
