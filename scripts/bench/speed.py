"""`python scripts/bench/speed.py --shapes A B --output FILE` times the flagship and its peers.

The models have a given shape and random weights. The systems take turns, each in a separate process
that reads the same files:

- rlhf_gym (critic on the policy's trunk), rlhf_gym_bf16, rlhf_gym_separate (critic with a separate
  trunk)
- generate, generate_bf16: transformers, only sampling
- sb3_rows: unmodified Stable-Baselines3, whose buffer has one row per token
- limit: the same mathematics in bare PyTorch; limit_compiled: with torch.compile, which needs a C++
  compiler
- trl_ppo, trl_ppo_bf16: PPOTrainer of TRL 0.23.1; they need --trl-python

The script prints response tokens per second of each stage, the ratios, and the peak memory divided
by the expected memory of the shape, and writes them as JSON. Run it on a machine without other
load.
"""

import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import measured_on, run_beside
from rich.console import Console
from rich.table import Table
from shapes import KL_COEF, SHAPES, Shape, write_models
from system_flagship import SYSTEMS as OURS

from agents.cli.command import device, run
from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import write_json

FILES = {
    **{name: "system_flagship.py" for name in OURS},
    "generate": "system_generate.py",
    "generate_bf16": "system_generate.py",
    "sb3_rows": "system_sb3_rows.py",
    "limit": "system_bare_pytorch.py",
    "limit_compiled": "system_bare_pytorch.py",
    "trl_ppo": "system_trl_ppo.py",
    "trl_ppo_bf16": "system_trl_ppo.py",
}
"""Script of each system."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    shapes: tuple[str, ...] = ("A", "B")
    """Shapes to time: A (GPT-2, 4 layers, width 256, V = 5,000), B (stories260K), C (GPT-2 small),
    D (A with responses of different lengths); E-episodes-n, E-tokens-n, E-width-n (A with this
    value changed to n = 16, 64, 128, 256, 512); C-episodes-n (C with n = 64, 256 episodes)."""
    systems: tuple[str, ...] = ("rlhf_gym",)
    """Systems to time; the ratios compare the first one with each of the others."""
    trl_python: Path | None = None
    """Python interpreter with TRL 0.23.1, for trl_ppo and trl_ppo_bf16."""
    output: Path = Path("runs/bench_speed.json")
    """JSON file to write."""
    iterations: int = 5
    """Timed iterations per turn; one more is a warm-up."""
    turns: int = 1
    """Turns of each system; the results are medians over all iterations."""
    row_episodes: int = 4
    """Episodes of sb3_rows. A few are enough: its time per token does not depend on them."""
    profile: bool = False
    """Profile one more iteration of our systems; the JSON gets the time of each operation."""
    device: str = "auto"
    """Device to run on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Time every system on every shape and write the JSON file."""
    check(config)
    rows: list[dict[str, Any]] = []
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for name in config.shapes:
        rows += bench(name, config)
        write_json(config.output, rows)
    show(rows, config)


def check(config: Config) -> None:
    """Check the options before anything is timed.

    Raises:
        InputError: An option is wrong.
    """
    for kind, asked, known in (
        ("shapes", config.shapes, SHAPES),
        ("systems", config.systems, FILES),
    ):
        unknown = set(asked) - known.keys()
        if unknown:
            raise InputError(f"unknown {kind} {sorted(unknown)}; choose from {sorted(known)}")
    if min(config.iterations, config.turns) < 1:
        raise InputError("--iterations and --turns must be at least 1")
    for system in config.systems:
        if system.startswith("trl") and not (config.trl_python and config.trl_python.exists()):
            raise InputError(f"{system} needs --trl-python, a Python interpreter with trl 0.23.1")
    uneven = [s for s in config.shapes if SHAPES[s].mean_length is not None]
    if any(s.startswith("limit") for s in config.systems) and ("B" in config.shapes or uneven):
        raise InputError(
            "limit supports only GPT-2 and responses of equal length; leave out the shapes B and D"
        )


def bench(name: str, config: Config) -> list[dict[str, Any]]:
    """Return the rows of one shape: each stage of each system, and the whole iteration."""
    shape = SHAPES[name]
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in config.systems}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        write_models(shape, Path(folder))
        for _ in range(config.turns):
            for system in config.systems:
                found[system].append(one_turn(system, name, shape, Path(folder), config))
    rows, on = [], measured_on(device(config.device))
    for system, turns in found.items():
        work = turns[0]["work"]
        check_work(system, shape, work)
        for stage in turns[0]["stages"]:
            pairs = [
                (seconds, tokens)
                for turn in turns
                for seconds, tokens in zip(turn["stages"][stage], turn["tokens"], strict=True)
            ]
            rates = [tokens / seconds for seconds, tokens in pairs]
            rows.append(
                {
                    "shape": name,
                    "system": system,
                    "stage": stage,
                    "tokens_per_second": statistics.median(rates),
                    "lowest": min(rates),
                    "highest": max(rates),
                    "seconds": statistics.median(seconds for seconds, _ in pairs),
                    "iterations": len(pairs),
                    "peak_bytes": max(turn["peak_bytes"] for turn in turns),
                    "base_bytes": turns[0]["base_bytes"],
                    "work": work,
                    **({"operations": turns[-1]["operations"]} if stage == "iteration" else {}),
                    "versions": {"python": platform.python_version(), **turns[0]["versions"]},
                    "device": device(config.device),
                    "measured_on": on,
                }
            )
    return rows


def one_turn(system: str, name: str, shape: Shape, folder: Path, config: Config) -> dict[str, Any]:
    """Run one turn of a system; return what it measured (see `work.say`).

    Raises:
        InputError: The system failed.
    """
    options = {
        "system": system,
        "shape": name,
        "episodes": shape.episodes,
        "prompt": shape.prompt,
        "response": shape.response,
        "epochs": shape.epochs,
        "minibatches": shape.minibatches,
        "ends": shape.mean_length is not None,
        "kl_coef": KL_COEF,
        "precision": "bf16" if system.endswith("bf16") else "fp32",
        "iterations": config.iterations,
        "row_episodes": config.row_episodes,
        "profile": config.profile,
        "threads": torch.get_num_threads(),
        "device": device(config.device),
    }
    write_json(folder / "options.json", options)
    python = config.trl_python if system.startswith("trl") else Path(sys.executable)
    assert python is not None
    return run_beside(python, FILES[system], folder)


def check_work(system: str, shape: Shape, work: dict[str, int]) -> None:
    """Check that a system did the same work as the others.

    Raises:
        InputError: Its number of episodes or optimiser steps is different.
    """
    expected = {"episodes": shape.episodes, "optimiser_steps": shape.epochs * shape.minibatches}
    if system.startswith("generate"):
        expected["optimiser_steps"] = 0
    if system == "sb3_rows":
        expected["episodes"] = work["episodes"]
    if any(work[name] != count for name, count in expected.items()):
        raise InputError(f"{system} did {work} instead of {expected}")


def show(rows: list[dict[str, Any]], config: Config) -> None:
    """Print a table of rates, and the ratio of the first system's rate to each."""
    table = Table(title="response tokens/s, medians; ratio: first system / this system")
    headings = ("shape", "system", "stage", "tokens/s", "lowest", "highest", "ratio", "memory")
    for heading in headings:
        table.add_column(heading)
    first = {
        (row["shape"], row["stage"]): row["tokens_per_second"]
        for row in rows
        if row["system"] == config.systems[0]
    }
    for row in rows:
        ours = first.get((row["shape"], row["stage"]))
        table.add_row(
            row["shape"],
            row["system"],
            row["stage"],
            *(f"{row[key]:,.0f}" for key in ("tokens_per_second", "lowest", "highest")),
            "" if ours is None else f"{ours / row['tokens_per_second']:.2f}",
            memory(row),
        )
    Console().print(table)


def memory(row: dict[str, Any]) -> str:
    """Return peak memory divided by `expected_memory`; empty if that is not known."""
    if row["stage"] != "iteration" or "expected_bytes" not in row["work"]:
        return ""
    return f"{(row['peak_bytes'] - row['base_bytes']) / row['work']['expected_bytes']:.2f}"


if __name__ == "__main__":
    run(main, Config, __doc__)
