"""What makes work cheap on a GPU where starting its operations takes longer than they do.

`captured` records them as a CUDA graph. `StepGraphs` does so with a decoding step, and `LowCopy`
spares it the casts of the weights.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_gym.lm.architecture import trunk

Results = TypeVar("Results", list[Tensor], list[Tensor | None])

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


class Again:
    """What stands in for a graph on a CPU: the work itself, done anew.

    Attributes:
        work: What is done.
        out: Where its results go: tensors, or None.
    """

    def __init__(
        self, work: Callable[[], Sequence[Tensor | None]], out: Sequence[Tensor | None]
    ) -> None:
        self.work, self.out, self._learns = work, out, torch.is_grad_enabled()

    def replay(self) -> None:
        """Do it."""
        with torch.set_grad_enabled(self._learns):
            found = self.work()
        for old, new in zip(self.out, found, strict=True):
            if old is not None and new is not None:
                old.detach().copy_(new.detach())


Graph = torch.cuda.CUDAGraph | Again

_broken: list[str] = []
"""Why no graph is captured or replayed any more in this process."""


def broken() -> bool:
    """Whether a capture has broken off, after which no graph of this process can be relied on."""
    return bool(_broken)


def captured(
    work: Callable[[], Results],
    device: torch.device,
    pool: Any,
    *,
    warm_up: Callable[[], object] | None = None,
) -> tuple[Graph, Results]:
    """Some work as a CUDA graph, and its results: tensors that each replay writes anew.

    Args:
        work: What is captured.
        device: Where it is done. On a CPU, which has no graphs, the work stands for itself.
        pool: Memory that it may share with graphs which are replayed one after another.
        warm_up: Work done before, so that what is made at a first call (work spaces, say) is there.

    Raises:
        RuntimeError: It cannot be captured: the host waits for the device in it.
    """
    if device.type != "cuda":
        out = work()
        return Again(work, out), out
    with torch.cuda.device(device):
        stream = _stream(device)
        if warm_up is not None:
            _rehearse(warm_up, stream)
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        state = random.get_state()
        options: Any = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **options):
                out = work()
        except RuntimeError as error:
            # The rehearsal finds most of what breaks a capture. One that breaks all the same leaves
            # its stream current, and the random generator waiting for its end.
            torch.cuda.set_stream(here)
            anew = torch.Generator(random.device)
            anew.set_state(state)
            random.graphsafe_set_state(anew)
            _broken.append(str(error))
            raise
    return graph, out


def _rehearse(work: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Do some work twice on the stream that it is captured on, once where no host may wait."""
    here, before = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream), warnings.catch_warnings():
            work()
            warnings.simplefilter("ignore")  # PyTorch says that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(stream)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep work space for each stream that they have seen."""
    return torch.cuda.Stream(device)


def new_pool(device: torch.device) -> Any:
    """Memory for graphs that are replayed one after another."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class StepGraphs:
    """A step of decoding as CUDA graphs: one for each number of rows and of visible columns.

    Each is captured when it is first asked for. It reads the weights where they lie, so that it
    serves for as long as they stay there, whatever they learn.

    Args:
        rows: Most rows.
        device: Where they are computed.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._tokens, self._positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._captured: dict[tuple[int, int], tuple[Graph, list[Tensor]]] = {}
        self._pool = new_pool(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepGraphs, (self._rows, self._device)  # graphs can be neither copied nor written

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
        if broken():
            return step(*inputs, visible)
        if (n, visible) not in self._captured:

            def work() -> list[Tensor]:
                return [step(*inputs, visible)]

            found = captured(work, self._device, self._pool, warm_up=work)
            self._captured[n, visible] = found
        graph, (out,) = self._captured[n, visible]
        graph.replay()
        return out


class LowCopy:
    """A model whose trunk multiplies by bfloat16 copies of its weights; all else is shared.

    Autocast would cast every weight in every step. Its numbers are autocast's: biases and weights
    of linear layers alone are copies.

    Args:
        model: Which; the copies are made anew by `refresh` alone.

    Attributes:
        model: What computes with the copies.
        copies: They themselves.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        shared = {id(x): x for x in chain(model.parameters(), model.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, shared).eval()
        self._from: list[Tensor] = []
        self.copies: list[Tensor] = []
        pairs = zip(trunk(model).modules(), trunk(self.model).modules(), strict=True)
        for module, twin in pairs:
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            for name, weight in module.named_parameters(recurse=False):
                low = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
                setattr(twin, name, low)
                self._from.append(weight.detach())
                self.copies.append(low.detach())

    def refresh(self) -> None:
        """Copy the weights as they are now."""
        if self.copies:
            torch._foreach_copy_(self.copies, self._from)
