"""Incremental decoding with a model's own cache, for what slots cannot hold.

Sliding windows that rows outgrow, recurrent states and position biases are kept by transformers'
cache of the family. All rows advance together, so prompts are padded on the left, as in `generate`.
"""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from rlhf_gym.lm.architecture import cache_name, takes_positions
from rlhf_gym.lm.attention import for_a_step
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.tokens import model_ids, row_lengths


class OwnCacheDecoder:
    """Prefill all rows once, then advance all of them one token at a time.

    Args:
        lm: The model; `rlhf_gym.lm.decoding.method.decoding_method` must say "own cache".
        tokens: (N, L) the rows, right-padded, none empty.
        width: Most tokens that a row may reach.

    Attributes:
        hidden: Last hidden states of the rows, (N, d).
    """

    def __init__(self, lm: CausalLM, tokens: Tensor, width: int) -> None:
        self._lm = lm
        self._cache = DynamicCache(config=lm.model.config)
        self._cached = {cache_name(lm.model): self._cache}
        lengths = row_lengths(tokens)
        # Bamba keeps no state of a prefill of one column.
        longest = max(int(lengths.max()), 2)
        columns = torch.arange(longest, device=tokens.device)
        from_ = columns - (longest - lengths)[:, None]
        shifted = tokens.gather(1, from_.clamp(min=0))
        # (N, longest + new tokens): 0 at padding, which is all on the left. Without padding a model
        # derives mask and positions itself, at less cost.
        self._mask: Tensor | None = None
        if bool((lengths < longest).any()):
            seen = torch.ones(len(tokens), longest + width, dtype=torch.int64, device=tokens.device)
            seen[:, :longest] = from_ >= 0
            self._mask = seen
        self._length = longest
        self._positions = lengths - 1  # (N,) of each row's last token
        self._takes_positions = takes_positions(lm.model)
        # After the prefill, Mamba 1 would apply a mask to the wrong tokens. A state of recurrent
        # layers alone has no padding to be masked.
        self._attends = True
        self.hidden = self._forward(model_ids(shifted), from_.clamp(min=0))
        self._attends = any(isinstance(layer, CacheLayerMixin) for layer in self._cache.layers)

    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` (N,) and return the hidden states there, (N, d)."""
        self._positions = self._positions + 1
        self._length += 1
        with for_a_step(self._lm.model):
            self.hidden = self._forward(tokens[:, None], self._positions[:, None])
        return self.hidden

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only, in this order; a row may be named more than once."""
        self._cache.reorder_cache(cast(torch.LongTensor, rows))
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        inputs: dict[str, Any] = dict(self._cached)
        if self._mask is not None and self._attends:
            inputs["attention_mask"] = self._mask[:, : self._length]
        if self._mask is not None and self._takes_positions:
            inputs["position_ids"] = positions
        return self._lm.hidden_states(ids, use_cache=True, **inputs)[:, -1]
