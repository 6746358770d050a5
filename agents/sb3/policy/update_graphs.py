"""The trunk's forward and backward pass of an update as CUDA graphs.

For a small model on a GPU, launching the kernels of a pass takes longer than running them; a graph
launches all of them at once. Notation: N rows, L columns, M chosen tokens, d the trunk's width.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from rlhf_gym.lm.architecture import context_length, recomputes_activations, trunk
from rlhf_gym.lm.attention import additive_mask
from rlhf_gym.lm.batching import layer_weights
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.cuda_graphs import Graph, captured, new_pool
from rlhf_gym.lm.decoding.method import takes_graphs
from rlhf_gym.tokens import Sequences, model_ids

logger = logging.getLogger(__name__)

OPERATIONS = 2e11
"""Operations that a GPU computes while one layer's kernels are launched, about a millisecond."""

MEMORY_SHARE = 1 / 8
"""Share of a GPU's memory for the gradients and states of all graphs of a model."""


def size_for(n: int) -> int:
    """Round n up to 1, 2, 3, 4, 6, 8, 12, 16, …, so that few sizes are captured."""
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
    """

    ids: Tensor
    hidden: Tensor
    gradient: Tensor
    gradients: list[Tensor | None]
    forward: Graph
    backward: Graph


class UpdateGraphs:
    """Last hidden states of whole sequences, with gradients for the trunk's parameters.

    A pair of graphs is captured for each batch size; smaller batches are padded to it. Batches that
    take long to compute, or whose graphs would take too much memory, are computed without graphs.

    The backward pass of a call must come before the next call, which overwrites its activations.

    Args:
        lm: Model and precision; it must pass `rlhf_gym.lm.decoding.method.takes_graphs`.
    """

    def __init__(self, lm: CausalLM) -> None:
        self._lm = lm
        self._most_columns = context_length(lm.model)
        # Two operations a weight and token in the forward pass, four in the backward pass.
        layers = lm.model.config.get_text_config().num_hidden_layers
        self._most_tokens = OPERATIONS * layers / (6 * layer_weights(lm.model))
        self._serves = True
        self.turn = 0  # raised by every pass
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return UpdateGraphs, (self._lm,)  # graphs can be neither copied nor written

    def _forget(self) -> None:
        """Drop all graphs. The next ones are captured for the parameters' present addresses."""
        self._parameters = list(trunk(self._lm.model).parameters())
        self._captured_of = self._laid()
        self._pairs: dict[tuple[int, int], _Pair] = {}
        self._pool = new_pool(self._lm.device)

    def _laid(self) -> list[tuple[int, bool]]:
        """Address of every parameter of the trunk, and whether it is trained.

        A graph reads fixed addresses: weights that moved must be captured again.
        """
        parameters = trunk(self._lm.model).parameters()
        return [(p.data_ptr(), p.requires_grad) for p in parameters]

    def states(self, sequences: Sequences) -> Tensor:
        """As `CausalLM.states`: (M, d)."""
        ids = model_ids(sequences.tokens[:, : max(sequences.width - 1, 1)])
        size = self._size(ids)
        if size is None or not torch.is_grad_enabled() or not self._learning():
            return self._lm.states(sequences)
        padded = F.pad(ids, (0, size[1] - ids.shape[1], 0, size[0] - ids.shape[0]))
        hidden = self._hidden(padded)
        if hidden is None:
            return self._lm.states(sequences)
        rows, columns = sequences.cells()
        return hidden[rows, columns - 1]

    def _size(self, ids: Tensor) -> tuple[int, int] | None:
        """Rows and columns to pad a batch to; None where a graph would not be faster."""
        rows, columns = map(size_for, ids.shape)
        if self._most_columns is not None:
            columns = max(min(columns, self._most_columns), ids.shape[1])
        return (rows, columns) if rows * columns <= self._most_tokens else None

    def _hidden(self, ids: Tensor) -> Tensor | None:
        if self._captured_of != self._laid():
            self._forget()
        size = (ids.shape[0], ids.shape[1])
        if size not in self._pairs:
            if not self._serves or not self._has_room(ids):
                return None
            try:
                self._pairs[size] = self._capture(ids)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                self._serves = False
                self._forget()
                logger.warning(
                    "an update of %s cannot be captured as a CUDA graph; computing it an "
                    "operation at a time (%s)",
                    type(self._lm.model).__name__,
                    (str(error) or repr(error)).splitlines()[0],
                )
                return None
        hidden: Tensor = _Replay.apply(self, self._pairs[size], ids, *self._learning())
        return hidden

    def _learning(self) -> list[Tensor]:
        return [p for p in self._parameters if p.requires_grad]

    def _has_room(self, ids: Tensor) -> bool:
        """Whether one more pair fits the memory set aside for graphs."""
        if ids.device.type != "cuda":
            return True
        gradients = sum(p.numel() * p.element_size() for p in self._learning())
        states = 8 * ids.numel() * int(self._lm.model.config.get_text_config().hidden_size)
        most = torch.cuda.get_device_properties(ids.device).total_memory * MEMORY_SHARE
        return (gradients + states) * (len(self._pairs) + 1) <= most

    def _capture(self, ids: Tensor) -> _Pair:
        ids = ids.clone()
        outputs: list[Tensor] = []
        # Autograd's node that accumulates a parameter's gradient belongs to the stream of the first
        # loss that needed it, for as long as that loss is alive. A capture must not wait for that
        # stream, so it uses stand-ins: tensors at the same addresses that no loss has seen.
        module = _Whole(self)
        learning = {
            name: p.detach().requires_grad_()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

        def forward() -> list[Tensor]:
            outputs[:] = [functional_call(module, learning, (ids,))]
            return outputs[:]

        with torch.no_grad():
            plain = self._lm.hidden_states(ids, use_cache=False)
        gradient = torch.zeros_like(plain)

        def backward() -> list[Tensor | None]:
            states, leaves = outputs.pop(), list(learning.values())
            return list(torch.autograd.grad(states, leaves, gradient, allow_unused=True))

        def both() -> None:
            forward()
            backward()

        device = self._lm.device
        first, (hidden,) = captured(forward, device, self._pool, warm_up=both)
        second, gradients = captured(backward, device, self._pool)
        hidden = hidden.detach()
        first.replay()
        outputs.clear()
        tolerance = 1e-3 if self._lm.precision == "fp32" else 0.05
        if not (hidden - plain).abs().max() <= tolerance * plain.abs().max():
            raise ValueError("with its positions and its mask given it computes something else")
        return _Pair(ids, hidden, gradient, gradients, first, second)

    def whole(self, ids: Tensor) -> Tensor:
        """Hidden states of all ids (N, L): (N, L, d).

        Mask and positions are passed in. Without them transformers checks whether several texts
        share a row, and the host would wait for the answer.
        """
        rows, columns = ids.shape
        later = torch.ones(columns, columns, dtype=torch.bool, device=ids.device).triu(1)
        mask = additive_mask(later, self._lm.model.dtype)
        positions = torch.arange(columns, device=ids.device).expand(rows, -1)
        return self._lm.hidden_states(
            ids,
            use_cache=False,
            attention_mask=mask.expand(rows, 1, -1, -1),
            position_ids=positions,
        )


class LearningStates:
    """Last hidden states for an update, by CUDA graphs where the model allows it.

    The backward pass of a call must come before the next call, which writes into the same memory.
    """

    def __init__(self) -> None:
        self.graphs: dict[nn.Module, UpdateGraphs] = {}

    def __call__(self, sequences: Sequences, core: CausalLM) -> Tensor:
        """Last hidden states of `core`, the policy or the critic's trunk: (M, d)."""
        # Recomputed activations need a second forward pass, which no captured graph contains.
        fits = takes_graphs(core, sequences.tokens.shape[1])
        if not fits or recomputes_activations(core.model):
            return core.states(sequences)
        if core.model not in self.graphs:
            self.graphs[core.model] = UpdateGraphs(core)
        return self.graphs[core.model].states(sequences)


class _Whole(nn.Module):
    """`UpdateGraphs.whole` as a module, so that `functional_call` can replace its parameters."""

    def __init__(self, graphs: UpdateGraphs) -> None:
        super().__init__()
        self.trunk = trunk(graphs._lm.model)
        self._whole = graphs.whole

    def forward(self, ids: Tensor) -> Tensor:
        return self._whole(ids)


class _Replay(torch.autograd.Function):
    """Replay a pair's forward graph; its backward graph is the gradient."""

    @staticmethod
    def forward(
        ctx: Any, graphs: UpdateGraphs, pair: _Pair, ids: Tensor, *parameters: Tensor
    ) -> Tensor:
        graphs.turn += 1
        ctx.graphs, ctx.pair, ctx.turn = graphs, pair, graphs.turn
        pair.ids.copy_(ids)
        pair.forward.replay()
        return pair.hidden.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        graphs, pair = ctx.graphs, ctx.pair
        if ctx.turn != graphs.turn:
            raise RuntimeError(
                "another forward pass has overwritten the activations of this backward pass; use "
                "CausalLM.states for both"
            )
        graphs.turn += 1
        pair.gradient.copy_(gradient)
        pair.backward.replay()
        # Copies: the next replay overwrites these buffers, and autograd keeps what it is given.
        there = [x for x in pair.gradients if x is not None]
        copies = iter(torch._foreach_mul(there, 1.0))
        return None, None, None, *(None if x is None else next(copies) for x in pair.gradients)
