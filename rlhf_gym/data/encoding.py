"""Prompt + response as token ids: the one encoder, for the policy, reward models and fine-tuning.

Each caller says what it needs:

* `prompt_ids`: a prompt alone, as a policy reads it before it answers;
* `continued_ids`: responses that continue a prompt, still open (fine-tuning chooses the EOS);
* `closed_ids`: the same, closed by the tokenizer's EOS, as a causal reward model reads them;
* `joined_ids`: prompt and response as one text, as an encoder (BERT …) reads them.

Ids that were sampled are never made here: who has them keeps them, EOS included (see
`Comparison.encode` and `Objective`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.prompts import Prompt
from rlhf_gym.errors import InputError


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


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What closes a response that is text: the tokenizer's EOS, or nothing if it has none.

    This is the only place that decides it. A response is closed even if its own text ends with the
    EOS token: the text says nothing about how sampling ended.
    """
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


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
    """Token ids of a prompt: with a BOS if the tokenizer adds one, never closed by an EOS.

    Args:
        prompt: Text or chat messages.
        tokenizer: The model's tokenizer.
        eos_ids: The ids that end a response.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    if not isinstance(prompt, str):
        return _chat_ids([prompt_text(prompt, tokenizer)], tokenizer)[0]
    ids = list(tokenizer(prompt)["input_ids"])
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # Some tokenizers close every text with an EOS (T5's do); here the response is still to come.
    # An EOS that the text itself names is in `bare` too, and stays.
    if len(ids) > 1 and ids[-1] in eos_ids and bare[-1:] != ids[-1:]:
        ids.pop()
    return ids


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
            # Only a text that ends with an EOS needs the second look of `prompt_ids`: is the EOS
            # the text's own or the tokenizer's?
            closed = len(row) > 1 and row[-1] in eos_ids
            rows.append(prompt_ids(prompt, tokenizer, eos_ids) if closed else row)
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

    Prompt and response are tokenised as one text if the prompt's tokens stay the same in it. A
    tokenizer that opens each text with a space would otherwise put a space between the two.

    Args:
        prompt: Text or chat messages.
        responses: Texts.
        tokenizer: The model's tokenizer.
        eos_ids: The ids that end a response.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    start = prompt_ids(prompt, tokenizer, eos_ids)
    if isinstance(prompt, str):
        wholes = many_prompt_ids([prompt + text for text in responses], tokenizer, eos_ids)
    else:
        opening = prompt_text(prompt, tokenizer)
        wholes = _chat_ids([opening + text for text in responses], tokenizer)
    alone = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    rest = [
        # At a border such as "ab" + "c" a tokenizer may merge across it ("a", "bc"). Then there is
        # no exact continuation, and the response is tokenised by itself.
        list(whole[len(start) :] if whole[: len(start)] == start else by_itself)
        for whole, by_itself in zip(wholes, alone, strict=True)
    ]
    return Encoded(start, rest)


def closed_ids(
    prompt: Prompt, responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """`continued_ids`, each response closed by the tokenizer's EOS (`closing_ids`).

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    eos = closing_ids(tokenizer)
    start, rest = continued_ids(prompt, responses, tokenizer, eos)
    return Encoded(start, [[*ids, *eos] for ids in rest])


def joined_ids(
    prompt: Prompt, responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Prompt and response as one text, with all special tokens that the tokenizer adds.

    An encoder has its own special tokens ([CLS] … [SEP]) at fixed places, and no EOS to close with.

    Raises:
        InputError: Chat messages, but the tokenizer has no chat template.
    """
    opening = prompt_text(prompt, tokenizer)
    return Encoded([], [list(tokenizer(opening + text)["input_ids"]) for text in responses])


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


def _chat_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of rendered chats, whose template has written all special tokens already."""
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
