"""What the systems of bench_speed.py share. Each runs on files alone, some without this project."""

import json
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = [0]
"""Optimiser steps of this process so far."""


def begin(options: Mapping[str, Any]) -> None:
    """The same start for all."""
    register_optimizer_step_post_hook(_count)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    torch.set_num_threads(options["threads"])


def say(
    stages: Mapping[str, Sequence[float]],
    *,
    tokens: Sequence[int],
    work: Mapping[str, int],
    versions: Mapping[str, str],
) -> None:
    """Print what was measured as one line of JSON.

    Args:
        stages: Seconds of each timed iteration in each stage; "iteration" is the whole.
        tokens: Response tokens of each timed iteration.
        work: Episodes and trained parameters of one iteration; its optimiser steps were counted.
        versions: Of what ran.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    found = {
        "stages": {name: list(seconds) for name, seconds in stages.items()},
        "tokens": list(tokens),
        # One iteration more warmed up.
        "work": {**work, "optimiser_steps": steps[0] / (len(tokens) + 1)},
        "peak_bytes": peak,
        "versions": dict(versions),
    }
    print(json.dumps(found))


def _count(*_: Any) -> None:
    steps[0] += 1
