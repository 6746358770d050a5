"""What is around an environment: layers that only watch, and layers that would be skipped.

A rollout of whole responses is settled by `TokenVectorEnv.play`, below every layer. Afterwards each
step of it is shown to the layers that only watch. A layer that changes observations, actions or
rewards would have no effect, so it is refused by its name. Notation: N rows.
"""

import logging
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
)

from agents.sb3.rollout.steps import BatchStep
from agents.sb3.vec_env import TokenSB3VecEnv
from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.utils.arrays import Bools, Ints

logger = logging.getLogger(__name__)

WATCHERS = (VecMonitor, VecCheckNan)
"""Wrappers of Stable-Baselines3 that change nothing. A subclass may, so it is refused."""

SINGLE_WATCHERS = (Monitor, OrderEnforcing, PassiveEnvChecker)
"""Wrappers of a single environment that change nothing."""

INSTEAD = {
    "VecNormalize": "for rewards take whiten_rewards of PPO; observations are token ids",
    "VecFrameStack": "an observation has the whole text already",
    "TimeLimit": "the budget is the environment's max_new_tokens",
    "VecVideoRecorder": "film an evaluation of the policy instead, in an environment of its own",
}


def whole_rows(env: GymEnv | VectorEnv[Any, Any, Any]) -> VecEnv:
    """An environment of this project as rows that play whole responses.

    Args:
        env: A `TokenVectorEnv`, a `TokenEnv` (`gymnasium.make`), or a `VecEnv` of these
            (`TokenSB3VecEnv`, or a `DummyVecEnv` as `make_vec_env` returns it), with watchers
            around it.

    Returns:
        A `TokenSB3VecEnv`, with the same watchers around it.

    Raises:
        InputError: A layer changes observations, actions or rewards, or the rows are in other
            processes, or belong to different tasks.
    """
    if isinstance(env, VectorEnv):
        return whole_rows(TokenSB3VecEnv(env))  # type: ignore[arg-type]  # which refuses others
    if isinstance(env, gymnasium.Env):
        rows = _batch([env])
        logger.warning(
            "one environment is one row, so a rollout has one response per wave; "
            "gymnasium.make_vec(id, num_envs=64) learns from 64"
        )
        return rows
    if isinstance(env, VecEnvWrapper):
        if type(env) not in WATCHERS:
            raise _refused(env)
        inner = whole_rows(env.venv)
        if inner is env.venv:
            return env
        # The user's wrapper keeps its own environment; another algorithm may go on in it.
        watcher = object.__new__(type(env))
        watcher.__dict__.update(env.__dict__, venv=inner)
        return watcher
    if type(env) is TokenSB3VecEnv:
        kind = type(env.token_env)
        if kind.step is not TokenVectorEnv.step and kind.play is TokenVectorEnv.play:
            raise _refused(env.token_env)
        return env
    if type(env) is DummyVecEnv:
        rows = _batch(env.envs)
        rows._seeds = list(env._seeds)
        return rows
    refuse_other_processes(env)
    raise _refused(env)


def refuse_other_processes(env: VecEnv) -> None:
    """Check that the environments are in this process.

    Raises:
        InputError: They are in others.
    """
    if isinstance(env.unwrapped, SubprocVecEnv):
        raise InputError(
            "SubprocVecEnv has its environments in other processes, which cannot ask the policy "
            "for log π. TokenSB3VecEnv(gymnasium.make_vec(id, num_envs=N).unwrapped) is one batch "
            "of N rows, and faster"
        )


def show(
    env: VecEnv, step: BatchStep
) -> tuple[Ints, npt.NDArray[np.float32], Bools, list[dict[str, Any]]]:
    """Let the watchers around the rows see a step; what comes out on top.

    Returns:
        Observations (N, L), rewards (N,), dones (N,), infos, as `VecEnv.step` returns them.
    """
    layer = env
    while isinstance(layer, VecEnvWrapper):
        if isinstance(layer, VecMonitor):
            # It counts one token for every row and step; a row may have taken none, or several.
            layer.episode_lengths += (step.taken - 1).astype(layer.episode_lengths.dtype)
        layer = layer.venv
    assert isinstance(layer, TokenSB3VecEnv)
    with layer.showing(step):
        shown: Any = env.step(step.actions)
    return shown  # type: ignore[no-any-return]


def _batch(envs: list[gymnasium.Env[Any, Any]]) -> TokenSB3VecEnv:
    """Single environments of one task as the rows of one batch."""
    inner = [_inner(env) for env in envs]
    tasks = [None if env.spec is None else (env.spec.id, env.spec.kwargs) for env in envs]
    if any(task is None or task != tasks[0] for task in tasks[1:]):
        raise InputError(
            "the environments are not made by one id with the same keywords; whole responses need "
            "one task: TokenSB3VecEnv(gymnasium.make_vec(id, num_envs=N).unwrapped)"
        )
    return TokenSB3VecEnv(inner[0].batch(len(inner)))


def _inner(env: gymnasium.Env[Any, Any]) -> TokenEnv:
    if not isinstance(env.unwrapped, TokenEnv):
        raise InputError(f"{env.unwrapped} is no environment of this project")
    if type(env.unwrapped).step is not TokenEnv.step:
        raise _refused(env.unwrapped)
    while isinstance(env, gymnasium.Wrapper):
        if type(env) not in SINGLE_WATCHERS:
            raise _refused(env)
        if isinstance(env, Monitor) and env.results_writer is not None:
            raise InputError(
                "a Monitor with a file inside the batch would write nothing: put VecMonitor(env, "
                "filename) around it instead"
            )
        env = env.env
    assert isinstance(env, TokenEnv)
    return env


def _refused(layer: object) -> InputError:
    name = type(layer).__name__
    why = INSTEAD.get(
        name,
        "put what it does into the environment's keywords (shaping, token_rewards), or take a "
        "stock algorithm, which steps through it",
    )
    return InputError(
        f"{name} would have no effect, because whole responses are paid below it: {why}. Wrappers "
        f"that only watch may stay: {', '.join(kind.__name__ for kind in WATCHERS)}"
    )
