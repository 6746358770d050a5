"""`python scripts/report.py --run-dir DIR` writes the report of a run into its folder.

Writes report.html (one file that needs no network) and curves.png (the learning curves). The folder
is the run folder of rlhf.py, train_policy.py or evaluate.py. The report reads summary.json,
evaluation.json, metrics.csv, policy.json, reward_model.json, samples.jsonl, training_samples.jsonl,
config.json and evaluation_config.json. If one of them is missing, its section is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from agents.cli.command import run as run_script
from rlhf_gym.reports.run_page import write_report


@dataclass(frozen=True)
class Config:
    """Options of the command."""

    run_dir: Path
    """Folder of the run, which must exist."""


def main(config: Config) -> None:
    """Write the report and print its path."""
    print(f"report: {write_report(config.run_dir)}")


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run_script(main, Config, __doc__, arguments, prog)
