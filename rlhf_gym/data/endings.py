"""How a finished response ends, in token ids: decided here, and read by everybody.

* A response that an EOS ended is finished; one that the budget cut is not, and has no end.
* A reward model reads a finished response with one end, always the same: the *closing* of its own
  tokenizer. Which of its EOS ids a policy chose makes no difference.
* The closing of an answer in a chat is what the chat template writes after an assistant's message
  (``<|im_end|>`` and a line break, say), that of plain text is the tokenizer's EOS.
* A policy is fine-tuned to end with one of the ids at which its generation stops.
"""

from collections.abc import Collection, Sequence
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

ANSWER = "answer"
"""A text that no chat template changes or writes by itself, to find what comes after it."""

_turn_ends: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, list[int]]] = WeakKeyDictionary()


def closing_ids(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> list[int]:
    """What closes a finished response; nothing if the tokenizer has no EOS.

    Args:
        tokenizer: The tokenizer of the model that reads it.
        chat: Whether the prompt is chat messages.
    """
    ends = turn_end(tokenizer) if chat else []
    if ends or tokenizer.eos_token_id is None:
        return ends
    return [tokenizer.eos_token_id]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the chat template writes after an assistant's message; empty if it writes nothing.

    Empty too if the tokenizer has no template, or the template does not show the message.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        return []
    known = _turn_ends.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _turn_end(tokenizer)
    return known[template]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:
        return []
    _, shown, after = text.rpartition(ANSWER)
    # Some templates end with whitespace alone, which says nothing about where an answer ends.
    if not shown or not after.strip():
        return []
    return list(tokenizer(after, add_special_tokens=False)["input_ids"])


def end_of_policy(
    tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], *, chat: bool
) -> int | None:
    """The EOS id with which a policy's finished responses end, if tokenizer or template say it.

    Args:
        tokenizer: The policy's tokenizer.
        eos_ids: The ids at which its generation stops.
        chat: Whether the prompts are chat messages.

    Returns:
        The id; None if several are possible and nothing names one of them.
    """
    if chat:
        for i in turn_end(tokenizer):
            if i in eos_ids:
                return i
    return eos_ids[0] if len(eos_ids) == 1 else None


def closed(ids: Sequence[int], closing: Sequence[int], ends: Collection[int]) -> list[int]:
    """A finished response with exactly one end.

    Args:
        ids: The response; it may have an end already, one of `ends` or the whole closing.
        closing: What closes it.
        ends: Ids that end a response.
    """
    return [*opened(ids, closing, ends), *closing]


def opened(ids: Sequence[int], closing: Sequence[int], ends: Collection[int]) -> list[int]:
    """A response without the end that it may have."""
    ids = list(ids)
    n = len(closing)
    if n and ids[-n:] == list(closing):
        return ids[:-n]
    if ids and (ids[-1] in ends or (n and ids[-1] == closing[0])):
        return ids[:-1]
    return ids
