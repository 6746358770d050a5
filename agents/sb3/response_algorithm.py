"""What every learner from whole responses does: the rollout, and the passes of an update over it.

Notation: N rows of the environment, T the token budget, M chosen tokens.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.finite import check_finite
from agents.sb3.kl_control import KLController
from agents.sb3.layers import show
from agents.sb3.options_algorithm import OptionsAlgorithm
from agents.sb3.rollout.buffer import SequenceRolloutBuffer, SequenceSamples
from agents.sb3.rollout.collection import Wave, WavePlayer, now
from agents.sb3.rollout.metrics import known_scale, rollout_metrics
from agents.sb3.rollout.steps import batch_steps
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.lm.batching import tokens_per_pass
from rlhf_gym.lm.decoding.sampling import Sampled

EXTREMES: dict[str, Callable[[list[float]], float]] = {"ratio_min": min, "ratio_max": max}
"""Statistics of a minibatch whose mean over an update's minibatches says little."""


class ResponseAlgorithm(OptionsAlgorithm):
    """Samples whole responses, lets the environment `play` them, and learns from sequences.

    A subclass names its `Options`, and says what each token of a rollout is worth (`_estimate`) and
    what gradient a minibatch has (`_gradient`). Metrics, checkpoints and samples are the same for
    all.

    Args:
        *args: As in `OptionsAlgorithm`.
        **kwargs: As in `OptionsAlgorithm`.
    """

    kl_controller: KLController | None = None
    """Chooses the weight of the penalty against the reference; None leaves the environment's β."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stage_seconds: dict[str, float] = {}  # of the last iteration
        self._tokens_before = 0  # this rollout
        super().__init__(*args, **kwargs)

    @abstractmethod
    def _estimate(self, buffer: SequenceRolloutBuffer, rows_per_prompt: int) -> None:
        """Fill in the buffer's advantages or returns."""

    @abstractmethod
    def _gradient(self, minibatch: SequenceSamples) -> dict[str, float]:
        """Leave the gradient of one minibatch at the parameters; return statistics of it.

        The log shows their means over an update. A NaN in one whose name ends in "_loss" stops the
        run; the step adds "gradient_norm".
        """

    def _prepare_rollout(self) -> None:
        """Called before a rollout samples."""

    def _finish_rollout(self, waves: list[dict[str, Any]]) -> None:
        """Called after a rollout has been estimated and logged, with the infos of each wave."""

    def _prepare_update(self) -> None:
        """Called before the first minibatch of an update."""

    def _finish_update(self) -> None:
        """Called after the last step of an update."""

    def _enough(self, statistics: dict[str, float]) -> bool:
        """Whether an update ends before the step on this minibatch."""
        return False

    @property
    def _has_critic(self) -> bool:
        """Whether anyone asks for values."""
        return False

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Play `n_waves` whole episodes in every row and estimate what their tokens are worth."""
        assert isinstance(rollout_buffer, SequenceRolloutBuffer)
        token_env = self.token_env
        known_scale(token_env)  # its one computation belongs to no iteration
        self._begun, self._tokens_before = now(self.device), self.num_timesteps
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()  # writes checkpoints
        self._prepare_rollout()
        waves: list[dict[str, Any]] = []
        for _ in range(self.options.n_waves):
            wave = self._play_wave(token_env, rollout_buffer)
            waves.append(wave.infos)
            if not self._show(wave, env, callback):
                return False
        self._estimate(rollout_buffer, token_env.rows_per_prompt)
        self._log_waves(waves, token_env)
        self._finish_rollout(waves)
        callback.on_rollout_end()
        return True

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Schedules go by what was left before the rollout: from 1, and above 0 at the last."""
        super()._update_current_progress_remaining(self._tokens_before, total_timesteps)

    def _show(self, wave: Wave, env: VecEnv, callback: BaseCallback) -> bool:
        """Take wrappers and callbacks through a wave, step by step; whether to go on.

        Stable-Baselines3's contract: after each step of the batch the local variables, the number
        of tokens and the buffer of episodes are those of a rollout with `step`.
        """
        steps = batch_steps(wave, self.num_timesteps, self.start_time / 1e9)
        for n_steps, step in enumerate(steps):
            new_obs, rewards, dones, infos = show(env, step)
            self.num_timesteps += step.n_tokens
            callback.update_locals(
                {
                    "self": self,
                    "env": env,
                    "rollout_buffer": self.rollout_buffer,
                    "n_steps": n_steps,
                    "wave": wave.infos,
                    "actions": step.actions,
                    "clipped_actions": step.actions,
                    "new_obs": new_obs,
                    "rewards": rewards,
                    "dones": dones,
                    "infos": infos,
                }
            )
            if not callback.on_step():
                self._last_obs = None  # wrappers have seen half an episode: start with new ones
                return False
            self._update_info_buffer(infos, dones)
        return True

    def _play_wave(self, env: TokenVectorEnv, buffer: SequenceRolloutBuffer) -> Wave:
        """Add one response of every row to the buffer."""
        assert self._last_obs is not None
        if not env.at_prompts(np.asarray(self._last_obs)):  # somebody else has stepped it
            assert self.env is not None
            self._last_obs = self.env.reset()  # type: ignore[assignment]  # through the wrappers
        wave = WavePlayer(
            self.policy,
            env,
            lambda prompts: self._sample(prompts, env),
            with_values=self._has_critic,
            scoring_pass=self._needs_scoring_pass(),
            kl_coef=self._reward_kl_coef(env),
        ).play(np.asarray(self._last_obs), buffer)
        self._last_obs = wave.observations
        return wave

    def _sample(self, prompts: torch.Tensor, env: TokenVectorEnv) -> Sampled:
        """Whole responses to prompts (N, P), their log-probs and values."""
        return self.policy.sample_with_log_probs(
            prompts,
            env.max_new_tokens,
            env.stop_at_eos,
            with_values=self._has_critic and not self._needs_scoring_pass(),
        )

    def _needs_scoring_pass(self) -> bool:
        """Whether log-probs of a rollout take a pass of the policy over whole sequences."""
        return not self.policy.decoding_scores

    def _kl_coef(self, env: TokenVectorEnv) -> float:
        """The agent's weight of the penalty against the reference."""
        controller = self.kl_controller
        return env.objective.kl_coef if controller is None else controller.kl_coef

    def _reward_kl_coef(self, env: TokenVectorEnv) -> float:
        """The weight that the penalty has in the rewards which the agent learns from."""
        return self._kl_coef(env)

    def _log_waves(self, waves: list[dict[str, Any]], env: TokenVectorEnv) -> None:
        metrics = rollout_metrics(waves, env.objective.kl_coef, known_scale(env))
        for name, value in metrics.items():
            self.logger.record(f"rollout/{name}", value)
        self.logger.record("rollout/kl_coef", self._kl_coef(env))
        for stage in waves[0]["seconds"]:
            self._log_stage(stage, sum(wave["seconds"][stage] for wave in waves))

    def _log_stage(self, stage: str, seconds: float) -> None:
        self.stage_seconds[stage] = seconds
        self.logger.record(f"time/{stage}_seconds", seconds)
        rate = self.rollout_buffer.n_tokens / seconds
        self.logger.record(f"time/{stage}_tokens_per_second", rate)

    def train(self) -> None:
        """Run the update: `n_epochs` passes of `n_minibatches` optimiser steps."""
        begun = now(self.device)
        self.policy.set_training_mode(True)
        self.policy.optimizer.zero_grad()
        self._prepare_update()
        self._update_learning_rate(self.policy.optimizer)
        tokens = self.rollout_buffer.n_tokens
        batch_size = max(1, round(tokens / self.options.n_minibatches))
        logged: list[dict[str, float]] = []
        for _ in range(self.options.n_epochs):
            for minibatch in self.rollout_buffer.get(batch_size, self._together()):
                statistics = self._gradient(minibatch)
                logged.append(statistics)
                if self._enough(statistics):
                    break
                self._step(statistics, minibatch)
            else:
                self._n_updates += 1
                continue
            break
        for name in {name: None for row in logged for name in row}:
            over = EXTREMES.get(name, np.mean)
            found = [row[name] for row in logged if name in row]
            self.logger.record(f"train/{name}", over(found))
        if "ratio_max_error" in logged[0]:
            self.logger.record("train/ratio_first_max_error", logged[0]["ratio_max_error"])
        self._finish_update()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        ended = now(self.device)
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
        loss = torch.tensor(sum(v for k, v in statistics.items() if k.endswith("_loss")))
        check_finite("the loss", loss, sequences, **known)
        check_finite("the gradient", norm, sequences, **known)
        statistics["gradient_norm"] = float(norm)
        self.policy.optimizer.step()

    def _together(self) -> int:
        """Responses in turn that must stay in one minibatch."""
        return 1

    def _microbatch_tokens(self) -> int:
        return self.options.microbatch_tokens or min(tokens_per_pass(self.device), 1 << 14)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What else the next update depends on, for a checkpoint."""
        return {}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `extra_state`."""
