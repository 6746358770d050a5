"""The flagship: PPO on whole responses.

maximise  E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)] − kl_old_coef · KL(π_old ‖ π_θ) − vf_coef · (V − R)²,
each a mean per token. Two KLs, two names: `kl_coef` is the environment's β, against the frozen
reference, inside the reward; `kl_old_coef` weighs the distance from the last iterate, in the loss.
Notation: N rows of the environment, T the token budget, M chosen tokens.
"""

import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.advantage_estimation import AdvantageEstimator, Baseline
from agents.sb3.buffer import SequenceRolloutBuffer, SequenceSamples
from agents.sb3.guards import check_finite
from agents.sb3.loss import KLLoss, KLOld, Loss
from agents.sb3.policy import CausalLMPolicy
from agents.sb3.ptx import PretrainingMix
from agents.sb3.watching import known_scale, rollout_figures
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.kl import REWARD_ESTIMATORS, KLController
from rlhf_gym.lm import CausalLM, passes, tokens_per_pass
from rlhf_gym.sampling import Sampled
from rlhf_gym.tokens import PAD, continuations, unflatten

MAX_WARMUP = 0.2
"""Share of a training in which the policy may wait for its critic."""

MeanOver = Literal["token", "response"]

EXTREMES: dict[str, Callable[[list[float]], float]] = {"ratio_min": min, "ratio_max": max}
"""Statistics of a minibatch whose mean over an update's minibatches says little."""


class PPO(OnPolicyAlgorithm):
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
        stats_window_size: Episodes that running means cover.
        tensorboard_log: Folder for TensorBoard.
        policy_kwargs: Keywords of the policy.
        verbose: 0 or 1.
        seed: Seed of everything.
        device: "auto", "cpu", "cuda".
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CausalLMPolicy": CausalLMPolicy}
    policy: CausalLMPolicy
    rollout_buffer: SequenceRolloutBuffer

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
        for name, count in (("n_waves", n_waves), ("n_epochs", n_epochs)):
            if count < 1:
                raise InputError(f"{name} must be at least 1, not {count}")
        if n_minibatches < 1:
            raise InputError(f"n_minibatches must be at least 1, not {n_minibatches}")
        if gamma != 1.0:
            raise InputError(f"the objective is undiscounted: gamma must be 1, not {gamma}")
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
        self.clip_range_vf, self.whiten_rewards = clip_range_vf, whiten_rewards
        self.normalize_over, self.baseline = normalize_over, baseline
        self.scale_by_std, self.mean_over = scale_by_std, mean_over
        self.n_waves, self.n_epochs, self.n_minibatches = n_waves, n_epochs, n_minibatches
        self.critic_lambda, self.critic_warmup = critic_lambda, critic_warmup
        self.kl_old_coef, self.normalize_advantage = kl_old_coef, normalize_advantage
        self.target_kl, self.microbatch_tokens = target_kl, microbatch_tokens
        self.clip_range: Schedule = FloatSchedule(clip_range)
        self.stage_seconds: dict[str, float] = {}  # of the last iteration
        budget = env.get_attr("max_new_tokens")[0] if isinstance(env, VecEnv) else 1
        options = {"entropy": ent_coef != 0.0, **(policy_kwargs or {})}
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps=n_waves * budget,
            gamma=1.0,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=SequenceRolloutBuffer,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=options,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Play `n_waves` whole episodes in every row and compute advantages."""
        assert isinstance(rollout_buffer, SequenceRolloutBuffer)
        token_env: TokenVectorEnv = env.get_attr("unwrapped")[0]
        known_scale(token_env)  # its one computation belongs to no iteration
        self._begun = self._now()
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()  # writes checkpoints
        self._prepare_rollout()
        waves: list[dict[str, Any]] = []
        for _ in range(self.n_waves):
            infos = self._play_wave(token_env, rollout_buffer)
            waves.append(infos)
            callback.update_locals({"infos": infos})
            if not callback.on_step():
                return False
        self._estimate(rollout_buffer, token_env.rows_per_prompt)
        self._log_waves(waves, token_env)
        if self.kl_controller is not None and not self._waits():
            kl_sums = np.concatenate([wave["kl_sum"] for wave in waves])
            self.kl_controller.update(float(kl_sums.mean()), len(kl_sums))
        callback.on_rollout_end()
        return True

    def _now(self) -> float:
        """Seconds, once the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _prepare_rollout(self) -> None:
        """What a class of this one has to do before it samples."""

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

    def _play_wave(self, env: TokenVectorEnv, buffer: SequenceRolloutBuffer) -> dict[str, Any]:
        assert self._last_obs is not None
        prompts = np.asarray(self._last_obs)[:, : env.prompts.max_tokens]
        begun = self._now()
        on_device = torch.from_numpy(prompts).to(self.device)
        found = self._sample(on_device, env)
        responses = found.responses
        sampled = self._now()
        sequences = continuations(on_device, responses)
        own_critic = self.baseline == "critic" and self.policy.critic is not None
        if self._scores_anew():
            values, log_probs = self.policy.score(sequences)
        else:
            log_probs, values = (x[responses != PAD] for x in (found.log_probs, found.values))
            if own_critic:  # which does not decode
                values = self.policy.values(sequences)
        value_grid, log_prob_grid = (
            unflatten(flat, sequences.lengths, env.max_new_tokens).cpu().numpy()
            for flat in (values, log_probs)
        )
        check_finite("log π", log_probs, sequences, log_probs=log_probs, values=values)
        check_finite("the value", values, sequences, log_probs=log_probs, values=values)
        scored = self._now()
        actions = responses.cpu().numpy()
        rewards, infos, self._last_obs = env.play(actions, log_prob_grid)
        flat = torch.from_numpy(rewards[actions >= 0]).to(log_probs.device)
        check_finite("the reward", flat, sequences, rewards=flat, log_probs=log_probs)
        # What the environment took off at its β, the agent takes off at its own.
        difference = env.objective.kl_coef - self._reward_kl_coef(env)
        if difference:
            paid = REWARD_ESTIMATORS[env.objective.kl_estimator](
                torch.from_numpy(log_prob_grid), torch.from_numpy(infos["ref_log_prob"])
            )
            rewards = rewards + difference * np.where(actions >= 0, paid.numpy(), 0.0)
        ref_log_probs = infos["ref_log_prob"]
        buffer.add_responses(prompts, actions, rewards, value_grid, log_prob_grid, ref_log_probs)
        settled = self._now()
        lengths = sequences.lengths.cpu().numpy()
        self.num_timesteps += int(lengths.sum())
        infos["seconds"] = {
            "sample": sampled - begun,
            "play": settled - scored,
        }
        if own_critic or self._scores_anew():
            infos["seconds"]["score"] = scored - sampled
        infos["length"] = lengths
        infos["log_prob_mean"] = float(log_probs.double().mean())
        return infos

    def _sample(self, prompts: torch.Tensor, env: TokenVectorEnv) -> Sampled:
        """Whole responses to prompts (N, P), their log-probs and values."""
        return self.policy.sample_with_log_probs(prompts, env.max_new_tokens, env.stop_at_eos)

    def _scores_anew(self) -> bool:
        """Whether log-probs of a rollout take a pass of the policy over whole sequences.

        In float32 decoding finds the same ones. In bfloat16 it rounds otherwise than the update,
        and the first ratio would not be 1; nor where rounding moves the edge of a reference's
        top-k or top-p set.
        """
        return self.policy.precision != "fp32" or self.policy.core.mask.follows_reference

    def _kl_coef(self, env: TokenVectorEnv) -> float:
        """The agent's weight of the penalty against the reference."""
        controller = self.kl_controller
        return env.objective.kl_coef if controller is None else controller.kl_coef

    def _reward_kl_coef(self, env: TokenVectorEnv) -> float:
        return self._kl_coef(env) if self.kl_loss is None else 0.0

    def _log_waves(self, waves: list[dict[str, Any]], env: TokenVectorEnv) -> None:
        figures = rollout_figures(waves, env.objective.kl_coef, known_scale(env))
        for name, value in figures.items():
            self.logger.record(f"rollout/{name}", value)
        self.logger.record("rollout/kl_coef", self._kl_coef(env))
        for stage in waves[0]["seconds"]:
            self._log_stage(stage, sum(wave["seconds"][stage] for wave in waves))

    def _log_stage(self, stage: str, seconds: float) -> None:
        self.stage_seconds[stage] = seconds
        self.logger.record(f"time/{stage}_seconds", seconds)
        rate = self.rollout_buffer.n_tokens / seconds
        self.logger.record(f"time/{stage}_tokens_per_second", rate)

    def _update_learning_rate(
        self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer
    ) -> None:
        """One schedule, times each parameter group's scale."""
        super()._update_learning_rate(optimizers)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for group in optimizer.param_groups:
                group["lr"] *= group["lr_scale"]

    def _waits(self) -> bool:
        """Whether the policy stands still while its critic learns."""
        early = self._n_updates < self.critic_warmup * self.n_epochs
        # A short training would else end before its policy has moved.
        soon = self._current_progress_remaining > 1 - MAX_WARMUP
        return early and soon and self.baseline == "critic"

    def train(self) -> None:
        """The update: `n_epochs` passes of `n_minibatches` optimiser steps."""
        begun = self._now()
        self.policy.set_training_mode(True)
        self.policy.optimizer.zero_grad()
        waits = self._waits()
        gradient = self._critic_gradient if waits else self._gradient
        self._old = self.policy.snapshot() if self.kl_old == "exact" and not waits else None
        self._update_learning_rate(self.policy.optimizer)
        tokens = self.rollout_buffer.n_tokens
        batch_size = max(1, round(tokens / self.n_minibatches))
        logged: list[dict[str, float]] = []
        for _ in range(self.n_epochs):
            for minibatch in self.rollout_buffer.get(batch_size, self._together()):
                statistics = gradient(minibatch)
                logged.append(statistics)
                moved = statistics.get("kl_old", 0.0)
                if self.target_kl is not None and moved > 1.5 * self.target_kl:
                    break
                self._step(statistics, minibatch)
            else:
                self._n_updates += 1
                continue
            break
        for name in logged[0]:
            over = EXTREMES.get(name, np.mean)
            self.logger.record(f"train/{name}", over([row[name] for row in logged]))
        if not waits:
            self.logger.record("train/ratio_first_max_error", logged[0]["ratio_max_error"])
        if self.baseline == "critic":
            mask = self.rollout_buffer.actions >= 0
            seen, came = self.rollout_buffer.values[mask], self.rollout_buffer.returns[mask]
            self.logger.record("train/explained_variance", explained_variance(seen, came))
        self._old = None
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        ended = self._now()
        self._log_stage("update", ended - begun)
        # Of all that the iteration took: callbacks and logs are in no stage.
        self.logger.record("time/tokens_per_second", tokens / (ended - self._begun))

    def _step(self, statistics: dict[str, float], minibatch: SequenceSamples) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        known = {
            "old_log_probs": minibatch.old_log_prob,
            "old_values": minibatch.old_values,
            "advantages": minibatch.advantages,
            "returns": minibatch.returns,
        }
        sequences = minibatch.observations
        losses = [
            statistics[k] for k in ("policy_loss", "value_loss", "ptx_loss") if k in statistics
        ]
        loss = torch.tensor(sum(losses))
        check_finite("the loss", loss, sequences, **known)
        check_finite("the gradient", norm, sequences, **known)
        statistics["gradient_norm"] = float(norm)
        self.policy.optimizer.step()

    def _gradient(self, minibatch: SequenceSamples) -> dict[str, float]:
        """Accumulate the gradient of one minibatch over micro-batches; mean statistics."""
        advantages = minibatch.advantages
        each = self.normalize_advantage and self.normalize_over == "minibatch"
        if each and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        extremes = {"ratio_min": float("inf"), "ratio_max": -float("inf")}

        def watched(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            low, high = torch.stack(terms["ratio"].aminmax()).tolist()
            extremes["ratio_min"] = min(extremes["ratio_min"], low)
            extremes["ratio_max"] = max(extremes["ratio_max"], high)
            return terms

        loss = self._loss()
        minibatch = minibatch._replace(advantages=advantages)
        means = self._accumulate(minibatch, lambda rows: watched(loss.terms(rows)))
        means |= extremes
        means["ratio_max_error"] = max(means["ratio_max"] - 1, 1 - means["ratio_min"])
        if self.ptx is not None:
            total, at_most = len(minibatch.actions), self._microbatch_tokens()
            means["ptx_loss"] = self.ptx.backward(self.policy.core, total, at_most)
        return means

    def _critic_gradient(self, minibatch: SequenceSamples) -> dict[str, float]:
        """The same of the critic's loss alone."""
        return self._accumulate(minibatch, self._loss().critic_terms)

    def _accumulate(
        self,
        minibatch: SequenceSamples,
        terms_of: Callable[[SequenceSamples], dict[str, torch.Tensor]],
    ) -> dict[str, float]:
        """Backward passes over the micro-batches of a minibatch; the mean of each term."""
        sequences, total = minibatch.observations, len(minibatch.actions)
        self.policy.optimizer.zero_grad()
        weights = minibatch.advantages.new_ones(total)
        if self.mean_over == "response":
            rows, lengths = len(sequences.lengths), sequences.lengths
            weights = (total / (rows * lengths)).repeat_interleave(lengths).to(weights.dtype)
        means: dict[str, float] = {"gradient_norm": 0.0}
        for part, places in passes(sequences, self._microbatch_tokens()):
            terms = terms_of(minibatch.rows(part, places))
            # Weighted by the minibatch's token count, so that micro-batches change nothing.
            ((terms.pop("objective") * weights[places]).sum() / -total).backward()
            for name, value in terms.items():
                means[name] = means.get(name, 0.0) + float(value.sum()) / total
        return means

    def _together(self) -> int:
        """Responses in turn that must stay in one minibatch."""
        return 1

    def _microbatch_tokens(self) -> int:
        return self.microbatch_tokens or min(tokens_per_pass(self.device), 1 << 14)

    def _loss(self) -> Loss:
        env: TokenVectorEnv = self.get_env().get_attr("unwrapped")[0]  # type: ignore[union-attr]
        return Loss(
            self.policy,
            clip_range=self.clip_range(self._current_progress_remaining),
            clip_range_vf=self.clip_range_vf,
            kl_old_coef=self.kl_old_coef,
            vf_coef=self.vf_coef if self.baseline == "critic" else 0.0,
            ent_coef=self.ent_coef,
            kl_coef=self._kl_coef(env),
            kl_loss=self.kl_loss,
            reference=env.objective.reference,
            old=self._old,
        )

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What else the next update depends on, for a checkpoint."""
        return {}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `extra_state`."""

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "rollout_buffer", "_old"]
