"""The flagship: PPO on whole responses.

maximise  E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)] − kl_old_coef · KL(π_old ‖ π_θ) − vf_coef · (V − R)²,
each a mean per token. Two KLs, two names: `kl_coef` is the environment's β, against the frozen
reference, inside the reward; `kl_old_coef` weighs the distance from the last iterate, in the loss.
Notation: N rows of the environment, T the token budget, M chosen tokens.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.kl_control import KLController
from agents.sb3.loss import KLLoss, KLOld, Loss
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.ptx import PretrainingMix
from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.sb3.rollout.advantages import AdvantageEstimator, Baseline
from agents.sb3.rollout.buffer import SequenceRolloutBuffer, SequenceSamples
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.batching import passes
from rlhf_gym.lm.causal_lm import CausalLM

MAX_WARMUP = 0.2
"""Share of a training in which the policy may wait for its critic."""

MeanOver = Literal["token", "response"]


class PPO(ResponseAlgorithm):
    """PPO that samples whole responses, lets the environment `play` them, and trains on sequences.

    Args:
        policy: `CausalLMPolicy`.
        env: A `TokenSB3VecEnv`; each of its N rows plays one episode a wave.
        learning_rate: A number or a schedule of the remaining progress.
        n_waves: Waves an update; an update has n_waves · N episodes.
        n_epochs: Passes over the episodes of an update.
        n_minibatches: Optimiser steps a pass; each takes whole sequences, about equal in tokens.
        gae_lambda: λ of GAE; γ is 1.
        critic_lambda: λ of the returns that the critic learns; None takes `gae_lambda`. At 1 they
            are free of its own bias (VC-PPO: Yuan et al. 2025).
        critic_warmup: In the first so many updates, but at most a fifth of the training, only the
            critic learns (VC-PPO): its trunk and value head, or the head alone on a shared trunk.
        clip_range: ε of the ratio's clip.
        clip_range_vf: How far a value may move from the rollout's before its loss is that of the
            clipped one, if larger; None never clips.
        kl_old_coef: Weight of KL(π_old ‖ π_θ) in the loss.
        kl_old: "k3" estimates that divergence from the chosen tokens; "exact" sums it over the
            vocabulary, for a copy of what learns and a forward pass of it with each backward pass.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of the entropy; never computed at 0.
        normalize_advantage: Whether advantages are whitened.
        normalize_over: Over each "minibatch", or once over the "rollout".
        whiten_rewards: Whether the rollout's rewards are given variance 1, their mean kept.
        baseline: What advantages are taken against: the "critic" (GAE); in an environment with
            `rows_per_prompt` above 1, the group of a prompt ("leave_one_out", "group_mean"; the
            advantage is the whole response's); or "none": the rewards to come. Only the first
            trains a critic.
        scale_by_std: Whether "group_mean" divides by the group's standard deviation (GRPO), or not
            (Dr. GRPO).
        mean_over: The loss is a mean over all tokens of a minibatch, or over its responses of their
            means (GRPO), in which a token of a long response counts less.
        max_grad_norm: Clip of the gradient's norm.
        target_kl: SB3's early stopping: no further step once k3 exceeds 1.5 times this.
        kl_controller: Chooses the weight of the penalty against the reference, in place of the
            environment's β; None leaves it. J is reported at the environment's β all the same.
        kl_loss: Put that penalty into the loss instead of the reward, at the visited states:
            "exact" over the vocabulary, "k2" or "k3" of the sampled tokens. None keeps it in the
            reward. Only there is its gradient that of J; in the loss it forgets that an action also
            chooses the states to come.
        ptx: Texts mixed into every minibatch, as many of their tokens as it has; None mixes none.
        microbatch_tokens: Most tokens, padding included, in one forward and backward pass; the
            gradient does not depend on it. None takes what fits a CPU's cache, 2¹⁴ on a GPU.
        gamma: Must be 1: the objective is undiscounted.
        stats_window_size: Taken for Stable-Baselines3's sake; a figure is of one rollout.
        tensorboard_log: Folder for TensorBoard.
        policy_kwargs: Keywords of the policy.
        verbose: 0 or 1.
        seed: Seed of everything.
        device: "auto", "cpu", "cuda".
    """

    def __init__(
        self,
        policy: str | type[CausalLMPolicy],
        env: VecEnv,
        learning_rate: float | Schedule = 1.5e-4,
        *,
        n_waves: int = 1,
        n_epochs: int = 2,
        n_minibatches: int = 8,
        gae_lambda: float = 0.8,
        critic_lambda: float | None = None,
        critic_warmup: int = 0,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | None = None,
        kl_old_coef: float = 0.0,
        kl_old: KLOld = "k3",
        vf_coef: float = 0.1,
        ent_coef: float = 0.0,
        normalize_advantage: bool = False,
        normalize_over: Literal["minibatch", "rollout"] = "minibatch",
        whiten_rewards: bool = False,
        baseline: Baseline = "critic",
        scale_by_std: bool = True,
        mean_over: MeanOver = "token",
        max_grad_norm: float = 1.0,
        target_kl: float | None = None,
        kl_controller: KLController | None = None,
        kl_loss: KLLoss | None = None,
        ptx: PretrainingMix | None = None,
        microbatch_tokens: int | None = None,
        gamma: float = 1.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if kl_loss not in (None, *get_args(KLLoss)):
            raise InputError(f"kl_loss must be one of {get_args(KLLoss)} or None, not {kl_loss!r}")
        if normalize_over not in ("minibatch", "rollout"):
            raise InputError(f"normalize_over is minibatch or rollout, not {normalize_over!r}")
        if baseline not in get_args(Baseline):
            raise InputError(f"baseline must be one of {get_args(Baseline)}, not {baseline!r}")
        if mean_over not in get_args(MeanOver):
            raise InputError(f"mean_over must be one of {get_args(MeanOver)}, not {mean_over!r}")
        if kl_old not in get_args(KLOld):
            raise InputError(f"kl_old must be one of {get_args(KLOld)}, not {kl_old!r}")
        self.kl_controller, self.kl_loss, self.kl_old = kl_controller, kl_loss, kl_old
        self.ptx = ptx
        self._old: CausalLM | None = None  # π_old while an update asks for it
        self._waiting = False  # in this update, for the critic
        self.clip_range_vf, self.whiten_rewards = clip_range_vf, whiten_rewards
        self.normalize_over, self.baseline = normalize_over, baseline
        self.scale_by_std, self.mean_over = scale_by_std, mean_over
        self.critic_lambda, self.critic_warmup = critic_lambda, critic_warmup
        self.kl_old_coef, self.normalize_advantage = kl_old_coef, normalize_advantage
        self.target_kl = target_kl
        self.clip_range: Schedule = FloatSchedule(clip_range)
        super().__init__(
            policy,
            env,
            learning_rate,
            n_waves=n_waves,
            n_epochs=n_epochs,
            n_minibatches=n_minibatches,
            max_grad_norm=max_grad_norm,
            microbatch_tokens=microbatch_tokens,
            gamma=gamma,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs={"entropy": ent_coef != 0.0, **(policy_kwargs or {})},
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.gae_lambda, self.vf_coef, self.ent_coef = gae_lambda, vf_coef, ent_coef
        if _init_setup_model:
            self._setup_model()

    def _estimate(self, buffer: SequenceRolloutBuffer, rows_per_prompt: int) -> None:
        """Advantages and returns of the rollout, by the options."""
        critic_lambda = self.gae_lambda if self.critic_lambda is None else self.critic_lambda
        AdvantageEstimator(
            self.baseline,
            self.gae_lambda,
            critic_lambda,
            self.scale_by_std,
            self.whiten_rewards,
            self.normalize_advantage and self.normalize_over == "rollout",
        ).estimate(buffer, self.n_waves, rows_per_prompt)

    def _reward_kl_coef(self, env: TokenVectorEnv) -> float:
        return self._kl_coef(env) if self.kl_loss is None else 0.0

    @property
    def _has_critic(self) -> bool:
        return self.baseline == "critic"

    def _finish_rollout(self, waves: list[dict[str, Any]]) -> None:
        # While the policy waits its divergence does not follow from the weight.
        if self.kl_controller is not None and not self._waits(self._tokens_before):
            kl_sums = np.concatenate([wave["kl_sum"] for wave in waves])
            self.kl_controller.update(float(kl_sums.mean()), len(kl_sums))

    def _waits(self, tokens: int) -> bool:
        """Whether the policy stands still, `tokens` into a training, while its critic learns."""
        early = self._n_updates < self.critic_warmup * self.n_epochs
        # A short training would else end before its policy has moved.
        soon = tokens <= MAX_WARMUP * self._total_timesteps
        return early and soon and self._has_critic

    def _prepare_update(self) -> None:
        self._waiting = self._waits(self.num_timesteps)
        exact = self.kl_old == "exact" and not self._waiting
        self._old = self.policy.snapshot() if exact else None

    def _finish_update(self) -> None:
        self._old = None
        if self._has_critic:
            mask = self.rollout_buffer.actions >= 0
            seen, came = self.rollout_buffer.values[mask], self.rollout_buffer.returns[mask]
            self.logger.record("train/explained_variance", explained_variance(seen, came))

    def _enough(self, statistics: dict[str, float]) -> bool:
        moved = statistics.get("kl_old", 0.0)
        return self.target_kl is not None and moved > 1.5 * self.target_kl

    def _gradient(self, minibatch: SequenceSamples) -> dict[str, float]:
        """Accumulate the gradient of one minibatch over micro-batches; mean statistics.

        Where the policy waits, that of the critic's loss alone.
        """
        loss = self._loss()
        if self._waiting:
            return self._accumulate(minibatch, loss.critic_terms)
        advantages = minibatch.advantages
        each = self.normalize_advantage and self.normalize_over == "minibatch"
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
        if self.mean_over == "response":
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
        env: TokenVectorEnv = self.get_env().get_attr("unwrapped")[0]  # type: ignore[union-attr]
        return Loss(
            self.policy,
            clip_range=self.clip_range(self._current_progress_remaining),
            clip_range_vf=self.clip_range_vf,
            kl_old_coef=self.kl_old_coef,
            vf_coef=self.vf_coef if self._has_critic else 0.0,
            ent_coef=self.ent_coef,
            kl_coef=self._kl_coef(env),
            kl_loss=self.kl_loss,
            reference=env.objective.reference,
            old=self._old,
        )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_old"]
