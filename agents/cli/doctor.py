"""`python scripts/doctor.py --env ID [--policy DIR]` checks an environment and a policy.

It takes seconds and finds the usual faults before hours of training: log-probs that differ between
sampling, scoring and the update; a first ratio other than 1; an initial KL other than 0; `step` and
`play` that pay different rewards. It evaluates the policy in three ways (Stable-Baselines3's
`evaluate_policy`, by hand, and as `rlhf-gym evaluate` does) and compares, it solves a small
task exactly, and it counts the prompts that are too long. For each check that fails it prints the
problem and the fix, and exits with status 1.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from agents.cli.command import run
from agents.doctor import CHECKS, DATA_CHECKS
from agents.runs.examination import check_exact_task, examine_environment
from agents.runs.setup import env_keywords, make_env


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    env: str = "rlhf_gym/Reviews-v0"
    """Environment id. For a task of your own give the module that registers it too,
    my_module:mine/Task-v0; the module may be a file in the current folder."""
    policy: str | None = None
    """Folder of a trained policy. None checks the policy that a training would start from: a copy
    of the environment's reference."""
    env_kwargs: dict[str, str] = field(default_factory=dict)
    """Keywords of the environment, KEY VALUE … Values are parsed as JSON, else taken as text;
    --env-kwargs help lists the keywords."""
    rows: int = 16
    """Responses to draw and check, at least 1."""
    device: str = "auto"
    """Where to run: auto (the device registered with the environment, else the GPU if there is
    one, else the CPU), cpu or cuda."""


def main(config: Config) -> None:
    """Run all checks, print the problems, and exit with status 1 if there are any."""
    env = make_env(config.env, 1, env_keywords(config.env_kwargs, config.device))
    problems = examine_environment(env, config.policy, rows=config.rows, say=print)
    problems += check_exact_task()
    for problem in problems:
        print(f"✗ {problem}")
    n_checks = len(CHECKS) + len(DATA_CHECKS) + 2  # the seam and the exact task
    print(f"{n_checks - len(problems)} of {n_checks} checks pass")
    if problems:
        sys.exit(1)


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog)
