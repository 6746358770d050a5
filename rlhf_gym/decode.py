"""Incremental decoding: keys and values in fixed slots, each row at its own position.

`SlotDecoder` is the engine, `DecodeCache` a memo on top of it, whose answers never depend on what
it happens to hold. transformers' static cache writes one shared position for all rows; here rows
differ in length, come and go.
"""

import logging
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_gym.attention import for_a_step
from rlhf_gym.lm import CausalLM
from rlhf_gym.models import cache_name
from rlhf_gym.passes import tokens_per_pass
from rlhf_gym.tokens import PAD, Sequences, holders, model_ids, row_lengths

logger = logging.getLogger(__name__)

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers write parameters without raising their version counters.
register_optimizer_step_post_hook(_count_step)


class _Slots:
    """Where the next keys and values go, shared by all layers of a cache."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self.prefill: Tensor | None = None  # rows being prefilled, else decoding
        self.positions: Tensor = torch.zeros(0, dtype=torch.int64)  # (rows,) column to write
        self.visible = 0  # columns that any row may look at


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (rows, heads, width, head_dim)."""

    is_compileable = False
    is_sliding = False

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.slots.rows, key_states.shape[1], self.slots.width)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        slots = self.slots
        if slots.prefill is not None:
            # New rows see nothing but themselves: attention runs on what came in.
            self.keys[slots.prefill, :, : key_states.shape[2]] = key_states
            self.values[slots.prefill, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        every = torch.arange(len(key_states), device=key_states.device)
        self.keys[every, :, slots.positions] = key_states[:, :, 0]
        self.values[every, :, slots.positions] = value_states[:, :, 0]
        return self.keys[:, :, : slots.visible], self.values[:, :, : slots.visible]

    def keep(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.slots.prefill is not None:
            return query_length, 0
        return self.slots.visible, 0

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always passed; nothing may be derived from a length

    def get_max_length(self) -> int:
        return self.slots.width

    def get_max_cache_shape(self) -> int:  # the older name of get_max_length
        return self.slots.width


_served: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def supports_slots(lm: CausalLM) -> bool:
    """Whether slots serve this model exactly: no window in its config, and a probe agrees."""
    if lm.model not in _served:
        _served[lm.model] = looks_plain(lm.model) and _probe_agrees(lm)
        if not _served[lm.model]:
            logger.warning(
                "%s keeps more than plain attention state; decoding it by full forwards",
                type(lm.model).__name__,
            )
    return _served[lm.model]


def looks_plain(model: PreTrainedModel) -> bool:
    """Whether every layer attends to everything before it, as far as the config says."""
    config = model.config.get_text_config()
    options = config.to_dict()
    windows = [
        name
        for name, value in options.items()
        if "window" in name and isinstance(value, int) and not isinstance(value, bool)
    ]
    # Qwen names a window that it does not use.
    if options.get("use_sliding_window") is False:
        windows = []
    layer_types = options.get("layer_types") or ["full_attention"]
    return (
        not windows
        and not turns_with_length(model)
        and all(kind == "full_attention" for kind in layer_types)
        and config._attn_implementation in ("eager", "sdpa")
    )


def turns_with_length(model: PreTrainedModel) -> bool:
    """Whether a token's rotary embedding depends on how long its row is.

    What a state says then changes with the tokens behind it, once a row is longer than those that
    the model was first trained on.
    """
    options = model.config.get_text_config().to_dict()
    ropes = [options.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    # By kind of layer, in some families.
    ropes += [part for rope in ropes for part in rope.values() if isinstance(part, dict)]
    return any(rope.get("rope_type") in ("dynamic", "longrope") for rope in ropes)


@torch.no_grad()
def _probe_agrees(lm: CausalLM) -> bool:
    """Decode two short rows of different lengths in slots and by a full forward."""
    lm = replace(lm, precision="fp32")  # whose rounding hides nothing
    width = 8
    rows = torch.arange(2 * width, device=lm.device).reshape(2, width) % lm.vocab_size
    rows[1, width - 2 :] = PAD
    try:
        decoder = SlotDecoder(lm, 2, width)
        short = torch.where(torch.arange(width, device=lm.device) < width - 4, rows, PAD)
        short[1, width - 6 :] = PAD
        positions = row_lengths(short)
        decoder.prefill(torch.arange(2, device=lm.device), short)
        for _ in range(4):
            hidden = decoder.step(rows[[0, 1], positions], positions)
            positions = positions + 1
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    whole = last_hidden(lm, rows)
    return torch.allclose(hidden, whole, atol=1e-3 * float(whole.abs().max()), rtol=1e-3)


class SlotDecoder:
    """Prefill rows, then advance all of them one token at a time, each at its own position.

    Args:
        lm: The model; it must pass `supports_slots`.
        rows: Number of rows.
        width: Most tokens that a row may reach.
    """

    def __init__(self, lm: CausalLM, rows: int, width: int) -> None:
        self.lm = lm
        self._slots = _Slots(rows, width)
        layers = lm.model.config.get_text_config().num_hidden_layers
        self._layers = [_SlotLayer(self._slots) for _ in range(layers)]
        cache = Cache(layers=self._layers)  # type: ignore[arg-type]
        self._cached = {cache_name(lm.model): cache}

    def prefill(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Put `tokens` (n, L) into the slots `rows` (n,); their last hidden states, (n, d)."""
        lengths = row_lengths(tokens)
        step = max(1, tokens_per_pass(tokens.device) // max(tokens.shape[1], 1))
        out = []
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            width = int(lengths[part].max())
            self._slots.prefill = rows[part]
            hidden = self._forward(model_ids(tokens[part, :width]))
            self._slots.prefill = None
            every = torch.arange(len(hidden), device=hidden.device)
            out.append(hidden[every, lengths[part] - 1])
        return torch.cat(out)

    def step(self, tokens: Tensor, positions: Tensor, last: int | None = None) -> Tensor:
        """Write `tokens` (rows,) at `positions` (rows,); the hidden states there, (rows, d).

        `last` is the largest position, for those who know it: to look waits for the device.
        """
        visible = (int(positions.max()) if last is None else last) + 1
        self._slots.positions, self._slots.visible = positions, visible
        hidden_from = torch.arange(visible, device=positions.device) > positions[:, None]
        model = self.lm.model
        mask = torch.zeros(hidden_from.shape, dtype=model.dtype, device=positions.device)
        mask.masked_fill_(hidden_from, torch.finfo(model.dtype).min)
        with for_a_step(model):
            return self._forward(
                tokens[:, None],
                attention_mask=mask[:, None, None, :],  # (rows, 1, 1, visible), additive
                position_ids=positions[:, None],
            )[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, in this order; one that is named twice is there twice.

        What is done costs no more compute, and rows that begin alike are prefilled once.
        """
        for layer in self._layers:
            layer.keep(rows)
        self._slots.rows = len(rows)

    def _forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        return self.lm.hidden_states(ids, use_cache=True, **self._cached, **inputs)


class DecodeCache:
    """The last hidden state of every row, remembering what earlier calls computed.

    Rows that grew by one token cost one decode step, new rows one prefill, unchanged rows nothing.
    The answer never depends on what is remembered: everything is dropped when a parameter of the
    model changes, and in training mode the memory is neither read nor written. PyTorch does not
    tell of values written through ``parameter.data``: call `clear` after that.

    Args:
        lm: The model. Families that `SlotDecoder` cannot serve get full forwards instead.
    """

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self._served = supports_slots(lm)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._decoder: SlotDecoder | None = None
        self._tokens: Tensor | None = None  # (N, L) rows that the slots hold
        self._hidden: Tensor | None = None  # (N, d) their last hidden states
        self._versions: tuple[object, ...] = ()

    @torch.no_grad()
    def last_hidden(self, tokens: Tensor) -> Tensor:
        """Hidden state at each row's last real token: (N, L) -> (N, d); no gradient."""
        if not self._served or self.lm.model.training:
            return last_hidden(self.lm, tokens)
        versions = (
            _optimizer_steps,
            *((p._version, p.data_ptr()) for p in self.lm.model.parameters()),
        )
        if self._tokens is None or versions != self._versions or self._tokens.shape != tokens.shape:
            self.clear()
            self._versions = versions
            self._decoder = SlotDecoder(self.lm, *tokens.shape)
            self._tokens = torch.full_like(tokens, PAD)
        assert self._decoder is not None
        new, grown, last = self._compare(tokens)
        if new.any():
            self._store(new, self._decoder.prefill(new.nonzero()[:, 0], tokens[new]))
        if grown.any():
            # Rows that did not grow write their last token again, over itself.
            every = torch.arange(len(tokens), device=tokens.device)
            step = self._decoder.step(model_ids(tokens[every, last]), last)
            self._store(grown, step[grown])
        self._tokens = tokens.clone()
        assert self._hidden is not None
        return self._hidden.clone()

    def _compare(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows are new and which grew by one token, (N,) bool each; last columns (N,)."""
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

    What another row begins with is computed there: an agent that learns token by token asks for
    many states of one response.
    """
    lengths = row_lengths(tokens)
    kept, place = np.unique(holders(tokens.cpu().numpy()), return_inverse=True)
    held, at = (torch.from_numpy(x).to(tokens.device) for x in (kept, place))
    first = lengths[held].scatter_reduce(0, at, lengths, "amin")
    asked = lengths[held] - first + 1
    # One more column, so that the state after the last token is the state of a chosen one.
    grown = torch.nn.functional.pad(tokens[held], (0, 1), value=PAD)
    states = lm.states(Sequences(grown, first, asked))
    return states[(torch.cumsum(asked, 0) - asked)[at] + lengths - first[at]]
