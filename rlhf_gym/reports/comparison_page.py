"""What a comparison of algorithms comes to: statistics by rliable, tables, plots, one page."""

import io
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf_gym.errors import InputError
from rlhf_gym.reports.html import Chart, document, image, paragraph, section, settings, table
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.files import write_json, write_text
from rlhf_gym.utils.statistics import interval

Rows = list[dict[str, str]]

REPETITIONS = 2000
"""Samples of the bootstrap."""

MEASURES = ("optimality", "score", "kl", "gold", "tokens", "seconds")


def write_report(
    folder: Path,
    config: dict[str, Any],
    rows: Rows,
    scales: dict[str, dict[str, Any]],
    rates: dict[tuple[str, str], float],
) -> None:
    """Write compare.json, .md, .png and .html.

    Args:
        folder: Where to.
        config: Options of the comparison.
        rows: Rows of results.csv, the trials of tuning left out.
        scales: For each environment, what its figures are held against.
        rates: For each environment and algorithm, the multiple of its learning rate, or of what
            `config["tuned"]` names.
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


def statistics(rows: Rows, env: str, algorithm: str, rate: float) -> dict[str, Any]:
    """Means over seeds with 95 % t intervals, and the IQM of optimality with a bootstrap's."""
    ours = [r for r in rows if (r["env"], r["algorithm"]) == (env, algorithm)]
    out: dict[str, Any] = {"env": env, "algorithm": algorithm, "rate": rate, "seeds": len(ours)}
    for name in MEASURES:
        values = np.array([float(r[name]) for r in ours if r[name]])
        if len(values):
            out[name], out[f"{name}_interval"] = float(values.mean()), interval(values)
    scores = matrix(rows, [env], [algorithm])
    out["iqm"], out["iqm_interval"] = _bootstrap(scores, "aggregate_iqm")[algorithm]
    out["lowest"] = float(scores[algorithm].min())
    return out


def matrix(rows: Rows, envs: Iterable[str], algorithms: Iterable[str]) -> dict[str, Floats]:
    """Optimality of each algorithm as (seeds, environments)."""
    out = {}
    for algorithm in algorithms:
        columns = [
            {
                int(r["seed"]): float(r["optimality"])
                for r in rows
                if (r["env"], r["algorithm"]) == (env, algorithm)
            }
            for env in envs
        ]
        seeds = sorted(set.intersection(*(set(column) for column in columns)))
        out[algorithm] = np.array([[column[seed] for column in columns] for seed in seeds])
    return out


def overall(rows: Rows, envs: list[str], algorithms: list[str]) -> list[dict[str, Any]]:
    """IQM over all environments, and the probability of improvement over the first algorithm."""
    scores = matrix(rows, envs, algorithms)
    iqm, mean = _bootstrap(scores, "aggregate_iqm"), _bootstrap(scores, "aggregate_mean")
    first = algorithms[0]
    against = {f"{a},{first}": (scores[a], scores[first]) for a in algorithms if a != first}
    better = _bootstrap(against, "probability_of_improvement") if against else {}
    out = []
    for name in algorithms:
        row: dict[str, Any] = {"algorithm": name}
        row["iqm"], row["iqm_interval"] = iqm[name]
        row["mean"], row["mean_interval"] = mean[name]
        if name != first:
            row["better_than_first"], row["better_interval"] = better[f"{name},{first}"]
        out.append(row)
    return out


def _bootstrap(scores: dict[str, Any], measure: str) -> dict[str, tuple[float, list[float]]]:
    """A measure of rliable and its 95 % interval by stratified bootstrap over seeds."""
    library, metrics = _rliable()
    work: Callable[..., Any] = getattr(metrics, measure)
    points, ends = library.get_interval_estimates(
        scores,
        lambda *arrays: np.array([work(*arrays)]),
        reps=REPETITIONS,
        random_state=np.random.RandomState(0),
    )
    return {k: (float(v[0]), [float(e) for e in ends[k][:, 0]]) for k, v in points.items()}


def _rliable() -> tuple[Any, Any]:
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise InputError(
            f"the statistics need rliable ({error}): pip install 'rlhf-gym[compare]', and run the "
            "same command again; no run is lost"
        ) from error
    return library, metrics


def markdown(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
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
    """Head and rows of one environment's table, the best first."""
    head = ["algorithm", "optimality (IQM)", "mean", "lowest", "score", "KL, nats"]
    head += ["tokens/s", "learning rate ×", "seeds"]
    rows = [row for row in found["rows"] if row["env"] == env]
    tuned = found["config"]["tuned"]  # what was multiplied where not the learning rate
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
    """Head and rows of the table over all environments, the best first."""
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
    """What an environment's figures are held against, in a sentence."""
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
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _half(value: float, half: float, digits: int = 3) -> str:
    return f"{_number(value, digits)} ± {_number(half, digits)}"


def _range(value: float, ends: list[float], digits: int = 3) -> str:
    low, high = (_number(end, digits) for end in ends)
    return f"{_number(value, digits)} [{low}, {high}]"


LEAST_SHOWN = -0.2
"""Optimality below which a plot gives a number in place of a point."""


def plots(found: dict[str, Any], scores: dict[str, Floats]) -> Chart:
    """IQM with intervals, performance profiles, probability of improvement."""
    figure = Figure(figsize=(12, 1.6 + 0.28 * max(len(scores), 6)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    rows = sorted(found["over_environments"], key=lambda row: row["iqm"])
    _bars(left, [(r["algorithm"], r["iqm"], r["iqm_interval"]) for r in rows])
    left.set_xlabel("optimality, IQM")
    _profiles(middle, scores)
    others = [row for row in rows if "better_than_first" in row]
    _bars(right, [(r["algorithm"], r["better_than_first"], r["better_interval"]) for r in others])
    right.axvline(0.5, color="0.6", linewidth=0.8)
    right.set_xlim(-0.02, 1.02)
    right.set_xlabel(f"P(better than {found['over_environments'][0]['algorithm']})")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    alt = "IQM of optimality, performance profiles and probability of improvement; see the tables"
    return Chart(buffer.getvalue(), alt)


def _bars(axes: Axes, rows: list[tuple[str, float, list[float]]]) -> None:
    for at, (_, value, (low, high)) in enumerate(rows):
        if value < LEAST_SHOWN:  # the others would lie on one another
            edge = axes.get_yaxis_transform()
            axes.text(0.02, at, f"◂ {_number(value)}", transform=edge, va="center", fontsize=8)
            continue
        axes.plot([low, high], [at, at], color="tab:blue", linewidth=4, alpha=0.4)
        axes.plot(value, at, "o", color="tab:blue", markersize=4)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.3)


def _profiles(axes: Axes, scores: dict[str, Floats]) -> None:
    library, _ = _rliable()
    shown = np.concatenate([values.flatten() for values in scores.values()])
    shown = shown[shown >= LEAST_SHOWN]
    taus = np.linspace(shown.min(initial=1.0) - 0.02, 1, 61)
    lines, _ = library.create_performance_profile(scores, taus, reps=2)
    for i, (name, line) in enumerate(lines.items()):
        style = ("-", "--", ":")[i // 10 % 3]
        axes.plot(taus, line, style, label=name, linewidth=1.2)
    axes.set_xlabel("optimality τ")
    axes.set_ylabel("share of runs above τ")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)


def page(found: dict[str, Any], chart: Chart) -> str:
    """One page of HTML that needs no network."""
    sections = [section("In pictures", image(chart, "wide"))]
    for env, scale in found["environments"].items():
        sections.append(
            section(env, table(*env_table(found, env), "figures"), paragraph(note(scale)))
        )
    sections.append(section("All environments", table(*overall_table(found), "figures")))
    sections.append(settings("Configuration", [found["config"]]))
    sections.append(settings("Versions", [found["versions"]]))
    return document("Comparison of algorithms", *sections)
