"""`python scripts/rlhf.py` runs all of RLHF: comparisons, reward model, policy, report.

It collects comparisons among samples of the reference (or reads yours from --data), trains a reward
model on them, trains a policy against that reward model, evaluates the policy on held-out prompts
and writes report.html. The default task is packaged and needs no network. The same command
continues a stopped run: a stage whose output is already in the run folder is skipped.

With --rounds n, the three stages before the evaluation are repeated n times. From the second round
on, the simulated human chooses among samples of the current policy, the reward model is trained on
all choices so far, and the policy continues to learn against it (Christiano et al. 2017, Ziegler et
al. 2019). Earlier rounds are in rounds/1, rounds/2 …
"""

from collections.abc import Sequence
from typing import NoReturn

from agents.cli.command import results_and_next, run
from agents.runs.journey import run_journey
from agents.runs.journey_options import JourneyOptions as Config


def main(config: Config) -> None:
    """Run each stage that is not done yet."""
    run_journey(config, config.algorithm_options)  # type: ignore[attr-defined]


def next_steps(config: Config) -> str:
    """Return the lines that say where the results are and how to read them."""
    return results_and_next(
        f"{config.run_dir} (the policy is in {config.run_dir / 'policy'})",
        f"open {config.run_dir / 'report.html'} in a browser",
    )


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog, with_algorithm=True, then=next_steps)
