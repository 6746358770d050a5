"""The flagship: PPO on whole responses (`agents.sb3.PPO`). ``--algorithm ppo``."""

from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Adam
from transformers import PreTrainedModel

from agents.sb3 import PPO
from agents.sb3.kl_control import AdaptiveKL, FixedKL, KLController, LagrangianKL
from agents.sb3.loss import KLLoss, KLOld
from agents.sb3.ptx import PretrainingMix
from agents.sb3.response_ppo import MeanOver
from agents.sb3.rollout.advantages import Baseline
from agents.sb3.run.learner import MEMORY_OPTIONS, SB3Learner, response_learner
from agents.sb3.tf1_adam import TF1Adam
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import is_causal
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.loading import commit, same_tokens
from rlhf_gym.lm.precision import Precision
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.training.sft_data import as_sequences, load_examples, prepare

Critic = Literal["auto", "shared", "separate", "reward_model"]

POLICY_OPTIONS = ("value_lr_scale", "critic_lr_scale", *MEMORY_OPTIONS)
"""Options that are keywords of `CausalLMPolicy`."""

OTHER_OPTIONS = (
    "adam",
    "adam_eps",
    "critic",
    "kl_coef",
    "kl_control",
    "kl_target",
    "kl_horizon",
    "kl_rate",
    "ptx_coef",
    "ptx_data",
)
"""Options that are keywords neither of the policy nor of `response_learner` and its class."""


@dataclass(frozen=True)
class Config:
    """Options of the flagship PPO."""

    learning_rate: float = 1.5e-4
    """Learning rate at the start."""
    anneal: bool = True
    """Anneal the learning rate linearly to 0."""
    adam: Literal["torch", "tf1"] = "torch"
    """PyTorch's Adam, or TensorFlow 1's, whose ε is not corrected for bias."""
    adam_eps: float = 1e-5
    """ε of Adam."""
    critic: Critic = "auto"
    """What bears the value head: the policy's trunk (shared), one of its own that starts from the
    reference (separate), or one that starts from the environment's reward model (reward_model).
    auto is the last where it can serve, else separate; shared with lora_rank or another baseline.
    The head starts at 0."""
    critic_lr_scale: float = 4.0
    """The learning rate of a critic's own trunk is so many times the policy's."""
    value_lr_scale: float = 14.0
    """The value head's learning rate is so many times the policy's."""
    n_waves: int = 1
    """Waves an update; an update has n_waves × num_envs episodes."""
    n_epochs: int = 2
    """Passes over the episodes of an update."""
    n_minibatches: int = 8
    """Optimiser steps a pass."""
    gae_lambda: float = 0.8
    """λ of generalised advantage estimation."""
    critic_lambda: float | None = None
    """λ of the returns that the critic learns; gae_lambda if None. At 1 its own bias is out."""
    critic_warmup: int = 2
    """In the first so many updates (at most a fifth of the training) only the critic learns."""
    clip_range: float = 0.2
    """ε of the ratio's clip."""
    clip_range_vf: float | None = None
    """How far a value may move from the rollout's before its loss is clipped; None never clips."""
    kl_old_coef: float = 0.0
    """Weight of KL(π_old ‖ π_θ) in the loss."""
    kl_old: KLOld = "k3"
    """Estimate that divergence from the chosen tokens (k3), or sum it over the vocabulary (exact),
    for one more forward pass with each backward pass."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    normalize_advantage: bool = False
    """Whiten advantages. They vanish at the optimum, where whitening would blow up what is left."""
    normalize_over: Literal["minibatch", "rollout"] = "minibatch"
    """Over each minibatch, or once over the rollout."""
    whiten_rewards: bool = False
    """Give the rollout's rewards variance 1, their mean kept."""
    baseline: Baseline = "critic"
    """What advantages are taken against: the critic (GAE); the other responses to the prompt
    (leave_one_out, group_mean; see samples_per_prompt); none: the rewards to come alone."""
    samples_per_prompt: int | None = None
    """Responses to each prompt in a wave; None leaves the environment's rows_per_prompt."""
    scale_by_std: bool = True
    """Whether group_mean divides by the group's standard deviation."""
    mean_over: MeanOver = "token"
    """The loss is a mean over a minibatch's tokens, or over its responses of their means."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""
    target_kl: float | None = None
    """Stop an update early once KL(π_old ‖ π_θ) exceeds 1.5 times this."""
    kl_coef: float | None = None
    """The agent's (first) weight of the penalty against the reference; the environment's β if None.
    J is reported at the environment's β all the same."""
    kl_control: Literal["fixed", "adaptive", "lagrangian"] = "fixed"
    """Keep that weight, or steer the KL to kl_target with it."""
    kl_target: float = 6.0
    """Nats a sequence that a controller steers to."""
    kl_horizon: float = 10_000.0
    """adaptive: episodes in which the weight may change by a fifth."""
    kl_rate: float = 0.1
    """lagrangian: step of the weight's logarithm for a nat too much, an update."""
    kl_loss: KLLoss | None = None
    """Put the penalty into the loss (exact, k2, k3) instead of the reward."""
    ptx_coef: float = 0.0
    """Weight of the mean log-likelihood of the texts of ptx_data, mixed into every minibatch
    (PPO-ptx)."""
    ptx_data: str | None = None
    """Those texts: a file or a dataset, as in scripts/train_sft.py."""
    microbatch_tokens: int | None = None
    """Most tokens, padding included, in one backward pass; bounds memory, changes nothing."""
    precision: Precision = "fp32"
    """Multiply the policy's matrices in float32 or bfloat16; the reference's stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    lora_rank: int = 0
    """Train adapters of this rank and the value head, on the reference's own weights: one model in
    memory. 0 trains every weight."""
    lora_alpha: int | None = None
    """The adapters' product is scaled by lora_alpha / lora_rank; twice the rank if None."""
    sample_every: int = 10
    """Updates between two records of sample responses in training_samples.jsonl; 0 writes none."""


def make(
    config: Config, env: TokenVectorEnv, algorithm: type[PPO] = PPO, **more: Any
) -> SB3Learner:
    """Build the learner on `env`.

    Args:
        config: The options.
        env: The environment.
        algorithm: The flagship, or a class of it that learns in its own way from the same rollout.
        **more: That class's own keywords.
    """
    options = dict(vars(config))
    critic = critic_start(config, env)
    policy = {
        **{name: options.pop(name) for name in POLICY_OPTIONS},
        "critic": None if critic is None else critic.name_or_path,
        "critic_revision": None if critic is None else commit(critic),
        "optimizer_class": TF1Adam if config.adam == "tf1" else Adam,
        "optimizer_kwargs": {"eps": config.adam_eps},
    }
    for name in OTHER_OPTIONS:
        del options[name]
    options["ptx"] = pretraining_mix(config, env)
    options["kl_controller"] = kl_controller(config, env.objective.kl_coef)
    return response_learner(algorithm, env, policy_options=policy, **options, **more)


def critic_start(config: Config, env: TokenVectorEnv) -> PreTrainedModel | None:
    """The model whose trunk the critic starts from; None shares the policy's.

    Raises:
        InputError: The environment's reward is no model.
    """
    reference, reward = env.objective.reference, env.objective.reward
    kind = config.critic
    if kind == "auto" and (config.lora_rank or config.baseline != "critic"):
        kind = "shared"  # one model in memory, or no critic that anyone asks
    elif kind == "auto":
        serves = isinstance(reward, RewardModel) and _may_be_critic(reward, reference)
        kind = "reward_model" if serves else "separate"
    if kind == "shared":
        return None
    if kind == "separate":
        return reference.model
    if not isinstance(reward, RewardModel):
        raise InputError(
            "critic=reward_model needs an environment that pays by one reward model; take "
            "critic=separate"
        )
    return reward.model


def _may_be_critic(reward: RewardModel, reference: CausalLM) -> bool:
    named = bool(reward.model.name_or_path)
    return named and same_tokens(reward.tokenizer, reference.tokenizer) and is_causal(reward.model)


def pretraining_mix(config: Config, env: TokenVectorEnv) -> PretrainingMix | None:
    """The texts that the options mix into the update; None if they do not.

    Raises:
        InputError: One of the two options is given without the other, or the texts do not serve.
    """
    if not config.ptx_coef and config.ptx_data is None:
        return None
    if not config.ptx_coef or config.ptx_data is None:
        raise InputError("ptx_coef and ptx_data go together: give both, or neither")
    reference = env.objective.reference
    examples = load_examples(config.ptx_data, reference.tokenizer, reference.eos_ids, held_out=0.0)
    longest = env.prompts.max_tokens + env.max_new_tokens
    return PretrainingMix(
        as_sequences(prepare(reference, examples, longest).train), config.ptx_coef
    )


def kl_controller(config: Config, kl_coef: float) -> KLController:
    """The controller that the options ask for.

    Args:
        config: The options.
        kl_coef: The environment's β.
    """
    first = kl_coef if config.kl_coef is None else config.kl_coef
    if config.kl_control == "adaptive":
        return AdaptiveKL(first, config.kl_target, config.kl_horizon)
    if config.kl_control == "lagrangian":
        return LagrangianKL(first, config.kl_target, config.kl_rate)
    return FixedKL(first)
