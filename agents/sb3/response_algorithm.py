"""What every learner from whole responses does: the rollout, and the passes of an update over it.

Notation: N rows of the environment, T the token budget, M chosen tokens.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.finite import check_finite
from agents.sb3.kl_control import KLController
from agents.sb3.options import ResponseOptions
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.rollout.buffer import SequenceRolloutBuffer, SequenceSamples
from agents.sb3.rollout.collection import WavePlayer, now
from agents.sb3.rollout.metrics import known_scale, rollout_metrics
from agents.sb3.vec_env import lend
from agents.sb3.vec_env import policy_kwargs as reference_kwargs
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.batching import tokens_per_pass
from rlhf_gym.lm.decoding.sampling import Sampled
from rlhf_gym.lm.precision import warn_if_emulated

EXTREMES: dict[str, Callable[[list[float]], float]] = {"ratio_min": min, "ratio_max": max}
"""Statistics of a minibatch whose mean over an update's minibatches says little."""

MEMORY_OPTIONS = ("precision", "gradient_checkpointing", "lora_rank", "lora_alpha")
"""Options that are keywords of `CausalLMPolicy`."""


class ResponseAlgorithm(OnPolicyAlgorithm):
    """Samples whole responses, lets the environment `play` them, and learns from sequences.

    A subclass names its `Options`, and says what each token of a rollout is worth (`_estimate`) and
    what gradient a minibatch has (`_gradient`). Metrics, checkpoints and samples are the same for
    all.

    Args:
        policy: `CausalLMPolicy`.
        env: A `TokenSB3VecEnv`; each of its N rows plays one episode per wave.
        options: An instance of the class's `Options`; their defaults if None.
        gamma: Must be 1: the objective is undiscounted.
        stats_window_size: Accepted as in Stable-Baselines3; metrics here are of one rollout.
        tensorboard_log: Folder for TensorBoard.
        policy_kwargs: Keywords of the policy, in place of those that the options imply.
        verbose: 0 or 1.
        seed: Seed of everything.
        device: "auto", "cpu", "cuda".

    Raises:
        InputError: γ is not 1, or an option does not fit the environment.
    """

    Options: ClassVar[type[ResponseOptions]] = ResponseOptions
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CausalLMPolicy": CausalLMPolicy}
    policy: CausalLMPolicy
    rollout_buffer: SequenceRolloutBuffer

    kl_controller: KLController | None = None
    """Chooses the weight of the penalty against the reference; None leaves the environment's β."""

    def __init__(
        self,
        policy: str | type[CausalLMPolicy],
        env: VecEnv | None,
        options: ResponseOptions | None = None,
        *,
        gamma: float = 1.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if gamma != 1.0:
            raise InputError(f"the objective is undiscounted: gamma must be 1, not {gamma}")
        self.options = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise InputError(
                f"{type(self).__name__} takes options of {self.Options.__module__}."
                f"{self.Options.__qualname__}, not of {type(self.options).__name__}"
            )
        self.stage_seconds: dict[str, float] = {}  # of the last iteration
        self._tokens_before = 0  # this rollout
        rate = self.options.learning_rate
        # Without an environment Stable-Baselines3 is loading, and brings these numbers along.
        budget = env.get_attr("max_new_tokens")[0] if isinstance(env, VecEnv) else 1
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # None while loading
            LinearSchedule(rate, 0.0 if self.options.anneal else rate, 1.0),
            n_steps=self.options.n_waves * budget,
            gamma=1.0,
            gae_lambda=1.0,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=self.options.max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=SequenceRolloutBuffer,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        """Start the policy from the environment's reference, and bind it as the one who acts."""
        self._adopt_changes()
        if self.env is None:
            super()._setup_model()
            return
        env = self.token_env
        self._adopt(env)
        implied = {**reference_kwargs(env), **self._policy_options(env)}
        kind = self.policy_kwargs.get("optimizer_class", implied["optimizer_class"])
        if not issubclass(kind, torch.optim.Adam):
            del implied["optimizer_kwargs"]  # ε is Adam's
        elif "optimizer_kwargs" in self.policy_kwargs:
            own = self.policy_kwargs["optimizer_kwargs"] or {}
            self.policy_kwargs["optimizer_kwargs"] = {**implied["optimizer_kwargs"], **own}
        self.policy_kwargs = {**implied, **self.policy_kwargs}
        if self.policy_kwargs["lora_rank"]:
            self.policy_kwargs["base"] = lend(env, self.policy_kwargs, self.device)
        super()._setup_model()
        warn_if_emulated(self.policy.device, self.policy.precision)
        self._act_in(env)

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load what `save` wrote, as in Stable-Baselines3.

        Args:
            path: The file.
            *args: As in Stable-Baselines3: env, device and so on.
            **kwargs: As there; single options replace the saved ones.
        """
        named = {field.name for field in fields(cls.Options)} & kwargs.keys()
        changes = {name: kwargs.pop(name) for name in named}
        return super().load(path, *args, _changes=changes, **kwargs)

    def _adopt_changes(self) -> None:
        """Apply the options that `load` was given, and set Stable-Baselines3's copies of them."""
        changes = self.__dict__.pop("_changes", {})
        self.options = replace(self.options, **changes) if changes else self.options
        rate = self.options.learning_rate
        self.learning_rate = LinearSchedule(rate, 0.0 if self.options.anneal else rate, 1.0)
        self.max_grad_norm = self.options.max_grad_norm
        if self.env is not None:
            self.n_steps = self.options.n_waves * self.token_env.max_new_tokens

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Go on in another environment, with this policy as its actor."""
        super().set_env(env, force_reset)
        self._adopt(self.token_env)
        self._act_in(self.token_env)

    def _act_in(self, env: TokenVectorEnv) -> None:
        """Follow the environment's reference, and be bound as the one who acts."""
        self.policy.follow(env.objective.reference)
        env.bind_actor(self.policy)

    @property
    def token_env(self) -> TokenVectorEnv:
        """The environment behind Stable-Baselines3's interface."""
        assert self.env is not None
        env: TokenVectorEnv = self.env.get_attr("unwrapped")[0]
        return env

    def _adopt(self, env: TokenVectorEnv) -> None:
        """Prepare what the options need of an environment, or ask of it."""
        if self.options.samples_per_prompt is not None:
            env.group_rows(self.options.samples_per_prompt)

    def _policy_options(self, env: TokenVectorEnv) -> dict[str, Any]:
        """Keywords of the policy that the options imply."""
        return {
            **{name: getattr(self.options, name) for name in MEMORY_OPTIONS},
            "entropy": False,
            "optimizer_class": torch.optim.Adam,
            "optimizer_kwargs": {"eps": self.options.adam_eps},
        }

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
            infos = self._play_wave(token_env, rollout_buffer)
            waves.append(infos)
            callback.update_locals({"infos": infos})
            if not callback.on_step():
                return False
        self._estimate(rollout_buffer, token_env.rows_per_prompt)
        self._log_waves(waves, token_env)
        self._finish_rollout(waves)
        callback.on_rollout_end()
        return True

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Schedules go by what was left before the rollout: from 1, and above 0 at the last."""
        super()._update_current_progress_remaining(self._tokens_before, total_timesteps)

    def _play_wave(self, env: TokenVectorEnv, buffer: SequenceRolloutBuffer) -> dict[str, Any]:
        """Add one response of every row to the buffer; return the infos."""
        assert self._last_obs is not None
        wave = WavePlayer(
            self.policy,
            env,
            lambda prompts: self._sample(prompts, env),
            with_values=self._has_critic,
            scoring_pass=self._needs_scoring_pass(),
            kl_coef=self._reward_kl_coef(env),
        ).play(np.asarray(self._last_obs), buffer)
        self._last_obs = wave.observations
        self.num_timesteps += wave.n_tokens
        return wave.infos

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

    def _update_learning_rate(
        self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer
    ) -> None:
        """One schedule, times each parameter group's scale."""
        super()._update_learning_rate(optimizers)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for group in optimizer.param_groups:
                group["lr"] *= group["lr_scale"]

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
