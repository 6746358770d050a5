"""`python scripts/bench/memory.py --output FILE` measures the memory of a flagship iteration.

The model is a GPT-2 of 4 layers and width 256 with random weights and V = 50,257. An iteration has
64 episodes of 16 + 48 tokens and 4 epochs of 4 minibatches. Each way to save memory runs in a
separate process. The script writes JSON. It exits with an error if the peak is above the bound, or
if after any stage a live tensor has at least half as many elements as tokens × V (full logits).
"""

import gc
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import measured_on
from rich.console import Console
from rich.table import Table
from shapes import Shape, gpt2, make_env
from work import peak_bytes

import rlhf_gym
from agents.cli.command import device, run
from agents.sb3 import PPO, build
from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import write_json
from rlhf_gym.utils.process import prepare_process

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "critic": {"critic": "separate"},
    "bf16": {"precision": "bf16"},
    "recompute": {"gradient_checkpointing": True},
    "lora": {"lora_rank": 8},
    "all": {"precision": "bf16", "gradient_checkpointing": True, "lora_rank": 8},
}
"""Options of the flagship, on top of a shared critic. A separate one starts from the reference."""


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    ways: tuple[str, ...] = tuple(WAYS)
    """Ways to measure: plain, critic (separate trunk), bf16, recompute (gradient checkpointing),
    lora (rank 8), all (the last three together)."""
    vocabulary: int = 50257
    """V, the size of the vocabulary."""
    episodes: int = 64
    """Episodes per iteration."""
    bound_gib: float = 6.0
    """Maximum peak memory of each way, in GiB of resident memory."""
    output: Path = Path("runs/bench_memory.json")
    """JSON file to write."""
    device: str = "auto"
    """Device to run on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Measure, write the JSON file, and check the bounds."""
    unknown = set(config.ways) - WAYS.keys()
    if unknown:
        raise InputError(f"unknown ways {sorted(unknown)}; choose from {sorted(WAYS)}")
    shape = Shape(gpt2, config.vocabulary, config.episodes, 16, 48, epochs=4, minibatches=4)
    # The operating system records the peak of a whole process, so each way needs a new one.
    fresh = multiprocessing.get_context("spawn")
    rows = []
    for way in config.ways:
        with ProcessPoolExecutor(1, fresh, initializer=prepare_process) as pool:
            rows.append(pool.submit(measure, way, shape, device(config.device)).result())
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, rows)
    table = Table(title="one iteration of the flagship")
    for heading in ("way", "peak MiB", "before MiB", "largest tensor kept / (tokens × V)"):
        table.add_column(heading)
    for row in rows:
        sizes = (f"{row[key] / 2**20:,.0f}" for key in ("peak_bytes", "before_bytes"))
        table.add_row(row["way"], *sizes, f"{max(row['largest_share'].values()):.3f}")
    Console().print(table)
    check(rows, config.bound_gib)


def check(rows: list[dict[str, Any]], bound_gib: float) -> None:
    """Raise a RuntimeError if a way exceeds a bound."""
    for row in rows:
        if row["peak_bytes"] > bound_gib * 2**30:
            raise RuntimeError(f"{row['way']} takes {row['peak_bytes'] / 2**30:.2f} GiB")
        for stage, share in row["largest_share"].items():
            if share >= 0.5:
                raise RuntimeError(f"{row['way']} keeps logits of all tokens after {stage}")


def measure(way: str, shape: Shape, on: str) -> dict[str, Any]:
    """Run and measure one iteration in this process."""
    torch.manual_seed(0)
    tokens = shape.episodes * shape.response
    with tempfile.TemporaryDirectory() as folder:
        env = make_env(shape, Path(folder), on)
        options = {"critic": "shared", **WAYS[way]}
        learner = build(
            PPO,
            env,
            n_epochs=shape.epochs,
            n_minibatches=shape.minibatches,
            device=on,
            critic_warmup=0,  # an update of the critic alone would need less
            **options,
        )
    largest: dict[str, float] = {}

    def watch(owner: Any, name: str, stage: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = work(*args, **kwargs)
            share = largest_tensor() / (tokens * shape.vocab)
            largest[stage] = max(share, largest.get(stage, 0.0))
            return out

        setattr(owner, name, watched)

    watch(learner.policy, "sample_with_log_probs", "sample")
    watch(learner.policy, "score", "score")  # called only in bfloat16
    watch(learner.policy, "values", "values")  # called only with a separate critic
    watch(env, "play", "play")
    watch(learner, "_gradient", "gradient")
    watch(learner, "train", "update")
    before = peak_bytes(on)
    learner.learn(tokens)
    return {
        "way": way,
        "options": WAYS[way],
        "peak_bytes": peak_bytes(on),
        "before_bytes": before,
        "tokens": tokens,
        "vocabulary": shape.vocab,
        "largest_share": largest,
        "trained_parameters": sum(
            p.numel() for p in learner.policy.parameters() if p.requires_grad
        ),
        "versions": {
            "torch": torch.__version__,
            "rlhf_gym": rlhf_gym.__version__,
        },
        "measured_on": measured_on(on),
    }


def largest_tensor() -> int:
    """Return the number of elements of the largest live tensor."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance triggers warnings in some objects
        return max((x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor)), default=0)


if __name__ == "__main__":
    run(main, Config, __doc__)
