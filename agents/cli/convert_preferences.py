"""`python scripts/convert_preferences.py --data FILE --output FILE.jsonl` converts preferences.

Reads comparisons from a file or from a dataset of the `datasets` library, in a format of
rlhf_gym/preferences/known_formats.py or with a map of its columns, and writes them as the project's
JSON Lines. Prints the numbers of comparisons, prompts and candidates, the kinds of labels, and the
duplicates and contradictions. The output file appears only when it is complete, and an existing
file is never overwritten.
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
    """Options of the command."""

    data: str
    """The comparisons to convert: a file, or a dataset of the `datasets` library."""
    output: Path
    """File to write. Its name must end in .jsonl, and it must not exist yet."""
    format: str | None = None
    """Format of the rows, a key of `FORMATS` in rlhf_gym/preferences/known_formats.py. None
    recognises each row by its keys."""
    columns: tuple[str, ...] = ()
    """Which column is what, in place of a format, as in `prompt=question chosen=answer_a
    rejected=answer_b`. See docs/reward-models.md for all words."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is not a comparison: stop (error), or print the problem and leave
    out the row, or only its bad candidate (skip)."""
    tokenizer: str | None = None
    """Tokenizer of files that have token ids instead of text: a hub name or a local path."""
    split: str = "train"
    """Split to read from a `datasets` dataset. Ignored for a file."""
    revision: str | None = None
    """Commit or tag of a hub dataset. None takes the newest."""


def main(config: Config) -> dict[str, Any]:
    """Convert the file, print the counts and return them."""
    counts = convert_comparisons(
        config.data,
        config.output,
        format=config.format,
        columns=config.columns,
        on_bad_row=config.on_bad_row,
        tokenizer=config.tokenizer,
        split=config.split,
        revision=config.revision,
    )
    Console().print(table(counts))
    return counts


def table(counts: dict[str, Any]) -> Table:
    """Format the counts as a table."""
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
    if repaired := sum(counts["rows"]["repaired"].values()):
        rows["candidates repaired"] = repaired
    out = Table(title="comparisons, ± standard error over prompts")
    out.add_column("")
    out.add_column("number", justify="right")
    for name, value in rows.items():
        out.add_row(name, str(value))
    return out


def cli(arguments: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Parse the command line (None reads `sys.argv`) and run. Never returns."""
    run(main, Config, __doc__, arguments, prog)
