"""Shapes for the benchmarks, and environments of these shapes with random weights."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.objective.objective import Objective
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.files import read_json, write_json


@dataclass(frozen=True)
class Shape:
    """A model and the work of one iteration.

    Attributes:
        make: Function from V to a model with random weights.
        vocab: V, the size of the vocabulary.
        episodes: N, the episodes per iteration.
        prompt: Tokens of each prompt.
        response: T, the token budget.
        epochs: Passes over the episodes.
        minibatches: Optimiser steps per pass.
        mean_length: Mean length of a response, which ends at each token with the same probability.
            If None, every response fills the budget, so the work does not depend on the samples.
    """

    make: Any
    vocab: int
    episodes: int
    prompt: int
    response: int
    epochs: int
    minibatches: int
    mean_length: int | None = None


def gpt2(vocab: int, width: int = 256, layers: int = 4, positions: int = 128) -> PreTrainedModel:
    """Return a GPT-2 with heads of width 64 and random weights."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_embd=width,
            n_layer=layers,
            n_head=max(1, width // 64),
            n_positions=positions,
        )
    )


def gpt2_small(vocab: int) -> PreTrainedModel:
    """Return a GPT-2 small (12 layers, width 768) with random weights."""
    return gpt2(vocab, 768, 12)


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
    # GPT-2 small.
    "C": Shape(gpt2_small, 50257, 16, 16, 48, epochs=4, minibatches=4),
    # Responses of uneven length.
    "D": Shape(gpt2, 5000, 64, 16, 48, epochs=4, minibatches=4, mean_length=12),
}

# Scaling: shape A with another number of episodes, number of tokens, or width.
for _n in (16, 64, 128, 256, 512):
    SHAPES[f"E-episodes-{_n}"] = replace(SHAPES["A"], episodes=_n)
    SHAPES[f"E-tokens-{_n}"] = replace(
        SHAPES["A"], response=_n, make=partial(gpt2, positions=max(128, 16 + _n))
    )
    SHAPES[f"E-width-{_n}"] = replace(SHAPES["A"], make=partial(gpt2, width=_n))
# Enough episodes to use a whole GPU.
for _n in (64, 256):
    SHAPES[f"C-episodes-{_n}"] = replace(SHAPES["C"], episodes=_n)

EOS = 1

KL_COEF = 0.1


def make_env(shape: Shape, folder: Path, on: str) -> TokenVectorEnv:
    """Return an environment of this shape; reference and reward model have random weights."""
    write_models(shape, folder)
    return load_env(shape, folder, on)


def write_models(shape: Shape, folder: Path) -> None:
    """Write reference/, reward_model/ and prompts.json (ids), with random weights."""
    vocabulary = {f"t{i}": i for i in range(shape.vocab)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="t1", pad_token="t0")
    model = shape.make(shape.vocab)
    model.generation_config.eos_token_id = EOS
    if shape.mean_length is not None:
        _end_at_random(model, shape.mean_length)
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    reward = RewardModel.from_backbone(str(folder / "reference"))
    reward.save_pretrained(folder / "reward_model")
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, shape.vocab, (256, shape.prompt)).tolist()
    write_json(folder / "prompts.json", prompts)


def load_env(shape: Shape, folder: Path, on: str) -> TokenVectorEnv:
    """Return the environment with the models and prompts that `write_models` wrote."""
    reference = CausalLM.load(str(folder / "reference"), device=on)
    reference.model.requires_grad_(False)
    reward = RewardModel.load(str(folder / "reward_model"), device=on).requires_grad_(False)
    prompts = tuple(tuple(row) for row in read_json(folder / "prompts.json"))
    return TokenVectorEnv(
        Objective(reference, reward.eval(), kl_coef=KL_COEF),
        PromptDataset(prompts, shape.prompt),
        num_envs=shape.episodes,
        max_new_tokens=shape.response,
        stop_at_eos=shape.mean_length is not None,
    )


@torch.no_grad()
def _end_at_random(model: PreTrainedModel, mean_length: int) -> None:
    """Give the EOS probability 1 / mean_length in every state, by a constant logit."""
    head = model.get_output_embeddings().weight
    last = model.transformer.ln_f
    # The first output of the last norm becomes a constant 1, which only the EOS's row reads.
    last.weight[0], last.bias[0] = 0.0, 1.0
    head[:, 0] = 0.0
    head[EOS] = 0.0
    others = (head[:, 1:] ** 2).sum(1).mean() / 2  # log E[exp(x)] of a normal x with this variance
    head[EOS, 0] = np.log(len(head) / (mean_length - 1)) + float(others)
