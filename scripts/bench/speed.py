"""`python scripts/bench/speed.py --shapes A B --output FILE` times the flagship and its peers.

Random weights of a given shape. The systems take turns, each in a process of its own that reads the
same files: rlhf_gym (critic on the policy's trunk), rlhf_gym_bf16, rlhf_gym_separate (critic with a
trunk of its own), generate and generate_bf16 (transformers, sampling alone), sb3_rows (stock
Stable-Baselines3, a row a token), limit (bare PyTorch, the same mathematics), limit_compiled (the
same with torch.compile, which needs a C++ compiler), and, with --trl-python, trl_ppo and
trl_ppo_bf16 (PPOTrainer of TRL 0.23.1). Prints response tokens per second of each stage, the
ratios, and the peak memory over what the shape asks for, and writes them as JSON. Run it on a quiet
machine.
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
"""What runs each system."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    shapes: tuple[str, ...] = ("A", "B")
    """Which shapes: A (GPT-2, 4 layers, width 256, V = 5,000), B (stories260K), C (GPT-2 small), D
    (A with responses of uneven length); A grown or shrunk, n = 16, 64, 128, 256, 512: E-episodes-n,
    E-tokens-n, E-width-n; C with more episodes, n = 64, 256: C-episodes-n."""
    systems: tuple[str, ...] = ("rlhf_gym",)
    """Which systems; the first is what the others are held against."""
    trl_python: Path | None = None
    """Python interpreter with TRL 0.23.1, for trl_ppo and trl_ppo_bf16."""
    output: Path = Path("runs/bench_speed.json")
    """Where the JSON goes."""
    iterations: int = 5
    """Timed iterations of each turn; one more warms up."""
    turns: int = 1
    """How often each system has its turn; the medians over all iterations are reported."""
    row_episodes: int = 4
    """Episodes of sb3_rows, whose time a token does not depend on them."""
    profile: bool = False
    """One more iteration of ours says which operations take its time; the JSON has it."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Time every system on every shape and write the rows."""
    check(config)
    rows: list[dict[str, Any]] = []
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for name in config.shapes:
        rows += bench(name, config)
        write_json(config.output, rows)
    show(rows, config)


def check(config: Config) -> None:
    """Raise an InputError before anything is timed."""
    for kind, asked, known in (
        ("shapes", config.shapes, SHAPES),
        ("systems", config.systems, FILES),
    ):
        unknown = set(asked) - known.keys()
        if unknown:
            raise InputError(f"unknown {kind} {sorted(unknown)}; there are {sorted(known)}")
    if min(config.iterations, config.turns) < 1:
        raise InputError("--iterations and --turns must be at least 1")
    for system in config.systems:
        if system.startswith("trl") and not (config.trl_python and config.trl_python.exists()):
            raise InputError(f"{system} needs --trl-python, a Python with trl 0.23.1")
    uneven = [s for s in config.shapes if SHAPES[s].mean_length is not None]
    if any(s.startswith("limit") for s in config.systems) and ("B" in config.shapes or uneven):
        raise InputError("limit knows GPT-2 and responses of one length alone: no B, no D")


def bench(name: str, config: Config) -> list[dict[str, Any]]:
    """Rows of one shape: each stage of each system, and the whole iteration."""
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
    """What a system says of a few iterations.

    Raises:
        InputError: It failed.
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
    """Whether it did what it is compared at.

    Raises:
        InputError: Other episodes or optimiser steps.
    """
    expected = {"episodes": shape.episodes, "optimiser_steps": shape.epochs * shape.minibatches}
    if system.startswith("generate"):
        expected["optimiser_steps"] = 0
    if system == "sb3_rows":
        expected["episodes"] = work["episodes"]
    if any(work[name] != count for name, count in expected.items()):
        raise InputError(f"{system} did {work}, not {expected}")


def show(rows: list[dict[str, Any]], config: Config) -> None:
    """A table of rates, and of what the first system's are over the others'."""
    table = Table(title="response tokens/s, medians; ratio: the first system's over this one's")
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
    """Peak memory over what the shape asks for (`expected_memory`), where that is known."""
    if row["stage"] != "iteration" or "expected_bytes" not in row["work"]:
        return ""
    return f"{(row['peak_bytes'] - row['base_bytes']) / row['work']['expected_bytes']:.2f}"


if __name__ == "__main__":
    run(main, Config, __doc__)
