"""`python scripts/bench/reward.py --trl-python PATH` times reward-model training against TRL's.

Both use the same pairs (as token ids), model, precision, batch size and number of steps. The two
take turns several times; the result is the ratio of the median times. PATH is the Python of a
separate environment with TRL. Run it on a machine without other load.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import measured_on, run_beside
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from agents.cli.command import device, run
from rlhf_gym.errors import InputError
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import EncodedComparison, encode_comparisons
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.reward_training import RewardTraining, train_reward_model
from rlhf_gym.utils.files import write_json

# Shapes of synthetic pairs: tokens of the prompt and of each candidate.
SHAPES = {"long prompts": (384, 32), "even": (64, 64), "short prompts": (8, 48)}
CHOICES = Comparison("p", ("a", "b"), best=0).choices()


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    trl_python: Path
    """Python interpreter of an environment with TRL."""
    tokenizer: str
    """Any tokenizer (hub name or local path); the synthetic pairs are random ids from it."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """Synthetic shapes to time: long prompts, even, short prompts."""
    pairs: int = 256
    """Pairs per synthetic shape."""
    data: Path | None = None
    """File of real pairs to time as well, shortened by whole turns to the model's context."""
    batch_size: int = 16
    """Pairs per step."""
    width: int = 128
    """Width of the model."""
    layers: int = 4
    """Layers of the model."""
    bf16: bool = False
    """Use bfloat16 autocast in both."""
    repeats: int = 3
    """Runs of each trainer; the two take turns."""
    output: Path = Path("runs/bench_reward.json")
    """JSON file to write."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Time both trainers on every shape and write the JSON file."""
    if unknown := set(config.shapes) - SHAPES.keys():
        raise InputError(f"unknown shapes: {', '.join(sorted(unknown))}; choose from {[*SHAPES]}")
    if not config.trl_python.exists():
        raise InputError(f"--trl-python {config.trl_python} does not exist")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = make_model(config, folder / "model")
        for shape, comparisons in workloads(config, backbone).items():
            rows.append(timed(config, shape, comparisons, folder))
            print(rows[-1])
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, rows)
    table = Table("shape", "pairs/s, ours", "pairs/s, TRL", "ratio")
    for row in rows:
        ours, theirs = (f"{row[who]['pairs_per_second']:.1f}" for who in ("rlhf_gym", "trl"))
        table.add_row(row["shape"], ours, theirs, f"{row['ratio']:.2f}")
    Console().print(table)


def make_model(config: Config, folder: Path) -> str:
    """Write a Llama with random weights and its tokenizer; return the folder."""
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.width * 8 // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=max(1, config.width // 32),
            max_position_embeddings=512,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    return str(folder)


def workloads(config: Config, backbone: str) -> dict[str, list[EncodedComparison]]:
    """Return the pairs of every shape, and those of `data`."""
    rng = np.random.default_rng(0)
    model = RewardModel.from_backbone(backbone)
    vocab = len(model.tokenizer)
    out = {}
    for shape in config.shapes:
        prompt, response = SHAPES[shape]
        pairs = []
        for i in range(config.pairs):
            start, *ends = (
                rng.integers(3, vocab, size=n).tolist() for n in (prompt, response, response)
            )
            pairs.append(EncodedComparison(start, ends, CHOICES, Comparison(str(i), ("a", "b"), 0)))
        out[shape] = pairs
    if config.data is not None:
        comparisons = read_comparisons(config.data, skipped=[])
        encoded, _ = encode_comparisons(comparisons, model, 512, too_long="cut_turns")
        out[config.data.name.split(".")[0]] = encoded
    return out


def timed(
    config: Config, shape: str, comparisons: list[EncodedComparison], folder: Path
) -> dict[str, Any]:
    """Time both trainers, which take turns. Ours writes checkpoints; TRL's writes none."""
    rate, threads = 1e-4, torch.get_num_threads()
    pairs = [
        {"chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in (c.rows for c in comparisons)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "options.json").write_text(
        json.dumps(
            {
                "batch_size": config.batch_size,
                "learning_rate": rate,
                "bf16": config.bf16,
                "threads": threads,
            }
        )
    )
    options = RewardTraining(
        batch_size=config.batch_size, learning_rate=rate, bf16=config.bf16, weight_decay=0.0
    )
    where = device(config.device)
    ours, theirs = [], []
    competitor: dict[str, Any] = {}
    for _ in range(config.repeats):
        model = RewardModel.from_backbone(str(folder / "model"), device=where)
        before = [p.detach().clone() for p in model.parameters()]
        begun = time.perf_counter()
        train_reward_model(model, comparisons, options, checkpoint_dir=folder / "ours")
        ours.append(time.perf_counter() - begun)
        # Check that both did the same work: every parameter moved, and the step counts agree.
        pairs_of = zip(before, model.parameters(), strict=True)
        assert all(bool((p != q).any()) for p, q in pairs_of)
        competitor = run_beside(config.trl_python, "system_trl_reward.py", folder)
        assert competitor["steps"] == -(-len(comparisons) // config.batch_size)
        theirs.append(competitor["seconds"])
    tokens = sum(len(row) for c in comparisons for row in c.rows)
    result: dict[str, Any] = {"shape": shape, "pairs": len(comparisons), "tokens": tokens}
    for who, seconds in (("rlhf_gym", ours), ("trl", theirs)):
        middle = statistics.median(seconds)
        result[who] = {
            "seconds": seconds,
            "pairs_per_second": len(comparisons) / middle,
            "tokens_per_second": tokens / middle,
        }
    result["ratio"] = statistics.median(theirs) / statistics.median(ours)
    result |= {
        "batch_size": config.batch_size,
        "width": config.width,
        "layers": config.layers,
        "precision": "bf16" if config.bf16 else "fp32",
        "device": where,
        "measured_on": measured_on(where),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "trl_versions": competitor["versions"],
    }
    return result


if __name__ == "__main__":
    run(main, Config, __doc__)
