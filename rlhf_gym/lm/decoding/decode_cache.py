"""The last hidden states of growing rows, without computing a token twice.

`SlotDecoder` decodes; `DecodeCache` is a memo on top of it, and its answers never depend on what it
remembers. Models that slots cannot decode get full forwards.
"""

import logging
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from rlhf_gym.lm.architecture import has_full_attention
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.cuda_graphs import broken
from rlhf_gym.lm.decoding.kv_slots import SlotDecoder
from rlhf_gym.lm.precision import Precision
from rlhf_gym.lm.probe import agrees
from rlhf_gym.tokens import PAD, Sequences, longest_extensions, model_ids, row_lengths

logger = logging.getLogger(__name__)

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers write parameters without raising their version counters, so `DecodeCache`
# compares the number of optimiser steps as well as the versions.
register_optimizer_step_post_hook(_count_step)

Method = Literal["graphs", "slots", "full forwards"]
"""How a model is decoded, the fastest first."""

_methods: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, Precision], Method]] = (
    WeakKeyDictionary()
)


def supports_slots(lm: CausalLM) -> bool:
    """Whether slots are exact for this model: no window in its config, and a probe agrees."""
    return _method(lm) != "full forwards"


def takes_graphs(lm: CausalLM) -> bool:
    """Whether a step can be replayed as a CUDA graph: on a GPU, if a probe agrees."""
    return _method(lm) == "graphs" and not broken()


def _method(lm: CausalLM) -> Method:
    known = _methods.setdefault(lm.model, {})
    # On a GPU the two precisions are captured separately; on a CPU slots work in either.
    on = (lm.device.type, lm.precision if lm.device.type == "cuda" else "fp32")
    if on not in known:
        known[on] = _probe(lm)
    return known[on]


def _probe(lm: CausalLM) -> Method:
    """The fastest method that gives this model's numbers; each fallback is logged once."""
    on_gpu = lm.device.type == "cuda"
    if has_full_attention(lm.model):
        if on_gpu and _decodes(lm, fixed=True):
            return "graphs"
        if _decodes(lm, fixed=False):
            if on_gpu:
                logger.warning(
                    "%s cannot be captured as a CUDA graph; decoding it without graphs",
                    type(lm.model).__name__,
                )
            return "slots"
    logger.warning(
        "%s keeps more than plain attention state; decoding it by full forwards",
        type(lm.model).__name__,
    )
    return "full forwards"


def _decodes(lm: CausalLM, *, fixed: bool) -> bool:
    """Decode two short rows of different lengths in slots and by a full forward."""
    plain = replace(lm, precision="fp32")  # bfloat16's rounding would hide small errors
    if not fixed:
        lm = plain
    width = 8
    rows = torch.arange(2 * width, device=lm.device).reshape(2, width) % lm.vocab_size
    rows[1, width - 2 :] = PAD

    def in_slots() -> Tensor:
        decoder = SlotDecoder(lm, 2, width, fixed=fixed)
        short = torch.where(torch.arange(width, device=lm.device) < width - 4, rows, PAD)
        short[1, width - 6 :] = PAD
        positions = row_lengths(short)
        hidden = decoder.prefill(torch.arange(2, device=lm.device), short)
        for _ in range(4):
            hidden = decoder.step(rows[[0, 1], positions], positions)
            positions = positions + 1
        return hidden

    tolerance = 1e-3 if lm.precision == "fp32" else 0.05
    return agrees(lm.model, in_slots, lambda: last_hidden(plain, rows), tolerance)


class DecodeCache:
    """The last hidden state of every row, remembering what earlier calls computed.

    Rows that grew by one token cost one decode step, new rows one prefill, unchanged rows nothing.
    The answer never depends on what is remembered: everything is dropped when a parameter of the
    model changes, and in training mode the memory is neither read nor written. Values written
    through ``parameter.data`` change no version counter: call `clear` after that.

    Args:
        lm: The model. Families that `SlotDecoder` cannot decode get full forwards instead.
    """

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self._slotted = supports_slots(lm)
        self._decoder: SlotDecoder | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        if self._decoder is not None:
            self._decoder.release()
        self._decoder = None
        self._tokens: Tensor | None = None  # (N, L) rows in the slots
        self._hidden: Tensor | None = None  # (N, d) their last hidden states
        self._versions: tuple[object, ...] = ()

    @torch.no_grad()
    def last_hidden(self, tokens: Tensor) -> Tensor:
        """Hidden state at each row's last real token: (N, L) -> (N, d); no gradient."""
        if not self._slotted or self.lm.model.training:
            return last_hidden(self.lm, tokens)
        # Version counters show in-place changes, such as `load_state_dict`; pointers show new
        # storage; the number of steps shows fused optimisers, which raise no version.
        versions = (
            _optimizer_steps,
            *((p._version, p.data_ptr()) for p in self.lm.model.parameters()),
        )
        if self._tokens is None or versions != self._versions or self._tokens.shape != tokens.shape:
            self.clear()
            self._versions = versions
            self._decoder = SlotDecoder(self.lm, *tokens.shape, fixed=takes_graphs(self.lm))
            self._tokens = torch.full_like(tokens, PAD)
        assert self._decoder is not None
        new, grown, last = self._compare(tokens)
        if new.any():
            self._store(new, self._decoder.prefill(new.nonzero()[:, 0], tokens[new]))
        if grown.any():
            # One step for all rows is cheaper than selecting some. A row that did not grow writes
            # the keys and values of its last token again, in the same place.
            every = torch.arange(len(tokens), device=tokens.device)
            step = self._decoder.step(model_ids(tokens[every, last]), last)
            self._store(grown, step[grown])
        self._tokens = tokens.clone()
        assert self._hidden is not None
        return self._hidden.clone()

    def _compare(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New rows, rows that grew by one token, both (N,) bool, and each last column (N,)."""
        assert self._tokens is not None
        lengths, held = row_lengths(tokens), row_lengths(self._tokens)
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        prefix = ((tokens == self._tokens) | (columns >= held[:, None])).all(1) & (held > 0)
        grown = prefix & (lengths == held + 1)
        same = prefix & (lengths == held)
        return ~(grown | same), grown, lengths - 1

    def _store(self, rows: Tensor, hidden: Tensor) -> None:
        if self._hidden is None:
            self._hidden = hidden.new_zeros(len(rows), hidden.shape[-1])
        self._hidden[rows] = hidden


def last_hidden(lm: CausalLM, tokens: Tensor) -> Tensor:
    """Hidden state at each row's last real token by a full forward: (N, L) -> (N, d).

    A row that is a prefix of another row is read off that row's pass: an agent that learns token by
    token asks for many states of one response.
    """
    lengths = row_lengths(tokens)
    kept, place = np.unique(longest_extensions(tokens.cpu().numpy()), return_inverse=True)
    held, at = (torch.from_numpy(x).to(tokens.device) for x in (kept, place))
    first = lengths[held].scatter_reduce(0, at, lengths, "amin")
    asked = lengths[held] - first + 1
    # `states` gives the state before each chosen token; one more column makes the state after the
    # last token one of them.
    grown = torch.nn.functional.pad(tokens[held], (0, 1), value=PAD)
    states = lm.states(Sequences(grown, first, asked))
    return states[(torch.cumsum(asked, 0) - asked)[at] + lengths - first[at]]
