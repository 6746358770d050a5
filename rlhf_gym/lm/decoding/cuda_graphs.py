"""CUDA graphs and bfloat16 weight copies, for models whose kernel launches cost more than kernels.

`captured` records work as a CUDA graph. `StepGraphs` does so with a decoding step, and
`Bfloat16Copy` saves that step the casts of the weights.
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
"""A decoding step of fewer rows takes the same time."""

FEWEST_COLUMNS = 128
"""The same for the columns that attention reads."""


def rows_for(needed: int, rows: int) -> int:
    """The smallest of rows, rows / 2, rows / 4, … that fits `needed`: few graphs suffice."""
    while -(-rows // 2) >= max(needed, FEWEST_ROWS):
        rows = -(-rows // 2)
    return rows


def columns_for(needed: int, width: int) -> int:
    """The smallest `FEWEST_COLUMNS` · 2ⁿ that fits `needed`, at most `width`."""
    columns = FEWEST_COLUMNS
    while columns < needed:
        columns *= 2
    return min(columns, width)


class EagerGraph:
    """Stands in for a CUDA graph on a CPU: `replay` does the work again.

    Attributes:
        work: The work.
        out: The tensors (or None) that receive its results.
    """

    def __init__(
        self, work: Callable[[], Sequence[Tensor | None]], out: Sequence[Tensor | None]
    ) -> None:
        self.work, self.out, self._learns = work, out, torch.is_grad_enabled()

    def replay(self) -> None:
        """Do the work again, and overwrite `out` with its results."""
        with torch.set_grad_enabled(self._learns):
            found = self.work()
        for old, new in zip(self.out, found, strict=True):
            if old is not None and new is not None:
                old.detach().copy_(new.detach())


Graph = torch.cuda.CUDAGraph | EagerGraph

_broken: list[str] = []
"""Errors of failed captures; after one, this process neither captures nor replays graphs."""


def broken() -> bool:
    """Whether a capture has failed; after that no graph of this process is reliable."""
    return bool(_broken)


def captured(
    work: Callable[[], Results],
    device: torch.device,
    pool: Any,
    *,
    warm_up: Callable[[], object] | None = None,
) -> tuple[Graph, Results]:
    """Capture work as a CUDA graph.

    Args:
        work: The work to capture.
        device: Where it runs. A CPU has no graphs: there `replay` does the work again.
        pool: Memory that it may share with graphs that are never replayed at the same time.
        warm_up: Run before the capture, so that everything made at a first call (work spaces, for
            example) exists.

    Returns:
        The graph, and the results: tensors that each replay overwrites.

    Raises:
        RuntimeError: It cannot be captured, because the host waits for the device in it.
    """
    if device.type != "cuda":
        out = work()
        return EagerGraph(work, out), out
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
            # The rehearsal finds most of what breaks a capture. If one fails all the same, PyTorch
            # leaves its stream current and the random generator in capture mode; undo both.
            torch.cuda.set_stream(here)
            restored = torch.Generator(random.device)
            restored.set_state(state)
            random.graphsafe_set_state(restored)
            _broken.append(str(error))
            raise
    return graph, out


def _rehearse(work: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Do work twice on the capturing stream; the second time it is an error if the host waits."""
    here, before = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream), warnings.catch_warnings():
            work()
            warnings.simplefilter("ignore")  # PyTorch warns that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        here.wait_stream(stream)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures, because libraries keep work space for every stream they see."""
    return torch.cuda.Stream(device)


def new_pool(device: torch.device) -> Any:
    """A memory pool for graphs that are never replayed at the same time."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class StepGraphs:
    """A decoding step as CUDA graphs: one for each number of rows and of visible columns.

    Each is captured when it is first needed. It reads the weights at their addresses, so it stays
    valid while they are updated in place.

    Args:
        rows: Most rows.
        device: The device of the decoding model.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._tokens, self._positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._captured: dict[tuple[int, int], tuple[Graph, list[Tensor]]] = {}
        self._pool = new_pool(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepGraphs, (self._rows, self._device)  # graphs can be neither copied nor pickled

    def run(
        self,
        step: Callable[[Tensor, Tensor, int], Tensor],
        tokens: Tensor,
        positions: Tensor,
        visible: int,
    ) -> Tensor:
        """Return `step(tokens, positions, visible)`; the next call overwrites the result.

        Args:
            step: Works on tensors of fixed shapes and addresses, and never reads their values on
                the host.
            tokens: (n,), n at most `rows`.
            positions: (n,).
            visible: Number of columns that attention reads.
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


class Bfloat16Copy:
    """A model whose trunk has bfloat16 copies of its linear layers; everything else is shared.

    Autocast would cast every weight in every step. The numbers are autocast's: only weights and
    biases of linear layers are copied.

    Args:
        model: The original. The copies follow it only when `refresh` is called.

    Attributes:
        model: The model with the copies.
        copies: The copies.
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
        """Copy the current weights."""
        if self.copies:
            torch._foreach_copy_(self.copies, self._from)
