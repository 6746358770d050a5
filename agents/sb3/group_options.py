"""Options that all learners from groups of responses share (`agents.sb3.groups`)."""

from dataclasses import dataclass, fields
from typing import Any

from torch.optim import Adam

from agents.sb3.groups import GroupLearner
from agents.sb3.run.learner import MEMORY_OPTIONS, SB3Learner, response_learner
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.precision import Precision


@dataclass(frozen=True)
class GroupConfig:
    """Options of a learner from groups of responses."""

    learning_rate: float = 3e-4
    """Learning rate at the start."""
    anneal: bool = True
    """Anneal the learning rate linearly to 0."""
    adam_eps: float = 1e-5
    """ε of Adam."""
    samples_per_prompt: int | None = 8
    """Responses to each prompt in a wave; None leaves the environment's rows_per_prompt."""
    n_waves: int = 2
    """Waves an update; an update has n_waves × num_envs responses."""
    n_epochs: int = 1
    """Passes over the responses of an update."""
    n_minibatches: int = 8
    """Optimiser steps a pass; a prompt's responses stay together."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""
    microbatch_tokens: int | None = None
    """Most tokens, padding included, in one backward pass; bounds memory, changes nothing."""
    precision: Precision = "fp32"
    """Multiply the policy's matrices in float32 or bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora_rank: int = 0
    """Train adapters of this rank on the reference's own weights; 0 trains every weight."""
    lora_alpha: int | None = None
    """The adapters' product is scaled by lora_alpha / lora_rank; twice the rank if None."""
    sample_every: int = 10
    """Updates between two records of sample responses in training_samples.jsonl; 0 writes none."""


def make_group_learner(
    algorithm: type[GroupLearner], config: GroupConfig, env: TokenVectorEnv, **own: Any
) -> SB3Learner:
    """Build a learner.

    Args:
        algorithm: The class.
        config: The options, of which those of `GroupConfig` are read.
        env: The environment.
        **own: Keywords of the class; or of `GroupConfig`, in place of the options'.
    """
    names = [field.name for field in fields(GroupConfig)]
    options = {name: own.pop(name, getattr(config, name)) for name in names}
    policy = {
        **{name: options.pop(name) for name in MEMORY_OPTIONS},
        "optimizer_class": Adam,
        "optimizer_kwargs": {"eps": options.pop("adam_eps")},
    }
    return response_learner(algorithm, env, policy_options=policy, **options, **own)
