"""`python scripts/bench/env.py --output FILE` measures the overhead of the environment itself.

It measures two things: the share of `step` and `play` that is not spent in the models, and the
growth of `play`'s memory with the tokens of a wave at a vocabulary of 50,257 (each size in a
separate process). It writes JSON. Run it on a machine without other load.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import measured_on
from rich.console import Console
from shapes import Shape, gpt2
from shapes import make_env as make_shaped_env
from work import peak_bytes

import rlhf_gym
from agents.cli.command import device, run
from agents.runs.setup import env_keywords, make_env
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.decoding.sampling import sample_responses
from rlhf_gym.objective.objective import Objective
from rlhf_gym.tokens import row_lengths
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.process import prepare_process

MODELS = ("ref_log_prob_of_next", "ref_log_probs", "final_scores")
"""Methods of `Objective` that run models. The rest of a step is the environment's own work."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id; its `step` and `play` are timed."""
    rows: int = 256
    """Rows of the environment."""
    waves: int = 10
    """Timed waves; the result is their median."""
    memory_rows: tuple[int, ...] = (32, 64, 128, 256)
    """Numbers of rows at which to measure the peak memory of `play`; none to skip this."""
    output: Path = Path("runs/bench_env.json")
    """JSON file to write."""
    device: str = "auto"
    """Device to run on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Measure, and write the JSON file."""
    found: dict[str, Any] = {
        "env": config.env,
        "rows": config.rows,
        **own_share(config),
        "memory": [peak(rows) for rows in config.memory_rows],
        "versions": {
            "torch": torch.__version__,
            "rlhf_gym": rlhf_gym.__version__,
        },
        "measured_on": measured_on(device(config.device)),
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, found)
    Console().print(found)


def own_share(config: Config) -> dict[str, Any]:
    """Return the share of `step` and `play` outside the models, and the seconds per wave."""
    env = make_env(config.env, config.rows, env_keywords({}, config.device))
    clock = _Clock(env.objective)
    shares: dict[str, list[tuple[float, float]]] = {"step": [], "play": []}
    torch.manual_seed(0)
    for wave in range(config.waves + 1):
        observations, _ = env.reset(seed=wave)
        prompts = torch.from_numpy(observations[:, : env.prompts.max_tokens])
        reference = env.objective.reference
        actions = sample_responses(
            reference,
            prompts.to(reference.device),
            env.max_new_tokens,
            stop_at_eos=env.stop_at_eos,
        )
        tokens = actions.cpu().numpy()
        ways = {"step": _stepping, "play": _playing}
        for name, way in ways.items():
            env.reset(seed=wave)
            whole, models = clock.time(way, env, tokens)
            if wave:  # the first wave is a warm-up
                shares[name].append((1 - models / whole, whole))
    return {
        name: {
            "own_share": statistics.median(share for share, _ in rows),
            "own_share_most": max(share for share, _ in rows),
            "seconds": statistics.median(seconds for _, seconds in rows),
        }
        for name, rows in shares.items()
    }


def _stepping(env: TokenVectorEnv, tokens: np.ndarray) -> None:
    """Take `max_new_tokens` steps; a row that has ended starts its response again."""
    every, at, lengths = np.arange(len(tokens)), np.zeros(len(tokens), int), row_lengths(tokens)
    for _ in range(env.max_new_tokens):
        _, _, ended, _, _ = env.step(tokens[every, at])
        at = np.where(ended, 0, np.minimum(at + 1, lengths - 1))


def _playing(env: TokenVectorEnv, tokens: np.ndarray) -> None:
    env.play(tokens, np.zeros(tokens.shape, dtype=np.float32))


class _Clock:
    """Clock for the time that an objective spends in its models."""

    def __init__(self, objective: Objective) -> None:
        self._spent, self._inside = 0.0, False
        for name in MODELS:
            setattr(objective, name, self._timed(getattr(objective, name)))

    def time(self, work: Callable[..., None], *args: Any) -> tuple[float, float]:
        """Return the seconds of the whole call, and of the models in it."""
        self._spent = 0.0
        begun = time.perf_counter()
        work(*args)
        return time.perf_counter() - begun, self._spent

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            # The methods may call each other. Only the outermost call counts.
            begun, outermost, self._inside = time.perf_counter(), not self._inside, True
            try:
                return method(*args)
            finally:
                if outermost:
                    self._inside = False
                    self._spent += time.perf_counter() - begun

        return call


def peak(rows: int) -> dict[str, int]:
    """Measure the memory that `play` adds at its peak: rows of 16 + 48 tokens, V = 50,257."""
    # The operating system records the peak of a whole process, so each measurement needs a new one.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, initializer=prepare_process) as pool:
        before, after = pool.submit(_peak, rows).result()
    return {"rows": rows, "tokens": rows * 48, "peak_bytes": after - before}


def _peak(rows: int) -> tuple[int, int]:
    shape = Shape(gpt2, 50257, rows, 16, 48, epochs=1, minibatches=1)
    with tempfile.TemporaryDirectory() as folder:
        env = make_shaped_env(shape, Path(folder), "cpu")
        env.reset(seed=0)
        before = peak_bytes("cpu")
        tokens = np.random.default_rng(0).integers(2, shape.vocab, (rows, shape.response))
        _playing(env, tokens)
    return before, peak_bytes("cpu")


if __name__ == "__main__":
    run(main, Config, __doc__)
