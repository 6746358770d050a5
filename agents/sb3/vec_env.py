"""A `TokenVectorEnv` as a Stable-Baselines3 `VecEnv`, and what a policy must share with it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from agents.sb3.policy.shared_base import Lent
from agents.sb3.rollout.steps import BatchStep, end_of_episode
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.loading import commit


class TokenSB3VecEnv(VecEnv):
    """The natively batched environment behind SB3's interface; no process, no copy per row.

    Args:
        env: The environment; SB3 expects auto-reset within the step, so its mode is "SameStep".

    Raises:
        InputError: It is wrapped, is of another kind, or resets otherwise.
    """

    def __init__(self, env: TokenVectorEnv) -> None:
        if not isinstance(env, TokenVectorEnv):
            raise InputError(
                f"{env} is not a TokenVectorEnv. Whole responses are settled by `play`, which a "
                "wrapper never sees: put what it does into the environment's keywords (shaping, "
                "token_rewards), or step through the wrapped environment in a loop of your own"
            )
        if env.autoreset_mode != AutoresetMode.SAME_STEP:
            raise InputError(
                f"Stable-Baselines3 needs autoreset_mode='SameStep', not {env.autoreset_mode.value}"
            )
        self.token_env = env
        self._actions: npt.NDArray[np.int64] = np.zeros(env.num_envs, dtype=np.int64)
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)
        self._begun = time.time()
        self._shown: BatchStep | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> npt.NDArray[np.int64]:
        """New prompts in all rows."""
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observations, _ = self.token_env.reset(seed=seeds, options=self._row_options())
        self._reset_seeds()
        self._reset_options()
        self._returns[:], self._lengths[:] = 0, 0
        return observations

    @contextmanager
    def showing(self, step: BatchStep) -> Iterator[None]:
        """Let `step` return what a rollout of whole responses has played already."""
        self._shown = step
        try:
            yield
        finally:
            self._shown = None

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        """Remember the actions."""
        self._actions = np.asarray(actions, dtype=np.int64).reshape(self.num_envs)

    def _row_options(self) -> dict[str, Any] | None:
        """What `set_options` has set, one dict per row, as the environment takes it."""
        keys = {key for options in self._options for key in options}
        if not all(options.keys() == keys for options in self._options):
            raise InputError(f"every row needs the same reset options, not {self._options}")
        return {key: [options[key] for options in self._options] for key in keys} or None

    def step_wait(self) -> Any:
        """Take the step; each row's info is a plain dict."""
        if self._shown is not None:
            step = self._shown
            return step.observations, step.rewards, step.dones, step.infos
        observations, rewards, dones, _, infos = self.token_env.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        rows = [self._row_info(infos, dones, i) for i in range(self.num_envs)]
        self._returns[dones], self._lengths[dones] = 0, 0
        return observations, rewards.astype(np.float32), dones, rows

    def _row_info(
        self, infos: dict[str, Any], dones: npt.NDArray[np.bool_], i: int
    ) -> dict[str, Any]:
        if not dones[i]:
            return _row(infos, i)
        total, length = float(self._returns[i]), int(self._lengths[i])
        return _row(infos["final_info"], i) | end_of_episode(
            infos["final_obs"][i], total, length, self._begun
        )

    def get_images(self) -> list[Any]:
        """One picture per row, where the environment was made with render_mode="rgb_array"."""
        frames = self.token_env.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def close(self) -> None:
        """Close the environment."""
        self.token_env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the environment, once for each row asked for."""
        return [getattr(self.token_env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute; all rows share it."""
        setattr(self.token_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method once; all rows share the answer, but for `action_masks`."""
        answer = getattr(self.token_env, method_name)(*method_args, **method_kwargs)
        if method_name == "action_masks":  # (N, V): the one answer that is a row's own
            return [answer[i] for i in self._get_indices(indices)]
        return [answer for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """No row is wrapped."""
        return [False for _ in self._get_indices(indices)]


def _row(infos: dict[str, Any], i: int) -> dict[str, Any]:
    names = [key for key in infos if not key.startswith("_") and f"_{key}" in infos]
    return {key: infos[key][i] for key in names if infos[f"_{key}"][i] and key != "final_info"}


def policy_kwargs(env: TokenVectorEnv) -> dict[str, Any]:
    """Keywords of a `CausalLMPolicy` that must match its environment: model, temperature, mask."""
    reference = env.objective.reference
    model, tokenizer = reference.model.name_or_path, reference.tokenizer.name_or_path
    return {
        "model": model,
        "revision": commit(reference.model),
        "tokenizer": tokenizer if tokenizer not in ("", model) else None,
        "temperature": reference.temperature,
        "mask": reference.mask,
    }


def lend(env: TokenVectorEnv, options: dict[str, Any], device: torch.device) -> Lent | None:
    """The reference as the frozen base of adapters, if a policy with these options may share it.

    Args:
        env: The environment.
        options: Keywords of the policy.
        device: Where the policy is.
    """
    reference = env.objective.reference
    same = all(options[key] == value for key, value in policy_kwargs(env).items())
    # Another attention implementation is a setting of the model itself, so it cannot be shared.
    plain = options.get("attn_implementation") is None
    return Lent(reference) if same and plain and device == reference.device else None
