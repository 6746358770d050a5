"""`python scripts/doctor.py --env ID [--policy DIR]` examines an environment and a policy.

A pre-flight of seconds: one log-prob everywhere, ratio 1, KL 0 at the start, one reward by every
way, and a toy task solved exactly. Exit status 1, and what to mend, where something does not hold.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from agents.cli.command import device, run
from agents.doctor import CHECKS
from agents.runs.examination import check_exact_task, examine_environment
from agents.runs.setup import make_env, parse_values


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
    """Examine, print what does not hold, and exit with status 1 if anything does not."""
    keywords = {"device": device(config.device), **parse_values(config.env_kwargs)}
    env = make_env(config.env, 1, keywords)
    problems = examine_environment(env, config.policy, rows=config.rows) + check_exact_task()
    for problem in problems:
        print(f"✗ {problem}")
    print(f"{len(CHECKS) + 1 - len(problems)} of {len(CHECKS) + 1} checks hold")
    if problems:
        sys.exit(1)


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog)
