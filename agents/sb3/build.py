"""The one way to put an algorithm of Stable-Baselines3, a policy and an environment together."""

import inspect
from dataclasses import fields, replace
from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import get_device

from agents.sb3.layers import refuse_other_processes
from agents.sb3.options import ResponseOptions
from agents.sb3.options_algorithm import MEMORY_OPTIONS, OptionsAlgorithm
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.sb3.vec_env import TokenSB3VecEnv, lend, policy_kwargs
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.precision import warn_if_emulated
from rlhf_gym.utils.nearest import did_you_mean

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)


def build(
    algorithm: type[Algorithm],
    env: TokenVectorEnv | GymEnv | str,
    *,
    options: ResponseOptions | None = None,
    policy_options: dict[str, Any] | None = None,
    policy_class: type[CausalLMPolicy] = CausalLMPolicy,
    **kwargs: Any,
) -> Algorithm:
    """Make an SB3 algorithm on `env` with a `CausalLMPolicy`, bound to it as its actor.

    Args:
        algorithm: An on-policy algorithm of Stable-Baselines3, or a `ResponseAlgorithm`.
        env: A `TokenVectorEnv`, or what Stable-Baselines3 takes: an id, `gymnasium.make(id)`,
            `make_vec_env(id)`, a `TokenSB3VecEnv` with wrappers.
        options: Of a `ResponseAlgorithm`: an instance of its `Options`, whose defaults are the
            command line's too; their defaults if None.
        policy_options: Further keywords of the policy; `policy_kwargs` is another name for it.
        policy_class: `CausalLMPolicy` or a class of it.
        **kwargs: Keywords of the algorithm; of a `ResponseAlgorithm` also single options, in place
            of those of `options`. γ = 1, and the device is the reference's, unless given.

    Returns:
        The algorithm, ready to learn.

    Raises:
        InputError: The algorithm is not on-policy, an option is unknown or does not fit, or the
            environment's rows are in other processes.
    """
    if not issubclass(algorithm, OnPolicyAlgorithm):
        raise InputError(
            f"{algorithm.__name__} is no on-policy algorithm; DQN and QRDQN are made by "
            "agents.sb3_dqn.make(agents.sb3_dqn.Config(), env) and agents.sb3_qrdqn"
        )
    policy_options = {**kwargs.pop("policy_kwargs", {}), **(policy_options or {})}
    outer = TokenSB3VecEnv(env) if isinstance(env, TokenVectorEnv) else env
    rows = algorithm._wrap_env(maybe_make_env(outer, 0))
    refuse_other_processes(rows)
    task = rows.get_attr("unwrapped")[0]
    kwargs.setdefault("device", task.objective.reference.device)
    if issubclass(algorithm, ResponseAlgorithm):
        options_of = {field.name for field in fields(algorithm.Options)}
        known = {*options_of, *inspect.signature(OptionsAlgorithm).parameters}
        for name in kwargs:
            if name not in known:
                raise InputError(
                    f"{algorithm.__name__} has no option {name!r}{did_you_mean(name, known)}"
                )
        changes = {name: kwargs.pop(name) for name in options_of & kwargs.keys()}
        # These are options too: the critic's start depends on them.
        memory = [name for name in MEMORY_OPTIONS if name in policy_options]
        changes |= {name: policy_options.pop(name) for name in memory}
        options = algorithm.Options() if options is None else options
        if changes:
            options = replace(options, **changes)
        return algorithm(policy_class, rows, options, policy_kwargs=policy_options, **kwargs)
    kwargs.setdefault("gamma", 1.0)
    policy_options = {**policy_kwargs(task), **policy_options}
    if policy_options.get("lora_rank"):
        policy_options["base"] = lend(task, policy_options, get_device(kwargs["device"]))
    learner = algorithm(policy_class, rows, policy_kwargs=policy_options, **kwargs)
    policy = learner.policy
    assert isinstance(policy, CausalLMPolicy)
    policy.follow(task.objective.reference)
    warn_if_emulated(policy.device, policy.precision)
    rows.env_method("bind_actor", policy, named=False)
    return learner
