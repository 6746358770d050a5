"""`python scripts/bench/groups.py --trl-python PATH` times RLOO and GRPO against TRL's trainers.

Both use the same random model, reward model and prompts, and do the same work in float32: the same
number of full-length responses, group size, passes and optimiser steps. They take turns on the
machine. PATH is the Python of an environment with trl; the two share only files. The script prints
response tokens per second over whole iterations and their ratio, and writes JSON. Run it on a
machine without other load.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from machine import measured_on, run_beside
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, make_env

import rlhf_gym
from agents.cli.command import device, run
from agents.runs.algorithm import load_algorithm
from rlhf_gym.errors import InputError
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.files import write_json


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    trl_python: Path
    """Python interpreter of an environment with trl."""
    algorithms: tuple[str, ...] = ("rloo", "grpo")
    """Algorithms to time: rloo, grpo."""
    shape: str = "A"
    """Shape from bench/shapes.py."""
    samples_per_prompt: int = 4
    """K, the responses to each prompt."""
    epochs: int = 1
    """Passes over a wave, one optimiser step each."""
    iterations: int = 4
    """Timed iterations per turn; one more is a warm-up."""
    turns: int = 3
    """Turns of each system; the results are medians over all iterations."""
    output: Path = Path("runs/bench_groups.json")
    """JSON file to write."""
    device: str = "auto"
    """Device to run on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Time both systems and write the JSON file."""
    if config.shape not in SHAPES:
        raise InputError(f"unknown shape {config.shape!r}; choose from {sorted(SHAPES)}")
    if set(config.algorithms) - {"rloo", "grpo"}:
        raise InputError(f"--algorithms must be rloo or grpo, not {config.algorithms}")
    if not config.trl_python.exists():
        raise InputError(f"--trl-python {config.trl_python} does not exist")
    rows = [measure(config, name) for name in config.algorithms]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, rows)
    table = Table(title=f"shape {config.shape}, response tokens/s of whole iterations, medians")
    for heading in ("algorithm", "rlhf_gym", "trl", "ratio"):
        table.add_column(heading)
    for row in rows:
        ours, theirs = (f"{row[who]['tokens_per_second']:,.0f}" for who in ("rlhf_gym", "trl"))
        table.add_row(row["algorithm"], ours, theirs, f"{row['ratio']:.2f}")
    Console().print(table)


def measure(config: Config, algorithm: str) -> dict[str, Any]:
    """Time one algorithm in both systems, which take turns."""
    shape = SHAPES[config.shape]
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        env = make_env(shape, folder, device(config.device))
        reward = env.objective.reward
        assert isinstance(reward, RewardModel)
        reward.save_pretrained(folder / "reward_model")
        options = {
            "algorithm": algorithm,
            "episodes": shape.episodes,
            "response": shape.response,
            "samples_per_prompt": config.samples_per_prompt,
            "epochs": config.epochs,
            "iterations": config.iterations,
            "kl_coef": env.objective.kl_coef,
            "threads": torch.get_num_threads(),
        }
        write_json(folder / "options.json", options)
        prompts = [env.objective.reference.tokenizer.decode(row) for row in env.prompts.ids]
        write_json(folder / "prompts.json", prompts)
        for _ in range(config.turns):
            ours += time_ours(config, algorithm, env)
            found = run_beside(config.trl_python, "system_trl_groups.py", folder)
            theirs += found["seconds"]
    tokens = shape.episodes * shape.response
    row: dict[str, Any] = {**options, "shape": config.shape, "tokens": tokens}
    for who, seconds in (("rlhf_gym", ours), ("trl", theirs)):
        row[who] = {
            "tokens_per_second": tokens / statistics.median(seconds),
            "seconds": seconds,
        }
    row["ratio"] = statistics.median(theirs) / statistics.median(ours)
    row["measured_on"] = measured_on(device(config.device))
    row["versions"] = {
        "python": sys.version.split()[0],
        "rlhf_gym": rlhf_gym.__version__,
        "torch": version("torch"),
        "trl": found["versions"],
    }
    return row


def time_ours(config: Config, algorithm: str, env: Any) -> list[float]:
    """Return the seconds of each timed iteration of our implementation."""
    module = load_algorithm(algorithm)
    options = module.Config(
        learning_rate=1e-5,
        samples_per_prompt=config.samples_per_prompt,
        n_waves=1,
        n_epochs=config.epochs,
        n_minibatches=1,
    )
    learner = module.make(options, env).algorithm
    clock = Clock()
    tokens = env.num_envs * env.max_new_tokens
    learner.learn((config.iterations + 1) * tokens, callback=clock)
    spent = [b - a for a, b in pairwise(clock.times)]
    return spent[1:]


if __name__ == "__main__":
    run(main, Config, __doc__)
