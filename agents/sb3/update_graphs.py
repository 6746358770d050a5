"""The trunk's forward and backward pass of an update as CUDA graphs.

For a small model on a GPU the operations of a pass take less time than their start; a graph starts
them at once. Notation: N rows, L columns, M chosen tokens, d the trunk's width.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_gym.graphs import captured
from rlhf_gym.lm import CausalLM
from rlhf_gym.models import context_length, trunk
from rlhf_gym.passes import layer_weights
from rlhf_gym.tokens import Sequences, model_ids

logger = logging.getLogger(__name__)

OPERATIONS = 2e11
"""What a GPU computes while a layer's operations of a pass are started: a millisecond's worth."""

MEMORY_SHARE = 1 / 8
"""Of a GPU's memory, what the gradients of all graphs may take."""


def size_for(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, … that is at least n: few sizes serve all."""
    power = 1 << max(n - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and 3 * power // 4 >= n else power


@dataclass
class _Pair:
    """A captured forward pass and its backward pass.

    Attributes:
        ids: (N, L) what the forward pass reads.
        hidden: (N, L, d) what it writes.
        gradient: (N, L, d) what the backward pass reads.
        gradients: What it writes: a parameter's gradient each; None for those that have none.
        forward: The graph of the one.
        backward: The graph of the other.
        turn: How often the forward pass has been replayed.
    """

    ids: Tensor
    hidden: Tensor
    gradient: Tensor
    gradients: list[Tensor | None]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    turn: int = 0


class UpdateGraphs:
    """Last hidden states of whole sequences, whose gradient reaches the trunk's parameters.

    A pair of graphs is captured for each size of batch, into which smaller ones are padded. What
    takes long to compute, or more memory than is well spent, is computed without.

    A forward pass must be followed by its backward pass before the next one.

    Args:
        lm: Model and precision; it must pass `rlhf_gym.decode.takes_graphs`.
    """

    def __init__(self, lm: CausalLM) -> None:
        self._lm = lm
        self._parameters = [p for p in trunk(lm.model).parameters() if p.requires_grad]
        self._pairs: dict[tuple[int, int], _Pair] = {}
        self._places: list[int] = []  # of the parameters, when the pairs were captured
        self._pool: Any = None
        self._serves = True

    def states(self, sequences: Sequences) -> Tensor:
        """As `CausalLM.states`: (M, d)."""
        ids = model_ids(sequences.tokens[:, : max(sequences.width - 1, 1)])
        size = self._size(ids)
        if size is None or not torch.is_grad_enabled():
            return self._lm.states(sequences)
        padded = F.pad(ids, (0, size[1] - ids.shape[1], 0, size[0] - ids.shape[0]))
        hidden = self._hidden(padded)
        if hidden is None:
            return self._lm.states(sequences)
        rows, columns = sequences.cells()
        return hidden[rows, columns - 1]

    def _size(self, ids: Tensor) -> tuple[int, int] | None:
        """The size of the batch that these are padded to; None where a graph does not pay."""
        rows, columns = map(size_for, ids.shape)
        most = context_length(self._lm.model)
        if most is not None:
            columns = max(min(columns, most), ids.shape[1])
        model = self._lm.model
        layers = model.config.get_text_config().num_hidden_layers
        # Two operations a weight and token in the forward pass, four in the backward pass.
        if 6 * layer_weights(model) * rows * columns > OPERATIONS * layers:
            return None
        return rows, columns

    def _hidden(self, ids: Tensor) -> Tensor | None:
        places = [p.data_ptr() for p in self._parameters]
        if places != self._places:
            self._pairs, self._places, self._pool = {}, places, None
        size = (ids.shape[0], ids.shape[1])
        if size not in self._pairs:
            if not self._serves or not self._has_room():
                return None
            try:
                self._pairs[size] = self._capture(ids)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._serves = False
                logger.warning(
                    "an update of %s cannot be captured as a CUDA graph; computing it an "
                    "operation at a time (%s)",
                    type(self._lm.model).__name__,
                    str(error).splitlines()[0],
                )
                return None
        hidden: Tensor = _Replay.apply(self._pairs[size], ids, *self._parameters)
        return hidden

    def _has_room(self) -> bool:
        one = sum(p.numel() * p.element_size() for p in self._parameters)
        most = torch.cuda.get_device_properties(self._lm.device).total_memory * MEMORY_SHARE
        return one * (len(self._pairs) + 1) <= most

    def _capture(self, ids: Tensor) -> _Pair:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        ids = ids.clone()
        outputs: list[Tensor] = []

        def forward() -> Tensor:
            outputs[:] = [self.whole(ids)]
            return outputs[0]

        gradient = torch.zeros_like(self.whole(ids))

        def backward() -> list[Tensor | None]:
            found = torch.autograd.grad(
                outputs.pop(), self._parameters, gradient, allow_unused=True
            )
            return list(found)

        def both() -> None:
            forward()
            backward()

        first, hidden = captured(forward, self._pool, warm_up=both)
        second, gradients = captured(backward, self._pool)
        return _Pair(ids, hidden.detach(), gradient, gradients, first, second)

    def whole(self, ids: Tensor) -> Tensor:
        """Hidden states of ids (N, L), all of them: (N, L, d).

        Mask and positions are given: left to itself, a model looks whether several texts share a
        row, which the host would have to wait for.
        """
        rows, columns = ids.shape
        dtype = self._lm.model.dtype
        later = torch.ones(columns, columns, dtype=torch.bool, device=ids.device).triu(1)
        mask = torch.zeros(columns, columns, dtype=dtype, device=ids.device)
        mask.masked_fill_(later, torch.finfo(dtype).min)
        positions = torch.arange(columns, device=ids.device).expand(rows, -1)
        return self._lm.hidden_states(
            ids,
            use_cache=False,
            attention_mask=mask.expand(rows, 1, -1, -1),
            position_ids=positions,
        )


class _Replay(torch.autograd.Function):
    """A pair's forward pass, and its backward pass as the gradient."""

    @staticmethod
    def forward(ctx: Any, pair: _Pair, ids: Tensor, *parameters: Tensor) -> Tensor:
        pair.turn += 1
        ctx.pair, ctx.turn = pair, pair.turn
        pair.ids.copy_(ids)
        pair.forward.replay()
        return pair.hidden.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pair = ctx.pair
        if ctx.turn != pair.turn:
            raise RuntimeError(
                "a second forward pass of this size came before the first one's backward pass, "
                "whose activations are gone; use CausalLM.states for both"
            )
        pair.gradient.copy_(gradient)
        pair.backward.replay()
        # Copies: the next replay writes over what it wrote, and autograd keeps what it is given.
        there = [x for x in pair.gradients if x is not None]
        copies = iter(torch._foreach_mul(there, 1.0))
        return None, None, *(None if x is None else next(copies) for x in pair.gradients)
