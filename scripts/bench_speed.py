"""`python scripts/bench_speed.py --shapes A B --output FILE` times PPO iterations, stage by stage.

Random weights of a given shape; every episode is sampled to the full length, so the work does not
depend on what is sampled. Prints tokens per second of each stage and writes them as JSON. Run it
on a quiet machine.
"""

import resource
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import device, run
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import rlhf_gym
from agents.sb3 import PPO, build
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.files import write_json
from rlhf_gym.lm import CausalLM
from rlhf_gym.objective import Objective
from rlhf_gym.prompts import PromptDataset
from rlhf_gym.reward_model import RewardModel


@dataclass(frozen=True)
class Shape:
    """A model and the work of one iteration."""

    make: Any
    vocab: int
    episodes: int
    prompt: int
    response: int
    epochs: int
    minibatches: int


def gpt2(vocab: int) -> PreTrainedModel:
    """4 layers, width 256."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab, n_embd=256, n_layer=4, n_head=4, n_positions=128)
    )


def _stories(vocab: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


SHAPES = {
    # 4 layers, width 256: the shape on which TRL's PPOTrainer was measured.
    "A": Shape(gpt2, 5000, 64, 16, 48, epochs=4, minibatches=4),
    # The shape of stories260K.
    "B": Shape(_stories, 512, 128, 32, 48, epochs=4, minibatches=4),
}


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    shapes: tuple[str, ...] = ("A", "B")
    """Which shapes: A (GPT-2, 4 layers, width 256, V = 5,000), B (stories260K)."""
    output: Path = Path("runs/bench_speed.json")
    """Where the JSON goes."""
    iterations: int = 5
    """Timed iterations; the medians are reported."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""
    seed: int = 0
    """Seed of the weights."""


def main(config: Config) -> None:
    """Time every shape and write the rows."""
    unknown = set(config.shapes) - SHAPES.keys()
    if unknown:
        raise InputError(f"unknown shapes {sorted(unknown)}; there are {sorted(SHAPES)}")
    rows = [row for name in config.shapes for row in bench(name, config)]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, rows)
    table = Table(title=f"response tokens/s, median of {config.iterations} iterations")
    for heading in ("shape", "stage", "tokens/s", "seconds", "spread"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["shape"],
            row["stage"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:.3f}",
            f"{row['spread']:.3f}",
        )
    Console().print(table)


def bench(name: str, config: Config) -> list[dict[str, Any]]:
    """Rows of one shape: each stage and the whole iteration."""
    shape = SHAPES[name]
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        env = make_env(shape, Path(folder), device(config.device))
        learner = build(
            PPO, env, n_epochs=shape.epochs, n_minibatches=shape.minibatches, device=config.device
        )
        stages: dict[str, list[float]] = {}
        iteration = shape.episodes * shape.response
        for i in range(config.iterations + 1):
            learner.learn(iteration, reset_num_timesteps=True)
            if i:  # the first one warms up
                for stage, seconds in learner.stage_seconds.items():
                    stages.setdefault(stage, []).append(seconds)
    tokens = shape.episodes * shape.response
    totals = [sum(times) for times in zip(*stages.values(), strict=True)]
    return [
        {
            "shape": name,
            "system": "rlhf_gym",
            "stage": stage,
            "tokens_per_second": tokens / statistics.median(times),
            "seconds": statistics.median(times),
            "spread": max(times) - min(times),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "versions": {
                "torch": torch.__version__,
                "rlhf_gym": rlhf_gym.__version__,
                "threads": torch.get_num_threads(),
            },
        }
        for stage, times in [*stages.items(), ("iteration", totals)]
    ]


def make_env(shape: Shape, folder: Path, on: str) -> TokenVectorEnv:
    """An environment of this shape, reference and reward model with random weights."""
    vocabulary = {f"t{i}": i for i in range(shape.vocab)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="t1", pad_token="t0")
    model = shape.make(shape.vocab)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    reference = CausalLM.load(str(folder / "reference"), device=on)
    reference.model.requires_grad_(False)
    reward = RewardModel.from_backbone(str(folder / "reference"), device=on).requires_grad_(False)
    rng = np.random.default_rng(0)
    prompts = tuple(
        tuple(row) for row in rng.integers(2, shape.vocab, (256, shape.prompt)).tolist()
    )
    return TokenVectorEnv(
        Objective(reference, reward.eval(), kl_coef=0.1),
        PromptDataset(prompts, shape.prompt),
        num_envs=shape.episodes,
        max_new_tokens=shape.response,
        stop_at_eos=False,
    )


if __name__ == "__main__":
    run(main, Config, __doc__)
