"""`python scripts/rlhf.py` is the whole of RLHF: comparisons, reward model, policy, report.

Collects comparisons among the reference's own samples (or takes yours with --data), trains a
reward model on them, trains a policy against it, evaluates it on held-out prompts and writes
report.html. By default on the embedded task, which needs no network. A stage whose output is
already in the run folder is skipped, so a stopped run goes on with the same command.

With --rounds n the loop is closed: the simulated human also chooses among the policy's own samples,
the reward model is trained again on all choices so far, and the policy goes on against it
(Christiano et al. 2017, Ziegler et al. 2019). Earlier rounds are in rounds/1, rounds/2 …
"""

from collections.abc import Sequence
from typing import NoReturn

from agents.cli.command import results_and_next, run
from agents.runs.journey import run_journey
from agents.runs.journey_options import JourneyOptions as Config


def main(config: Config) -> None:
    """Run every stage that is not done yet."""
    run_journey(config, config.algorithm_options)  # type: ignore[attr-defined]


def next_steps(config: Config) -> str:
    """Where the results are, and how to read them."""
    return results_and_next(
        f"{config.run_dir} (the policy is in {config.run_dir / 'policy'})",
        f"open {config.run_dir / 'report.html'} in a browser",
    )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog, with_algorithm=True, then=next_steps)
