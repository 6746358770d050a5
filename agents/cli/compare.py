"""`python scripts/compare.py --algorithms ppo rloo grpo --run-dir DIR` compares algorithms.

Every algorithm gets the same tokens in the same environments, and the same effort in tuning: with
--rates, it is first trained once for each multiple of its own default learning rate (or of what
--tuned names), and measured on training prompts; the best multiple goes into the comparison. That
is over --seeds other seeds and on held-out prompts (`Exact-v0` holds none out: there only the seeds
differ), with intervals by stratified bootstrap over seeds (rliable). Runs go in parallel processes
(--workers). Writes results.csv (a row a run; done rows are skipped when it is run again),
compare.json, compare.md, compare.png and compare.html.
"""

from collections.abc import Sequence
from typing import NoReturn

from agents.cli.command import run
from agents.runs.comparison import compare
from agents.runs.comparison_options import ComparisonOptions as Config


def main(config: Config) -> None:
    """Tune, compare, and write what came out."""
    compare(config)


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog)
