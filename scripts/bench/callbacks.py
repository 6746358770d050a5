"""Benchmark of what callbacks and a monitor cost the flagship, as a share of an iteration.

After each wave a rollout of whole responses takes callbacks and watching wrappers through it, step
by step. `python scripts/bench/callbacks.py --output FILE` times that part inside whole iterations,
with some callbacks of Stable-Baselines3 and a `VecMonitor`, and writes the median share.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, load_env, write_models
from stable_baselines3.common.callbacks import (
    CallbackList,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.vec_env import VecMonitor

from agents.cli.command import device, run
from agents.sb3 import PPO, TokenSB3VecEnv, build
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.process import prepare_process


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    shape: str = "A"
    """Shape of docs/speed.md."""
    iterations: int = 6
    """Timed iterations, after one as a warm-up."""
    device: str = "auto"
    """Where to run: auto, cpu or cuda."""
    output: Path | None = None
    """JSON file for the figures."""


def main(config: Config) -> None:
    """Run the iterations; print and write the share that the callbacks took."""
    prepare_process()
    shape, where = SHAPES[config.shape], device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        write_models(shape, Path(folder))
        env = load_env(shape, Path(folder), where)
        learner = build(
            PPO,
            VecMonitor(TokenSB3VecEnv(env)),
            n_waves=1,
            n_epochs=shape.epochs,
            n_minibatches=shape.minibatches,
            critic_warmup=0,
            critic="shared",
            device=where,
            seed=0,
        )
    spent: list[float] = []
    learner._show = _timed(learner._show, spent)  # type: ignore[method-assign]
    shares, seconds = [], []
    for i in range(config.iterations + 1):
        stop = StopTrainingOnMaxEpisodes(10**9)
        every = EveryNTimesteps(10**9, StopTrainingOnMaxEpisodes(10**9))
        spent.clear()
        begun = time.perf_counter()
        learner.learn(1, callback=CallbackList([stop, every]))
        whole = time.perf_counter() - begun
        if i:
            shares.append(sum(spent) / whole)
            seconds.append(whole)
    figures = {
        "shape": config.shape,
        "device": str(learner.device),
        "share_of_iteration": {
            "median": float(np.median(shares)),
            "low": min(shares),
            "high": max(shares),
        },
        "iteration_seconds": float(np.median(seconds)),
        "tokens": learner.rollout_buffer.n_tokens,
        "torch": torch.__version__,
    }
    print(figures)
    if config.output is not None:
        write_json(config.output, figures)


def _timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        begun = time.perf_counter()
        try:
            return method(*args)
        finally:
            spent.append(time.perf_counter() - begun)

    return call


if __name__ == "__main__":
    run(main, Config, __doc__)
