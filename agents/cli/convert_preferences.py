"""`python scripts/convert_preferences.py --data FILE --output FILE.jsonl` converts preferences.

Reads comparisons in any format that rlhf_gym/preferences/formats.py knows, from a file or from a
dataset of the `datasets` library, writes them as the project's JSON Lines, and prints what they
hold: how many, of how many candidates, under which labels, and what in them speaks against each
other. The file is there whole or not at all; one that exists is never written over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console
from rich.table import Table

from agents.cli.command import run
from agents.runs.comparison_files import convert_comparisons


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    data: str
    """Comparisons: a file, or a dataset of the `datasets` library."""
    output: Path
    """File to write, FILE.jsonl; it must not exist yet."""
    format: str | None = None
    """What the rows are, one of `FORMATS` in rlhf_gym/preferences/formats.py; by default each row's
    keys tell."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is no comparison: stop, or leave it out and say so."""
    tokenizer: str | None = None
    """For files of token ids, the tokenizer that they belong to: a hub name or a local path."""
    split: str = "train"
    """Split of a `datasets` dataset."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""


def main(config: Config) -> dict[str, Any]:
    """Convert, and print the counts; the counts."""
    counts = convert_comparisons(
        config.data,
        config.output,
        format=config.format,
        on_bad_row=config.on_bad_row,
        tokenizer=config.tokenizer,
        split=config.split,
        revision=config.revision,
    )
    Console().print(table(counts))
    return counts


def table(counts: dict[str, Any]) -> Table:
    """The counts as a table."""
    longer = counts["longer_won"]
    rows = {
        "comparisons": counts["comparisons"],
        "unique prompts": counts["prompts"],
        **{f"of K = {k} candidates": n for k, n in counts["candidates"].items()},
        **{f"labelled by {name}": n for name, n in counts["labels"].items()},
        "with ties": counts["ties"],
        "exact duplicates": counts["duplicates"],
        "conflicting pairs of answers": counts["conflicts"],
        "intransitive": counts["intransitive"],
        "pairs of unequal length": longer["n"],
        "of these, the longer answer won": f"{longer['value']:.3f} ± {longer['se']:.3f}",
        "rows skipped": counts["skipped"],
    }
    out = Table(title="comparisons, ± standard error over prompts")
    out.add_column("")
    out.add_column("number", justify="right")
    for name, value in rows.items():
        out.add_row(name, str(value))
    return out


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line, by default that of the process, and run; never returns."""
    run(main, Config, __doc__, arguments, prog)
