"""What the systems of bench/speed.py share. Each runs on files alone, some without this project."""

import json
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

steps = [0]
"""Optimiser steps of this process so far."""

base = [0]
"""Bytes of memory that it held before it had loaded anything."""

on = ["cpu"]
"""The device that it runs on."""


def begin(options: Mapping[str, Any]) -> None:
    """The same start for all."""
    register_optimizer_step_post_hook(_count)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    torch.set_num_threads(options["threads"])
    on[0] = options["device"]
    base[0] = peak_bytes(on[0])


def say(
    stages: Mapping[str, Sequence[float]],
    *,
    tokens: Sequence[int],
    work: Mapping[str, int],
    versions: Mapping[str, str],
    profiled: Callable[[], object] | None = None,
) -> None:
    """Print what was measured as one line of JSON.

    Args:
        stages: Seconds of each timed iteration in each stage; "iteration" is the whole.
        tokens: Response tokens of each timed iteration.
        work: Episodes and trained parameters of one iteration; its optimiser steps were counted.
        versions: Of what ran.
        profiled: One more iteration, once all else is measured, for `operations_of`.
    """
    found: dict[str, Any] = {
        "stages": {name: list(seconds) for name, seconds in stages.items()},
        "tokens": list(tokens),
        # One iteration more warmed up.
        "work": {**work, "optimiser_steps": steps[0] / (len(tokens) + 1)},
        "peak_bytes": peak_bytes(on[0]),
        "base_bytes": base[0],
        "versions": dict(versions),
    }
    found["operations"] = operations_of(profiled) if profiled else None
    print(json.dumps(found))


def operations_of(iteration: Callable[[], object]) -> dict[str, float]:
    """Seconds that an iteration spends in each operation of PyTorch; the largest 12, and the sum.

    On a CPU time within Python counts for the operation around it, or for none.
    """
    gpu = on[0].startswith("cuda")
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds) as seen:
        iteration()
    events = seen.key_averages()
    if gpu:  # kernels alone: the operation that started one has its time too
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        spent = {event.key: event.self_device_time_total / 1e6 for event in kernels}
    else:
        spent = {event.key: event.self_cpu_time_total / 1e6 for event in events}
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:12]
    return {"all": sum(spent.values()), **{name: spent[name] for name in largest}}


def live_tokens(responses: torch.Tensor, eos: int) -> int:
    """Tokens of responses (N, T) up to and with each one's first `eos`; the rest is padding."""
    ended = (responses == eos).cumsum(1)
    return int(((ended == 0).sum(1) + (ended > 0).any(1)).sum())


def peak_bytes(device: str) -> int:
    """The most memory that this process has held: on the GPU, or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says may be the parent's, from before the exec
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count(*_: Any) -> None:
    steps[0] += 1
