"""An algorithm of Stable-Baselines3 whose options are a dataclass, on a policy bound to its env."""

from dataclasses import fields, replace
from typing import Any, ClassVar, Self

import torch
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.layers import whole_rows
from agents.sb3.options import ResponseOptions
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from agents.sb3.vec_env import lend
from agents.sb3.vec_env import policy_kwargs as reference_kwargs
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.precision import warn_if_emulated

MEMORY_OPTIONS = ("precision", "gradient_checkpointing", "lora_rank", "lora_alpha")
"""Options that are keywords of `CausalLMPolicy`."""


class OptionsAlgorithm(OnPolicyAlgorithm):
    """Connects options, environment and policy, however the algorithm was made or loaded.

    The policy starts from the environment's reference, follows its temperature, ends and mask, and
    is bound as the one who acts. A subclass names its `Options`, and what they ask of the
    environment (`_adopt`) and imply for the policy (`_policy_options`).

    Args:
        policy: `CausalLMPolicy`.
        env: The environment, as `whole_rows` takes it, or its id; each of its N rows plays one
            episode per wave.
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

    def __init__(
        self,
        policy: str | type[CausalLMPolicy],
        env: GymEnv | TokenVectorEnv | str | None,
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
        if env is not None:
            env = self._wrap_env(maybe_make_env(env, verbose))  # type: ignore[arg-type]
        # Without an environment Stable-Baselines3 is loading, and brings these numbers along.
        budget = 1 if env is None else env.get_attr("max_new_tokens")[0]
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # None while loading
            self.options.learning_rate,
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

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Sample about `total_timesteps` tokens and learn from them, as in Stable-Baselines3.

        TensorBoard's folder is named after the class, unless `tb_log_name` is given.
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(
            total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar
        )

    @classmethod
    def load(
        cls,
        path: Any,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load what `save` wrote, as in Stable-Baselines3.

        Args:
            path: The file.
            env: As `__init__` takes it.
            device: As in `__init__`.
            custom_objects: As in Stable-Baselines3; single options replace the saved ones.
            print_system_info: As there.
            force_reset: As there.
            **kwargs: As there; single options replace the saved ones.
        """
        names = {field.name for field in fields(cls.Options)}
        given = {**(custom_objects or {}), **kwargs}
        return super().load(
            path,
            env,
            device,
            custom_objects,
            print_system_info,
            force_reset,
            _changes={name: value for name, value in given.items() if name in names},
            **{name: value for name, value in kwargs.items() if name not in names},
        )

    def _adopt_changes(self) -> None:
        """Apply the options that `load` was given, and set Stable-Baselines3's copies of them."""
        changes = self.__dict__.pop("_changes", {})
        self.options = replace(self.options, **changes) if changes else self.options
        self.learning_rate = self.options.learning_rate
        self.max_grad_norm = self.options.max_grad_norm
        if self.env is not None:
            self.n_steps = self.options.n_waves * self.token_env.max_new_tokens

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """The environment as rows that play whole responses; Stable-Baselines3's own hook."""
        return whole_rows(env)

    def _setup_lr_schedule(self) -> None:
        rate = self.options.learning_rate
        self.lr_schedule = LinearSchedule(rate, 0.0 if self.options.anneal else rate, 1.0)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Go on in another environment, with this policy as its actor."""
        super().set_env(env, force_reset)
        self._adopt(self.token_env)
        self._act_in(self.token_env)

    def _act_in(self, env: TokenVectorEnv) -> None:
        """Follow the environment's reference, and be bound as the one who acts."""
        self.policy.follow(env.objective.reference)
        env.bind_actor(self.policy, named=False)

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

    def _update_learning_rate(
        self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer
    ) -> None:
        """One schedule, times each parameter group's scale."""
        super()._update_learning_rate(optimizers)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for group in optimizer.param_groups:
                group["lr"] *= group["lr_scale"]
