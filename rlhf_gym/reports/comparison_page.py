"""Results of a comparison of algorithms: compare.json, tables in Markdown, plots, one page."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf_gym.reports.charts import Chart
from rlhf_gym.reports.comparison_charts import plots
from rlhf_gym.reports.comparison_statistics import Rows, matrix, overall, statistics
from rlhf_gym.reports.display import minus, setting_rows
from rlhf_gym.reports.pages import render
from rlhf_gym.utils.files import write_json, write_text


@dataclass(frozen=True)
class EnvSection:
    """One environment on the page: its table, and a note with its reference points."""

    name: str
    head: list[str]
    rows: list[list[str]]
    note: str


def write_report(
    folder: Path,
    config: dict[str, Any],
    rows: Rows,
    scales: dict[str, dict[str, Any]],
    rates: dict[tuple[str, str], float],
) -> None:
    """Write compare.json, .md, .png and .html.

    Args:
        folder: Folder to write to.
        config: Options of the comparison.
        rows: Rows of results.csv, without the tuning trials.
        scales: For each environment, its reference points: J of the reference, J*, best-of-n.
        rates: For each environment and algorithm, the tuned multiple of its learning rate, or of
            the option that `config["tuned"]` names.
    """
    envs, algorithms = config["envs"], config["algorithms"]
    found = {
        "config": config,
        "environments": scales,
        "rows": [
            statistics(rows, env, algorithm, rates[env, algorithm])
            for env in envs
            for algorithm in algorithms
        ],
        "over_environments": overall(rows, envs, algorithms),
        "versions": {"python": sys.version.split()[0]}
        | {n: version(n) for n in ("torch", "transformers", "stable_baselines3", "rliable")},
    }
    write_json(folder / "compare.json", found)
    text = markdown(found)
    write_text(folder / "compare.md", text)
    chart = plots(found, matrix(rows, envs, algorithms))
    (folder / "compare.png").write_bytes(chart.png)
    write_text(folder / "compare.html", page(found, chart))
    print(text)


def page(found: dict[str, Any], chart: Chart) -> str:
    """Return the page.

    Args:
        found: The content of compare.json.
        chart: The plots.
    """
    head, rows = overall_table(found)
    context = {
        "title": "Comparison of algorithms",
        "chart": chart,
        "environments": [
            EnvSection(env, *env_table(found, env), note(scale))
            for env, scale in found["environments"].items()
        ],
        "overall_head": head,
        "overall_rows": rows,
        "configuration": setting_rows(found["config"]),
        "versions": setting_rows(found["versions"]),
    }
    return render("comparison_page.html", context)


def markdown(found: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = []
    for env, scale in found["environments"].items():
        head, body = env_table(found, env)
        lines += [f"### {env}", "", _line(head), "|" + "---|" * len(head), *map(_line, body), ""]
        lines += [note(scale), ""]
    head, body = overall_table(found)
    title = "### All environments" if len(found["environments"]) > 1 else "### In one figure"
    lines += [title, "", _line(head), "|" + "---|" * len(head), *map(_line, body)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def env_table(found: dict[str, Any], env: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of one environment's table, best algorithm first."""
    head = ["algorithm", "optimality (IQM)", "mean", "lowest", "score", "KL, nats"]
    head += ["tokens/s", "learning rate ×", "seeds"]
    rows = [row for row in found["rows"] if row["env"] == env]
    tuned = found["config"]["tuned"]  # by algorithm, the tuned option if not the learning rate
    with_gold = any("gold" in row for row in rows)
    if with_gold:
        head.insert(6, "gold")
    body = []
    for row in sorted(rows, key=lambda row: -row["iqm"]):
        name = row["algorithm"]
        multiple = f"{row['rate']:g}" + (f" ({tuned[name]})" if name in tuned else "")
        cells = [
            name,
            _range(row["iqm"], row["iqm_interval"]),
            _half(row["optimality"], row["optimality_interval"]),
            _number(row["lowest"]),
            _half(row["score"], row["score_interval"]),
            _half(row["kl"], row["kl_interval"], 2),
            f"{row['tokens'] / row['seconds']:,.0f}",
            multiple,
            str(row["seeds"]),
        ]
        if with_gold:
            cells.insert(6, _half(row["gold"], row["gold_interval"]) if "gold" in row else "–")
        body.append(cells)
    return head, body


def overall_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table over all environments, best algorithm first."""
    first = found["over_environments"][0]["algorithm"]
    head = ["algorithm", "optimality (IQM)", "mean", f"P(better than {first})"]
    body = [
        [
            row["algorithm"],
            _range(row["iqm"], row["iqm_interval"]),
            _range(row["mean"], row["mean_interval"]),
            _range(row["better_than_first"], row["better_interval"], 2)
            if "better_than_first" in row
            else "",
        ]
        for row in sorted(found["over_environments"], key=lambda row: -row["iqm"])
    ]
    return head, body


def note(scale: dict[str, Any]) -> str:
    """Return a sentence with an environment's reference points."""
    parts = [f"J of the reference {_number(scale['objective_reference'])}"]
    parts.append(f"J* {_number(scale['objective_optimum'])}")
    parts += [
        f"optimality of best-of-{n} {_number(value)}"
        for n, value in scale["best_of_n_optimality"].items()
    ]
    if scale["best_deterministic_optimality"] is not None:
        parts.append(
            f"of the best deterministic policy {_number(scale['best_deterministic_optimality'])}"
        )
    return ", ".join(parts) + "."


def _number(value: float, digits: int = 3) -> str:
    return minus(f"{value:.{digits}f}")


def _half(value: float, half: float, digits: int = 3) -> str:
    return f"{_number(value, digits)} ± {_number(half, digits)}"


def _range(value: float, ends: list[float], digits: int = 3) -> str:
    low, high = (_number(end, digits) for end in ends)
    return f"{_number(value, digits)} [{low}, {high}]"
