"""The last hidden states of growing rows, without computing a token twice.

`SlotDecoder` or `OwnCacheDecoder` decodes; `DecodeCache` is a memo on top of them, and its answers
never depend on what it remembers. Models that neither can decode get full forwards.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.kv_slots import SlotDecoder
from rlhf_gym.lm.decoding.method import decoding_method, takes_graphs
from rlhf_gym.lm.decoding.own_cache import OwnCacheDecoder
from rlhf_gym.tokens import PAD, Sequences, longest_extensions, model_ids, row_lengths

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers write parameters without raising their version counters, so `DecodeCache`
# compares the number of optimiser steps as well as the versions.
register_optimizer_step_post_hook(_count_step)


class DecodeCache:
    """The last hidden state of every row, remembering what earlier calls computed.

    Rows that grew by one token cost one decode step, new rows one prefill, unchanged rows nothing.
    A model that decodes with its own cache advances all rows together: if some rows did not grow by
    one token, all are prefilled.
    The answer never depends on what is remembered: everything is dropped when a parameter of the
    model changes, and in training mode the memory is neither read nor written. Values written
    through ``parameter.data`` change no version counter: call `clear` after that.

    Args:
        lm: The model. Families that no decoder serves get full forwards instead.
    """

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        # Methods are tried now, so that the first step costs no more than the next. For rows that
        # outgrow a window they are tried when such rows come.
        decoding_method(lm, 1)
        self._decoder: SlotDecoder | OwnCacheDecoder | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        if isinstance(self._decoder, SlotDecoder):
            self._decoder.release()
        self._decoder = None
        self._tokens: Tensor | None = None  # (N, L) rows in the decoder
        self._hidden: Tensor | None = None  # (N, d) their last hidden states
        self._versions: tuple[object, ...] = ()

    @torch.no_grad()
    def last_hidden(self, tokens: Tensor) -> Tensor:
        """Hidden state at each row's last real token: (N, L) -> (N, d); no gradient."""
        if self.lm.model.training:
            return last_hidden(self.lm, tokens)
        method = decoding_method(self.lm, tokens.shape[1])
        if method == "full forwards":
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
            self._tokens = torch.full_like(tokens, PAD)
        new, grown, last = self._compare(tokens)
        if method == "own cache":
            self._advance_together(tokens, new, grown, last)
        else:
            self._advance_each(tokens, new, grown, last)
        self._tokens = tokens.clone()
        assert self._hidden is not None
        return self._hidden.clone()

    def _advance_each(self, tokens: Tensor, new: Tensor, grown: Tensor, last: Tensor) -> None:
        if not isinstance(self._decoder, SlotDecoder):
            fixed = takes_graphs(self.lm, tokens.shape[1])
            self._decoder = SlotDecoder(self.lm, *tokens.shape, fixed=fixed)
        if new.any():
            self._store(new, self._decoder.prefill(new.nonzero()[:, 0], tokens[new]))
        if grown.any():
            # One step for all rows is cheaper than selecting some. A row that did not grow writes
            # the keys and values of its last token again, in the same place.
            every = torch.arange(len(tokens), device=tokens.device)
            step = self._decoder.step(model_ids(tokens[every, last]), last)
            self._store(grown, step[grown])

    def _advance_together(self, tokens: Tensor, new: Tensor, grown: Tensor, last: Tensor) -> None:
        if isinstance(self._decoder, OwnCacheDecoder) and bool(grown.all()):
            every = torch.arange(len(tokens), device=tokens.device)
            self._hidden = self._decoder.step(tokens[every, last])
        elif bool((new | grown).any()):
            self._decoder = OwnCacheDecoder(self.lm, tokens, tokens.shape[1])
            self._hidden = self._decoder.hidden

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
