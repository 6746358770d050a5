"""Shared code of the systems of bench/speed.py.

It must not import this project, which TRL's environment does not have.
"""

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
"""Optimiser steps of this process so far (one element, so that functions can change it)."""

base = [0]
"""Peak memory in bytes before the models were loaded."""

on = ["cpu"]
"""Device of this process."""


def begin(options: Mapping[str, Any]) -> None:
    """Set seed, threads and device, and start counting. Each system calls this first."""
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
    """Print the measurements as one line of JSON.

    Args:
        stages: For each stage, the seconds in each timed iteration; "iteration" is the whole.
        tokens: Response tokens of each timed iteration.
        work: Episodes and trained parameters of an iteration; the optimiser steps are added here.
        versions: Versions of the packages that ran.
        profiled: Function that runs one more iteration, for `operations_of`; called at the end.
    """
    found: dict[str, Any] = {
        "stages": {name: list(seconds) for name, seconds in stages.items()},
        "tokens": list(tokens),
        # The warm-up is one more iteration, which is counted too.
        "work": {**work, "optimiser_steps": steps[0] / (len(tokens) + 1)},
        "peak_bytes": peak_bytes(on[0]),
        "base_bytes": base[0],
        "versions": dict(versions),
    }
    found["operations"] = operations_of(profiled) if profiled else None
    print(json.dumps(found))


def operations_of(iteration: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of an iteration in each PyTorch operation: the largest 12, and the sum.

    On a CPU the time in Python code counts for the operation that encloses it, or for none.
    """
    gpu = on[0].startswith("cuda")
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds) as seen:
        iteration()
    events = seen.key_averages()
    if gpu:  # only kernels, because the operation that launched one includes its time
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        spent = {event.key: event.self_device_time_total / 1e6 for event in kernels}
    else:
        spent = {event.key: event.self_cpu_time_total / 1e6 for event in events}
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:12]
    return {"all": sum(spent.values()), **{name: spent[name] for name in largest}}


def live_tokens(responses: torch.Tensor, eos: int) -> int:
    """Count the tokens of responses (N, T) up to and including the first `eos` of each."""
    ended = (responses == eos).cumsum(1)
    return int(((ended == 0).sum(1) + (ended > 0).any(1)).sum())


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process in bytes: on the GPU, or resident on the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage may report the peak of the parent, from before the exec
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count(*_: Any) -> None:
    steps[0] += 1
