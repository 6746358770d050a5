"""Incremental decoding: keys and values in slots, each row at its own position.

transformers' StaticCache writes all rows at one shared position. Here rows have different lengths,
and end and are replaced at different times.
"""

from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_gym.lm.architecture import cache_name
from rlhf_gym.lm.attention import additive_mask, for_a_step
from rlhf_gym.lm.batching import tokens_per_pass
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.cuda_graphs import Bfloat16Copy, StepGraphs, columns_for, rows_for
from rlhf_gym.tokens import model_ids, row_lengths

IDLE_SHARE = 1 / 8
"""Share of a GPU's memory that unused slots may keep, so that their graphs can be used again."""

WIDTHS = 64
"""Fixed slots have a multiple of this many columns, so that similar lengths share slots."""

IDLE_SLOTS = 2
"""Unused slots kept per model: one for the rollouts of a training, one for its evaluations."""


@dataclass
class _Place:
    """Where the next keys and values are written; shared by all layers of a cache.

    Attributes:
        rows: Number of rows.
        width: Most tokens of a row.
        fixed: Whether the tensors keep their shape and address when rows are dropped.
        dtype: Type of the stored keys and values; as they come if None.
        prefill: Rows that are being prefilled; None while decoding.
        positions: (n,) the column that each row writes.
        visible: Number of columns that attention reads.
    """

    rows: int
    width: int
    fixed: bool
    dtype: torch.dtype | None
    prefill: Tensor | None = None
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    visible: int = 0


class _Slots:
    """Keys and values of some rows, with the CUDA graphs and weight copies that decode them.

    Attributes:
        place: Where the next keys and values are written.
        layers: One for each layer of the model.
        graphs: Run a step of fixed slots.
        low: A copy with bfloat16 weights that decodes in place of the model; None in float32.
    """

    def __init__(
        self, lm: CausalLM, rows: int, width: int, fixed: bool, low: Bfloat16Copy | None = None
    ) -> None:
        is_low = fixed and lm.precision == "bf16"
        self.place = _Place(rows, width, fixed, torch.bfloat16 if is_low else None)
        layers = lm.model.config.get_text_config().num_hidden_layers
        self.layers = [_SlotLayer(self.place) for _ in range(layers)]
        self.graphs = StepGraphs(rows, lm.device) if fixed else None
        self.low = (low or Bfloat16Copy(lm.model)) if is_low else None
        self._weights, self._kind = _weights(lm), _kind(lm)

    def of_weights(self, lm: CausalLM) -> bool:
        """Whether the model's weights still have the same addresses (graphs contain them)."""
        return self._weights == _weights(lm)

    def computes_as(self, lm: CausalLM) -> bool:
        """Whether the slots have this model's precision, and may be written in this mode."""
        return self._kind == _kind(lm)

    def renew(self) -> None:
        """Reset to zero, and copy the current weights."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                if states is not None:
                    states.zero_()
        if self.low is not None:
            self.low.refresh()

    @property
    def bytes(self) -> int:
        """Memory of keys, values and copies of weights."""
        states = [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]
        copies = [] if self.low is None else self.low.copies
        return sum(x.numel() * x.element_size() for x in [*states, *copies])


def _weights(lm: CausalLM) -> tuple[int, ...]:
    return tuple(p.data_ptr() for p in lm.model.parameters())


def _kind(lm: CausalLM) -> tuple[object, ...]:
    # PyTorch refuses writes, outside inference mode, to tensors that were made inside it.
    return lm.precision, torch.is_inference_mode_enabled()


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: (rows, heads, width, head_dim)."""

    is_compileable = False
    is_sliding = False

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.place.rows, key_states.shape[1], self.place.width)
        dtype = self.place.dtype or key_states.dtype
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1], dtype=dtype)
        self.values = value_states.new_zeros(*shape, value_states.shape[-1], dtype=dtype)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        place, n = self.place, len(key_states)
        keys, values = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        if place.prefill is not None:
            # A new row attends only to itself, so attention runs on the keys that just came in.
            self.keys[place.prefill, :, : keys.shape[2]] = keys
            self.values[place.prefill, :, : values.shape[2]] = values
            return key_states, value_states
        every = torch.arange(n, device=keys.device)
        self.keys[every, :, place.positions] = keys[:, :, 0]
        self.values[every, :, place.positions] = values[:, :, 0]
        return self.keys[:n, :, : place.visible], self.values[:n, :, : place.visible]

    def keep(self, rows: Tensor) -> None:
        if self.keys is None or self.values is None:
            return
        if self.place.fixed:
            self.keys[: len(rows)] = self.keys[rows]
            self.values[: len(rows)] = self.values[rows]
        else:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.place.prefill is not None:
            return query_length, 0
        return self.place.visible, 0

    def get_seq_length(self) -> int:
        # Rows have different lengths. Positions and masks are always passed, so that the model
        # derives nothing from a shared length.
        return 0

    def get_max_length(self) -> int:
        return self.place.width

    def get_max_cache_shape(self) -> int:  # transformers' older name of get_max_length
        return self.place.width


_idle: WeakKeyDictionary[PreTrainedModel, list[_Slots]] = WeakKeyDictionary()


def _take(lm: CausalLM, rows: int, width: int, fixed: bool) -> _Slots:
    """Unused slots of this shape, or new ones."""
    idle = [slots for slots in _idle.pop(lm.model, []) if fixed and slots.of_weights(lm)]
    if not fixed:
        return _Slots(lm, rows, width, fixed)
    width = -(-width // WIDTHS) * WIDTHS
    _idle[lm.model] = idle
    alike = [slots for slots in idle if slots.computes_as(lm)]
    for slots in alike:
        if (slots.place.rows, slots.place.width) == (rows, width):
            idle.remove(slots)
            slots.renew()
            return slots
    low = alike[0].low if alike else None
    if low is not None:
        low.refresh()
    return _Slots(lm, rows, width, fixed, low)


class SlotDecoder:
    """Prefill rows, then advance all of them one token at a time, each at its own position.

    Args:
        lm: The model; it must pass `rlhf_gym.lm.decoding.decode_cache.supports_slots`.
        rows: Number of rows.
        width: Most tokens that a row may reach.
        fixed: Keep all shapes and addresses, and replay each step as a CUDA graph on a GPU.
    """

    def __init__(self, lm: CausalLM, rows: int, width: int, *, fixed: bool = False) -> None:
        self._slots = slots = _take(lm, rows, width, fixed)
        self._of, self.lm = lm.model, lm
        if slots.low is not None:
            self.lm = replace(lm, model=slots.low.model, reuse_casts=False)
        cache = Cache(layers=slots.layers)  # type: ignore[arg-type]
        self._cached = {cache_name(lm.model): cache}

    def prefill(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Put `tokens` (n, L) into the slots `rows` (n,); their last hidden states, (n, d)."""
        lengths = row_lengths(tokens)
        step = max(1, tokens_per_pass(tokens.device) // max(tokens.shape[1], 1))
        out = []
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            width = int(lengths[part].max())
            self._slots.place.prefill = rows[part]
            hidden = self._forward(model_ids(tokens[part, :width]))
            self._slots.place.prefill = None
            every = torch.arange(len(hidden), device=hidden.device)
            out.append(hidden[every, lengths[part] - 1])
        return torch.cat(out)

    def step(self, tokens: Tensor, positions: Tensor, last: int | None = None) -> Tensor:
        """Write `tokens` (n,) at `positions` (n,) and return the hidden states there, (n, d).

        With `fixed`, the next step overwrites the result. Pass the largest position as `last` if it
        is known: reading it from the tensor waits for the device.
        """
        visible = (int(positions.max()) if last is None else last) + 1
        slots = self._slots
        if slots.graphs is None:
            return self._step(tokens, positions, visible)
        visible = columns_for(visible, slots.place.width)
        return slots.graphs.run(self._step, tokens, positions, visible)

    def room(self, rows: int) -> int:
        """The number of rows to `keep` when `rows` are needed."""
        place = self._slots.place
        return rows_for(rows, place.rows) if place.fixed else rows

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only, in this order; a row may be named more than once.

        So finished rows cost no more compute, and rows with the same prompt share its prefill.
        """
        for layer in self._slots.layers:
            layer.keep(rows)
        if not self._slots.place.fixed:
            self._slots.place.rows = len(rows)

    def release(self) -> None:
        """Return the slots for the next decoder; this one must not be used again."""
        slots = self._slots
        if not slots.place.fixed:
            return
        device = self.lm.device
        if device.type == "cuda":
            most = torch.cuda.get_device_properties(device).total_memory * IDLE_SHARE
            if slots.bytes > most / IDLE_SLOTS:
                return
        _idle[self._of] = [slots, *_idle.get(self._of, [])][:IDLE_SLOTS]

    def _step(self, tokens: Tensor, positions: Tensor, visible: int) -> Tensor:
        self._slots.place.positions, self._slots.place.visible = positions, visible
        hidden_from = torch.arange(visible, device=positions.device) > positions[:, None]
        model = self.lm.model
        mask = additive_mask(hidden_from, model.dtype)
        with for_a_step(model):
            return self._forward(
                tokens[:, None],
                attention_mask=mask[:, None, None, :],  # (n, 1, 1, visible), additive
                position_ids=positions[:, None],
            )[:, 0]

    def _forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        return self.lm.hidden_states(ids, use_cache=True, **self._cached, **inputs)
