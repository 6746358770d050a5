"""PPO on whole responses: the flagship.

maximise  E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)] − kl_old_coef · KL(π_old ‖ π_θ) − vf_coef · (V − R)²,
each a mean per token. Two KLs, two names: `kl_coef` is the environment's β, against the frozen
reference, inside the reward; `kl_old_coef` weighs the distance from the last iterate, in the loss.
Notation: N rows of the environment, T the token budget, M chosen tokens.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from transformers import PreTrainedModel

from agents.sb3.kl_control import kl_controller
from agents.sb3.loss import Loss
from agents.sb3.options import PPOOptions, ResponseOptions
from agents.sb3.ptx import PretrainingMix, pretraining_mix
from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.sb3.rollout.advantages import AdvantageEstimator
from agents.sb3.rollout.buffer import SequenceRolloutBuffer, SequenceSamples
from agents.sb3.tf1_adam import TF1Adam
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import is_causal
from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.loading import commit, same_tokens
from rlhf_gym.rewards.reward_model import RewardModel

MAX_WARMUP = 0.2
"""Share of a training in which the policy may wait for its critic."""


class PPO(ResponseAlgorithm):
    """PPO that samples whole responses, lets the environment `play` them, and trains on sequences.

    Args:
        *args: As in `ResponseAlgorithm`; `options` are `PPOOptions`.
        **kwargs: As in `ResponseAlgorithm`.
    """

    Options: ClassVar[type[ResponseOptions]] = PPOOptions
    options: PPOOptions

    ptx: PretrainingMix | None = None
    """Texts mixed into every minibatch, as many of their tokens as it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.critic_is_trained = False  # then nothing need wait for it
        self._old: CausalLM | None = None  # π_old while an update asks for it
        self._waiting = False  # in this update, for the critic
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        options = self.options
        self.clip_range: Schedule = FloatSchedule(options.clip_range)
        # Stable-Baselines3's names for the same numbers, for callbacks that look them up.
        self.gae_lambda, self.vf_coef = options.gae_lambda, options.vf_coef
        self.ent_coef = options.ent_coef

    def _adopt(self, env: TokenVectorEnv) -> None:
        super()._adopt(env)
        if self.kl_controller is None:  # else it was loaded, with its weight
            self.kl_controller = kl_controller(self.options, env.objective.kl_coef)
        if self.ptx is None:
            self.ptx = pretraining_mix(self.options, env)

    def _policy_options(self, env: TokenVectorEnv) -> dict[str, Any]:
        options = self.options
        implied = super()._policy_options(env)
        if "critic" not in self.policy_kwargs:  # else it is loaded, or given
            critic = critic_start(options, env)
            implied["critic"] = None if critic is None else critic.name_or_path
            implied["critic_revision"] = None if critic is None else commit(critic)
        return {
            **implied,
            "entropy": options.ent_coef != 0.0,
            "critic_lr_scale": options.critic_lr_scale,
            "value_lr_scale": options.value_lr_scale,
            "optimizer_class": TF1Adam if options.adam == "tf1" else torch.optim.Adam,
        }

    def _estimate(self, buffer: SequenceRolloutBuffer, rows_per_prompt: int) -> None:
        """Advantages and returns of the rollout, by the options."""
        critic_lambda = (
            self.options.gae_lambda
            if self.options.critic_lambda is None
            else self.options.critic_lambda
        )
        AdvantageEstimator(
            self.options.baseline,
            self.options.gae_lambda,
            critic_lambda,
            self.options.scale_by_std,
            self.options.whiten_rewards,
            self.options.normalize_over if self.options.normalize_advantage else None,
        ).estimate(buffer, self.options.n_waves, rows_per_prompt)

    def _reward_kl_coef(self, env: TokenVectorEnv) -> float:
        return self._kl_coef(env) if self.options.kl_loss is None else 0.0

    @property
    def _has_critic(self) -> bool:
        return self.options.baseline == "critic"

    def _finish_rollout(self, waves: list[dict[str, Any]]) -> None:
        # While the policy waits its divergence does not follow from the weight.
        if self.kl_controller is not None and not self._waits(self._tokens_before):
            kl_sums = np.concatenate([wave["kl_sum"] for wave in waves])
            self.kl_controller.update(float(kl_sums.mean()), len(kl_sums))

    def _waits(self, tokens: int) -> bool:
        """Whether the policy stands still, `tokens` into a training, while its critic learns."""
        if self.critic_is_trained:
            return False
        early = self._n_updates < self.options.critic_warmup * self.options.n_epochs
        # A short training would else end before its policy has moved.
        soon = tokens <= MAX_WARMUP * self._total_timesteps
        return early and soon and self._has_critic

    def _prepare_update(self) -> None:
        self._waiting = self._waits(self.num_timesteps)
        exact = self.options.kl_old == "exact" and not self._waiting
        self._old = self.policy.snapshot() if exact else None

    def _finish_update(self) -> None:
        self._old = None
        if self._has_critic:
            mask = self.rollout_buffer.actions >= 0
            seen, came = self.rollout_buffer.values[mask], self.rollout_buffer.returns[mask]
            self.logger.record("train/explained_variance", explained_variance(seen, came))

    def _enough(self, statistics: dict[str, float]) -> bool:
        moved = statistics.get("kl_old", 0.0)
        return self.options.target_kl is not None and moved > 1.5 * self.options.target_kl

    def _gradient(self, minibatch: SequenceSamples) -> dict[str, float]:
        """Accumulate the gradient of one minibatch over micro-batches; mean statistics.

        Where the policy waits, that of the critic's loss alone.
        """
        loss = self._loss()
        if self._waiting:
            return self._accumulate(minibatch, loss.critic_terms)
        advantages = minibatch.advantages
        each = self.options.normalize_advantage and self.options.normalize_over == "minibatch"
        if each and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        means = self._accumulate(minibatch._replace(advantages=advantages), loss.terms)
        means["ratio_max_error"] = max(means["ratio_max"] - 1, 1 - means["ratio_min"])
        if self.ptx is not None:
            total, at_most = len(minibatch.actions), self._microbatch_tokens()
            means["ptx_loss"] = self.ptx.backward(self.policy.core, total, at_most)
        return means

    def _accumulate(
        self,
        minibatch: SequenceSamples,
        terms_of: Callable[[SequenceSamples], dict[str, torch.Tensor]],
    ) -> dict[str, float]:
        """Backward passes over the micro-batches of a minibatch; the mean of each term.

        And the extremes of the ratio, where it is one of them.
        """
        sequences, total = minibatch.observations, len(minibatch.actions)
        self.policy.optimizer.zero_grad()
        weights = minibatch.advantages.new_ones(total)
        if self.options.mean_over == "response":
            rows, lengths = len(sequences.lengths), sequences.lengths
            weights = (total / (rows * lengths)).repeat_interleave(lengths).to(weights.dtype)
        sums: list[dict[str, torch.Tensor]] = []  # on the device: the host waits for them once
        model, at_most = self.policy.core.model, self._microbatch_tokens()
        for part, places in passes(model, sequences, at_most):
            terms = terms_of(minibatch.rows(part, places))
            # Weighted by the minibatch's token count, so that micro-batches change nothing.
            ((terms.pop("objective") * weights[places]).sum() / -total).backward()
            found = {name: value.sum() / total for name, value in terms.items()}
            if "ratio" in terms:
                found["ratio_min"], found["ratio_max"] = terms["ratio"].aminmax()
            sums.append(found)
        each = torch.stack([torch.stack(list(found.values())) for found in sums]).double().cpu()
        over = {"ratio_min": torch.amin, "ratio_max": torch.amax}
        return {
            name: float(over.get(name, torch.sum)(column, 0))
            for name, column in zip(sums[0], each.unbind(1), strict=True)
        }

    def _loss(self) -> Loss:
        env = self.token_env
        return Loss(
            self.policy,
            clip_range=self.clip_range(self._current_progress_remaining),
            clip_range_vf=self.options.clip_range_vf,
            kl_old_coef=self.options.kl_old_coef,
            vf_coef=self.options.vf_coef if self._has_critic else 0.0,
            ent_coef=self.options.ent_coef,
            kl_coef=self._kl_coef(env),
            kl_loss=self.options.kl_loss,
            reference=env.objective.reference,
            old=self._old,
        )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_old"]


def critic_start(options: PPOOptions, env: TokenVectorEnv) -> PreTrainedModel | None:
    """The model whose trunk the critic starts from; None shares the policy's.

    Raises:
        InputError: The environment's reward is no model.
    """
    reference, reward = env.objective.reference, env.objective.reward
    kind = options.critic
    if kind == "auto" and (options.lora_rank or options.baseline != "critic"):
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
