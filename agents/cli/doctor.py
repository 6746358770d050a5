"""`python scripts/doctor.py --env ID [--policy DIR]` examines an environment and a policy.

A pre-flight of seconds: one log-prob everywhere, ratio 1, KL 0 at the start, one reward by every
way, and a toy task solved exactly. Exit status 1, and what to mend, where something does not hold.
"""

import sys
from dataclasses import dataclass, field

from stable_baselines3.common.utils import ConstantSchedule

from agents.cli.command import device, run
from agents.doctor import CHECKS, Problem, Subject, examine
from agents.runs.setup import make_env, parse_values
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.vec_env import policy_kwargs
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.objective.enumeration import Enumeration


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id."""
    policy: str | None = None
    """A trained policy's folder; the environment's reference, as training would start, if none."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE …."""
    rows: int = 16
    """Responses to examine."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""


def main(config: Config) -> None:
    """Examine, say what was found, exit."""
    keywords = {"device": device(config.device), **parse_values(config.env_kwargs)}
    env = make_env(config.env, 1, keywords)
    policy = make_policy(env, config.policy)
    subject = Subject(env, policy, fresh=config.policy is None, rows=config.rows)
    problems = examine(subject) + toy()
    for problem in problems:
        print(f"✗ {problem}")
    print(f"{len(CHECKS) + 1 - len(problems)} of {len(CHECKS) + 1} checks hold")
    if problems:
        sys.exit(1)


def make_policy(env: TokenVectorEnv, model: str | None) -> CausalLMPolicy:
    """The policy as training would build it."""
    options = policy_kwargs(env) | ({} if model is None else {"model": model, "revision": None})
    policy = CausalLMPolicy(
        env.single_observation_space, env.single_action_space, ConstantSchedule(0.0), **options
    )
    policy.follow(env.objective.reference)
    return policy.to(env.objective.reference.device)


def toy() -> list[Problem]:
    """Exact policy iteration must reach the enumerated optimum of Exact-v0."""
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
            "the packaged models or the arithmetic of this installation are broken; reinstall",
        )
    ]


def cli() -> None:
    """Parse the command line and run; never returns."""
    run(main, Config, __doc__)
