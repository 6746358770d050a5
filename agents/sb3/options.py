"""The options of every learner from whole responses: each with its default, range and help.

The class, `agents.sb3.build`, the command line and a config file all read these dataclasses, so a
default has one home. An algorithm's `Config` is one of them or extends it.
"""

from dataclasses import dataclass, fields
from typing import Literal

from rlhf_gym.errors import InputError
from rlhf_gym.lm.precision import Precision
from rlhf_gym.utils.type_hints import check_hints

Adam = Literal["torch", "tf1"]
Baseline = Literal["critic", "leave_one_out", "group_mean", "none"]
CriticStart = Literal["auto", "shared", "separate", "reward_model"]
KLControl = Literal["fixed", "adaptive", "lagrangian"]
KLLoss = Literal["exact", "k2", "k3"]
KLOld = Literal["k3", "exact"]
MeanOver = Literal["token", "response"]
NormalizeOver = Literal["minibatch", "rollout"]

AT_LEAST_ONE = ("n_waves", "n_epochs", "n_minibatches")
SHARES = ("gae_lambda", "critic_lambda")


@dataclass(frozen=True)
class ResponseOptions:
    """Options of every learner from whole responses.

    Raises:
        InputError: A value has the wrong type, or is out of range.
    """

    learning_rate: float = 3e-4
    """Learning rate at the start."""
    anneal: bool = True
    """Anneal the learning rate linearly to 0."""
    adam_eps: float = 1e-5
    """ε of Adam."""
    samples_per_prompt: int | None = None
    """Responses to each prompt in a wave; None leaves the environment's rows_per_prompt."""
    n_waves: int = 1
    """Waves per update, at least 1; an update has n_waves × num_envs responses."""
    n_epochs: int = 1
    """Passes over the responses of an update, at least 1."""
    n_minibatches: int = 8
    """Optimiser steps per pass, at least 1. Each takes whole responses, about equal in tokens; the
    responses that are compared with each other stay together."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""
    microbatch_tokens: int | None = None
    """Most tokens, padding included, in one backward pass. It bounds memory and changes no
    gradient. None takes what fits a CPU's cache, 2¹⁴ on a GPU."""
    precision: Precision = "fp32"
    """Multiply the policy's matrices in float32 or bfloat16; the reference's stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    lora_rank: int = 0
    """Train adapters of this rank (and the value head) on the reference's own weights, so that one
    model is in memory. 0 trains every weight."""
    lora_alpha: int | None = None
    """The adapters' product is scaled by lora_alpha / lora_rank; twice the rank if None."""

    def __post_init__(self) -> None:
        check_hints(type(self), vars(self))
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class SampledOptions(ResponseOptions):
    """Options of learners from their own responses."""

    sample_every: int = 10
    """Updates between two records of sample responses in training_samples.jsonl; 0 writes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_every < 0:
            raise InputError(f"sample_every must be 0 or more updates, not {self.sample_every}")


@dataclass(frozen=True)
class PolicyGradientOptions(SampledOptions):
    """Options of PPO's loss that need no critic: REINFORCE, RLOO and GRPO have these."""

    adam: Adam = "torch"
    """PyTorch's Adam, or TensorFlow 1's, whose ε is not corrected for bias."""
    clip_range: float = 0.2
    """ε of the ratio's clip."""
    kl_old_coef: float = 0.0
    """Weight of KL(π_old ‖ π_θ) in the loss."""
    kl_old: KLOld = "k3"
    """Estimate that divergence from the chosen tokens (k3), or sum it over the vocabulary (exact).
    exact costs a copy of the trained weights, and one more forward pass per backward pass."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus; the entropy is never computed at 0."""
    normalize_advantage: bool = False
    """Whiten advantages. They vanish at the optimum, where whitening would amplify the noise."""
    normalize_over: NormalizeOver = "minibatch"
    """Whiten over each minibatch, or once over the rollout."""
    whiten_rewards: bool = False
    """Scale the rollout's rewards to variance 1, and keep their mean."""
    mean_over: MeanOver = "token"
    """Average the loss over a minibatch's tokens, or over its responses of their token means
    (GRPO), in which a token of a long response counts less."""
    target_kl: float | None = None
    """Stop an update early once KL(π_old ‖ π_θ) exceeds 1.5 times this."""
    kl_coef: float | None = None
    """The agent's (first) weight of the penalty against the reference; the environment's β if None.
    J is reported at the environment's β all the same."""
    kl_control: KLControl = "fixed"
    """Keep that weight, or steer the KL to kl_target with it."""
    kl_target: float = 6.0
    """Target of a controller, in nats per sequence."""
    kl_horizon: float = 10_000.0
    """adaptive: episodes in which the weight may change by a fifth."""
    kl_rate: float = 0.1
    """lagrangian: step of the weight's logarithm per nat above the target, at each update."""
    kl_loss: KLLoss | None = None
    """Put the penalty into the loss (exact over the vocabulary, or k2 or k3 of the sampled tokens)
    instead of the reward. Only in the reward is its gradient that of J: in the loss it ignores that
    an action also decides which states follow."""
    ptx_coef: float = 0.0
    """Weight of the mean log-likelihood of the texts of ptx_data, mixed into every minibatch
    (PPO-ptx)."""
    ptx_data: str | None = None
    """Those texts: a file or a dataset, as in scripts/train_sft.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip("clip_range", self.clip_range)
        if bool(self.ptx_coef) != (self.ptx_data is not None):
            raise InputError("ptx_coef and ptx_data go together: give both, or neither")


@dataclass(frozen=True)
class PPOOptions(PolicyGradientOptions):
    """Options of PPO on whole responses."""

    learning_rate: float = 1.5e-4
    n_epochs: int = 2
    critic: CriticStart = "auto"
    """Which trunk the value head is on: the policy's (shared), its own that starts from the
    reference (separate), or its own that starts from the environment's reward model (reward_model).
    auto takes reward_model if that model is causal and has the policy's tokenizer, else separate;
    with lora_rank or another baseline, shared. The head starts at 0."""
    critic_lr_scale: float = 4.0
    """Learning rate of a critic's own trunk, relative to the policy's."""
    value_lr_scale: float = 14.0
    """Learning rate of the value head, relative to the policy's."""
    gae_lambda: float = 0.8
    """λ of generalised advantage estimation, from 0 to 1; γ is 1."""
    critic_lambda: float | None = None
    """λ of the returns that the critic learns, from 0 to 1; gae_lambda if None. At 1 they are free
    of the critic's own bias (VC-PPO: Yuan et al. 2025)."""
    critic_warmup: int = 2
    """Updates at the start in which only the critic learns (VC-PPO); at most a fifth of the
    training."""
    clip_range_vf: float | None = None
    """How far a value may move from the rollout's before its loss is clipped; None never clips."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    baseline: Baseline = "critic"
    """What advantages are measured against: the critic (GAE); the other responses to the prompt
    (leave_one_out, group_mean; see samples_per_prompt); or nothing (none: the rewards to come).
    Only critic trains one."""
    scale_by_std: bool = True
    """Whether group_mean divides by the group's standard deviation (GRPO) or not (Dr. GRPO)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip("clip_range_vf", self.clip_range_vf)
        for name in SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} must be from 0 to 1, not {value}")


@dataclass(frozen=True)
class GroupOptions(SampledOptions):
    """Options of learners that compare several responses per prompt (`agents.sb3.groups`)."""

    samples_per_prompt: int | None = 8
    n_waves: int = 2


def check_clip(name: str, clip_range: float | None) -> None:
    """Refuse a clip range that is not above 0: its bounds would be in the wrong order.

    Raises:
        InputError: It is not.
    """
    if clip_range is not None and clip_range <= 0:
        raise InputError(f"{name} must be above 0, not {clip_range}")


def without_critic(options: PolicyGradientOptions, baseline: Baseline) -> PPOOptions:
    """PPO's options for an algorithm that has no critic.

    Args:
        options: The options that act in it.
        baseline: What its advantages are measured against.
    """
    known = {field.name for field in fields(PPOOptions)}
    acting = {name: value for name, value in vars(options).items() if name in known}
    return PPOOptions(**acting | {"baseline": baseline, "critic": "shared", "critic_warmup": 0})
