"""Run the doctor's checks on an environment and a policy, and on a task with a known optimum."""

from collections.abc import Callable
from pathlib import Path

from stable_baselines3.common.utils import ConstantSchedule

from agents.doctor import Problem, Subject, examine, examine_data, own_chance, seam
from agents.runs.setup import make_env
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.vec_env import policy_kwargs
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.objective.enumeration import Enumeration


def examine_environment(
    env: TokenVectorEnv,
    policy: str | Path | None = None,
    *,
    rows: int = 16,
    say: Callable[[str], None] | None = None,
) -> list[Problem]:
    """Run the doctor's checks on an environment with a policy.

    Also evaluate the policy in three ways and compare (`agents.doctor.seam_check`).

    Args:
        env: The environment. Its state does not change.
        policy: Folder of a trained policy. None takes the policy that a training would start from,
            which must equal the reference.
        rows: Responses to draw and check.
        say: Told the figures of that comparison.

    Returns:
        The problems found; empty if all checks pass.
    """
    fresh = policy is None
    subject = Subject(env, make_policy(env, policy), fresh=fresh, rows=rows)
    problems = examine(subject)
    if not problems:  # else an evaluation could fail for one of them
        with own_chance():
            figures, problem = seam(subject)
        if figures is not None and say is not None:
            who = "the reference, its weights times 1.1" if fresh else "the policy"
            agree = "they agree" if problem is None else "they do not agree"
            say(f"{who}: {figures}; {agree}")
        problems += [] if problem is None else [problem]
    if say is not None:
        say(f"prompts: {len(env.prompts)} kept, {env.prompts.dropped} dropped")
    return problems + examine_data(subject)


def make_policy(env: TokenVectorEnv, model: str | Path | None) -> CausalLMPolicy:
    """Build the policy as a training would, from a folder or (None) from the reference."""
    options = policy_kwargs(env) | (
        {} if model is None else {"model": str(model), "revision": None}
    )
    policy = CausalLMPolicy(
        env.single_observation_space, env.single_action_space, ConstantSchedule(0.0), **options
    )
    policy.follow(env.objective.reference)
    return policy.to(env.objective.reference.device)


def check_exact_task() -> list[Problem]:
    """Check that exact policy iteration reaches the enumerated optimum of Exact-v0."""
    env = make_env("rlhf_gym/Exact-v0", 1, {"device": "cpu", "max_new_tokens": 3})
    task = Enumeration(env.objective, env.prompts.ids, max_new_tokens=3)
    policy = task.reference
    for _ in range(task.horizon):
        policy = task.improved(policy)
    reached = task.optimality(task.value(policy).objective)
    if abs(reached - 1) < 1e-6:
        return []
    return [
        Problem(
            "toy",
            f"policy iteration on Exact-v0 ends at optimality {reached:.6f}, not 1",
            "the packaged models or this installation's arithmetic are broken; reinstall rlhf-gym",
        )
    ]
