"""`python scripts/compare.py --algorithms ppo rloo grpo --run-dir DIR` compares algorithms.

Every algorithm gets the same number of tokens in the same environments and the same tuning budget.
With --rates, each algorithm is first trained once per multiple of its default learning rate (or of
the option that --tuned names) and measured on training prompts; the best multiple is used in the
comparison. The comparison itself uses other seeds (--seeds) and held-out prompts (Exact-v0, and a
task of your own that is registered with split="all", have none: only the seeds differ there). Its
intervals are stratified bootstrap intervals over seeds, as in rliable. With --workers, trainings
run in parallel processes.

Writes results.csv (one row per run), compare.json, compare.md, compare.png and compare.html. Run
the same command again to continue: runs with a row in results.csv are skipped.
"""

from collections.abc import Sequence
from typing import NoReturn

from agents.cli.command import run
from agents.runs.comparison import compare
from agents.runs.comparison_options import ComparisonOptions as Config


def main(config: Config) -> None:
    """Tune, compare and write the results."""
    compare(config)


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog)
