"""What makes work cheap on a GPU where starting its operations takes longer than they do.

`captured` records them as a CUDA graph. `StepGraphs` does so with a decoding step, and `LowCopy`
spares it the casts of the weights.
"""

import copy
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_gym.models import trunk

T = TypeVar("T")

FEWEST_ROWS = 8
"""A step of fewer rows takes no less time."""

FEWEST_COLUMNS = 128
"""The same of columns that attention looks at."""


def rows_for(needed: int, rows: int) -> int:
    """The least of rows, rows / 2, rows / 4, … that holds so many: few graphs serve all counts."""
    while -(-rows // 2) >= max(needed, FEWEST_ROWS):
        rows = -(-rows // 2)
    return rows


def columns_for(needed: int, width: int) -> int:
    """The least of `FEWEST_COLUMNS` times a power of two that holds so many, at most `width`."""
    columns = FEWEST_COLUMNS
    while columns < needed:
        columns *= 2
    return min(columns, width)


def captured(
    work: Callable[[], T], pool: Any, *, warm_up: Callable[[], object] | None = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Some work as a CUDA graph, and what it returned: tensors that a replay writes anew.

    Args:
        work: What is captured.
        pool: Memory that it may share with graphs which are replayed one after another.
        warm_up: Work done before, so that what is made at a first call (work spaces, say) is there.

    Raises:
        RuntimeError: It cannot be captured: the host waits for the device in it.
    """
    if warm_up is not None:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        before = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(aside), warnings.catch_warnings():
            warm_up()
            warnings.simplefilter("ignore")  # PyTorch says that the mode is a prototype
            # A capture that breaks off leaves its traces; most of what would break it shows here.
            try:
                torch.cuda.set_sync_debug_mode("error")
                warm_up()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    state = random.get_state()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = work()
    except RuntimeError:
        # It would wait for the end of the capture for ever.
        anew = torch.Generator(random.device)
        anew.set_state(state)
        random.graphsafe_set_state(anew)
        raise
    return graph, out


class StepGraphs:
    """A step of decoding as CUDA graphs: one for each number of rows and of visible columns.

    Each is captured when it is first asked for. It reads the weights where they lie, so that it
    serves for as long as they stay there, whatever they learn. On a CPU, which has no graphs, the
    step itself runs.

    Args:
        rows: Most rows.
        device: Where they are computed.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._tokens, self._positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # One after another is replayed: they share their memory.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(
        self,
        step: Callable[[Tensor, Tensor, int], Tensor],
        tokens: Tensor,
        positions: Tensor,
        visible: int,
    ) -> Tensor:
        """What `step(tokens, positions, visible)` returns, overwritten by the next call.

        Args:
            step: Works on tensors of fixed shapes, at fixed places, and reads none of them.
            tokens: (n,), at most `rows`.
            positions: (n,).
            visible: A number that it may depend on.
        """
        n = len(tokens)
        inputs = self._tokens[:n].copy_(tokens), self._positions[:n].copy_(positions)
        if self._pool is None:
            return step(*inputs, visible)
        if (n, visible) not in self._captured:

            def work() -> Tensor:
                return step(*inputs, visible)

            self._captured[n, visible] = captured(work, self._pool, warm_up=work)
        graph, out = self._captured[n, visible]
        graph.replay()
        return out


class LowCopy:
    """A model whose trunk multiplies by bfloat16 copies of its weights; all else is shared.

    Autocast would cast every weight in every step. Its numbers are autocast's: biases and weights
    of linear layers alone are copies.

    Args:
        model: Which; the copies are made anew by `refresh` alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        shared = {id(x): x for x in chain(model.parameters(), model.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, shared).eval()
        self._from: list[Tensor] = []
        self._to: list[Tensor] = []
        pairs = zip(trunk(model).modules(), trunk(self.model).modules(), strict=True)
        for module, twin in pairs:
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            for name, weight in module.named_parameters(recurse=False):
                low = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
                setattr(twin, name, low)
                self._from.append(weight.detach())
                self._to.append(low.detach())

    def refresh(self) -> None:
        """Copy the weights as they are now."""
        if self._to:
            torch._foreach_copy_(self._to, self._from)
