"""Tables and samples in the terminal."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_gym.reports.display import clean, measured_on, scores
from rlhf_gym.reports.run_files import read_json_lines


def table(figures: dict[str, Any]) -> Table:
    """Return the figures as a table, reference next to policy."""
    out = Table(title=f"{measured_on(figures)}, ± standard error over prompts")
    for heading in ("", "reference", "policy"):
        out.add_column(heading, justify="left" if not heading else "right")
    for name in [key.removesuffix("_after") for key in figures if key.endswith("_after")]:
        before, after = figures[f"{name}_before"], figures[f"{name}_after"]
        out.add_row(name, shown(before), shown(after))
    for name in ("kl", "kl_per_token", "win_rate_score", "win_rate_gold", "objective_optimum"):
        out.add_row(name, "", shown(figures[name]))
    if "optimum" in figures:
        for name in ("score", "kl", "ess"):
            out.add_row(f"optimal policy: {name}", "", shown(figures["optimum"][name]))
    for n, of_n in figures.get("best_of_n_optimality", {}).items():
        out.add_row(f"optimality of best-of-{n}", "", shown(of_n))
    optimality = figures["optimality"]
    if optimality is None:
        needed = figures.get("optimum", {}).get("samples_needed")
        more = f"; about {needed} samples per prompt would be enough" if needed else ""
        out.add_row("optimality", "", f"unknown: too few effective samples for J*{more}")
    else:
        interval = f"{optimality['value']:.3f}  [{optimality['low']:.3f}, {optimality['high']:.3f}]"
        out.add_row("optimality (95 % interval)", "0", interval)
    return out


def shown(figure: dict[str, float] | None) -> str:
    """Return a figure with its standard error; a dash if it is unknown."""
    return "–" if figure is None else f"{figure['value']:.3f} ± {figure['se']:.3f}"


SAMPLES_PRINTED = 3
"""Rows of samples.jsonl to print."""

LONGEST_PRINTED = 400
"""Characters of a text to print; the rest is cut off."""


def print_samples(run_dir: Path, console: Console) -> None:
    """Print some responses before and after training; nothing if there are none."""
    samples = read_json_lines(run_dir / "samples.jsonl")
    if not samples:
        return
    table = Table("prompt", "reference", "policy", box=box.SIMPLE_HEAD, show_lines=True)
    for sample in samples[:SAMPLES_PRINTED]:
        cells = [Text(_short(sample.get("prompt")))]
        for who in ("reference", "policy"):
            cell = Text(_short(sample.get(who)))
            cells.append(cell.append(f"\n{scores(sample, who)}", style="dim"))
        table.add_row(*cells)
    console.print(table)


def _short(text: object) -> str:
    whole = clean(text or "(empty)")
    return whole if len(whole) <= LONGEST_PRINTED else whole[:LONGEST_PRINTED] + "…"
