"""How a model is decoded: the fastest method that a probe finds exact for it.

Four methods, the fastest first. "graphs" and "slots" keep keys and values in slots
(`SlotDecoder`), on a GPU with each step as a CUDA graph. "own cache" uses the model's own cache
(`OwnCacheDecoder`). "full forwards" computes every row again for each token.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_gym.lm.architecture import (
    context_length,
    full_attention_width,
    has_dynamic_rope,
    shortest_window,
)
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.cuda_graphs import broken
from rlhf_gym.lm.decoding.kv_slots import SlotDecoder
from rlhf_gym.lm.decoding.own_cache import OwnCacheDecoder
from rlhf_gym.lm.precision import Precision
from rlhf_gym.lm.probe import agrees
from rlhf_gym.tokens import PAD, model_ids, row_lengths

logger = logging.getLogger(__name__)

Method = Literal["graphs", "slots", "own cache", "full forwards"]

_methods: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, Precision, bool], Method]] = (
    WeakKeyDictionary()
)

# Reading a config takes as long as a small model's step.
_widths: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()

SLOT_PROBE = 8
"""Columns of the probe of slots."""


def decoding_method(lm: CausalLM, width: int) -> Method:
    """How rows of this model are decoded; the first call for a model tries the methods on it.

    Args:
        lm: The model.
        width: Most tokens that a row may reach; slots cannot hold a window that is shorter.
    """
    known = _methods.setdefault(lm.model, {})
    if lm.model not in _widths:
        _widths[lm.model] = full_attention_width(lm.model)
    plain = width <= _widths[lm.model]
    # On a GPU the two precisions are captured separately; on a CPU slots work in either.
    on = (lm.device.type, lm.precision if lm.device.type == "cuda" else "fp32", plain)
    if on not in known:
        warned = "full forwards" in known.values()
        known[on] = _probe(lm, plain, warn=not warned)
    return "slots" if known[on] == "graphs" and broken() else known[on]


def supports_slots(lm: CausalLM, width: int) -> bool:
    """Whether slots are exact for rows of this width: no shorter window, and a probe agrees."""
    return decoding_method(lm, width) in ("graphs", "slots")


def takes_graphs(lm: CausalLM, width: int) -> bool:
    """Whether a step of such rows can be replayed as a CUDA graph: on a GPU, if a probe agrees."""
    return decoding_method(lm, width) == "graphs"


def _probe(lm: CausalLM, plain: bool, *, warn: bool) -> Method:
    """The fastest method that gives this model's numbers; each fallback is logged once."""
    on_gpu = lm.device.type == "cuda"
    if plain and _widths[lm.model] >= SLOT_PROBE:
        if on_gpu and _decodes_in_slots(lm, fixed=True):
            return "graphs"
        if _decodes_in_slots(lm, fixed=False):
            if on_gpu:
                logger.warning(
                    "%s cannot be captured as a CUDA graph; decoding it without graphs",
                    type(lm.model).__name__,
                )
            return "slots"
    window = 0 if plain else shortest_window(lm.model) or 0
    # A probe of short rows would not see that cached keys turn wrong in long ones.
    if not has_dynamic_rope(lm.model) and _decodes_with_own_cache(lm, window):
        return "own cache"
    if warn:
        logger.warning(
            "neither slots nor its own cache give %s's numbers; decoding it by full forwards",
            type(lm.model).__name__,
        )
    return "full forwards"


def _decodes_in_slots(lm: CausalLM, *, fixed: bool) -> bool:
    """Decode two short rows of different lengths in slots and by a full forward."""
    plain = replace(lm, precision="fp32")  # bfloat16's rounding would hide small errors
    if not fixed:
        lm = plain
    rows = _some_rows(lm, 2, SLOT_PROBE)
    rows[1, SLOT_PROBE - 2 :] = PAD

    def in_slots() -> Tensor:
        decoder = SlotDecoder(lm, 2, SLOT_PROBE, fixed=fixed)
        columns = torch.arange(SLOT_PROBE, device=lm.device)
        short = torch.where(columns < SLOT_PROBE - 4, rows, PAD)
        short[1, SLOT_PROBE - 6 :] = PAD
        positions = row_lengths(short)
        hidden = decoder.prefill(torch.arange(2, device=lm.device), short)
        for _ in range(4):
            hidden = decoder.step(rows[[0, 1], positions], positions)
            positions = positions + 1
        return hidden

    def whole() -> Tensor:
        return _all_states(plain, rows)[[0, 1], row_lengths(rows) - 1]

    return agrees(lm.model, in_slots, whole, 1e-3 if lm.precision == "fp32" else 0.05)


def _decodes_with_own_cache(lm: CausalLM, window: int) -> bool:
    """Decode rows of different lengths with the model's own cache and by a full forward.

    The rows outgrow the window, once while decoding and once in the prefill. Every state counts,
    and rows are repeated and reordered on the way.
    """
    lm = replace(lm, precision="fp32")
    width = max(window, 4) + 8
    width = min(width, context_length(lm.model) or width)
    rows = _some_rows(lm, 3, width)
    order = torch.tensor([2, 0, 1, 0], device=lm.device)
    # Prompts of one token too: a convolution reaches further back than that.
    starts = [
        torch.tensor([longest, max(longest - 3, 1), 1], device=lm.device)
        for longest in sorted({1, max(min(window - 2, width - 6), 1), max(width - 4, 1)})
    ]

    def steps(lengths: Tensor) -> int:
        return min(width - int(lengths.max()), 12)

    def decoded(lengths: Tensor) -> Tensor:
        columns = torch.arange(width, device=lm.device)
        prompts = torch.where(columns < lengths[:, None], rows, PAD)
        decoder = OwnCacheDecoder(lm, prompts, width)
        decoder.keep(order)
        states = [decoder.hidden[order]]
        for step in range(steps(lengths)):
            if step == 1:
                decoder.keep(torch.arange(len(order), device=lm.device))
            states.append(decoder.step(rows[order, (lengths + step)[order]]))
        return torch.stack(states)

    def expected(lengths: Tensor, states: Tensor) -> Tensor:
        taken = torch.arange(steps(lengths) + 1, device=lm.device)
        columns = lengths[order] - 1 + taken[:, None]
        return states[order, columns]

    def both(of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([of(lengths) for lengths in starts])

    def whole() -> Tensor:
        states = _all_states(lm, rows)
        return both(lambda lengths: expected(lengths, states))

    # Some hybrids step by other formulas than they prefill by, which agree to 1e-3 only. On a GPU
    # convolutions of three digits (TF32) are the default.
    tolerance = 2e-5 if lm.device.type == "cpu" else 1e-3
    return agrees(lm.model, lambda: both(decoded), whole, tolerance)


def _some_rows(lm: CausalLM, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.vocab_size, (rows, width), generator=generator).to(lm.device)


def _all_states(lm: CausalLM, rows: Tensor) -> Tensor:
    return lm.hidden_states(model_ids(rows), use_cache=False)
