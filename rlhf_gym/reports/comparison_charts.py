"""Plots of a comparison of algorithms."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf_gym.reports.charts import Chart
from rlhf_gym.reports.comparison_statistics import rliable
from rlhf_gym.reports.display import minus
from rlhf_gym.utils.arrays import Floats

LEAST_SHOWN = -0.2
"""Below this optimality a plot shows a number instead of a point."""


def plots(found: dict[str, Any], scores: dict[str, Floats]) -> Chart:
    """Plot IQM with intervals, performance profiles and probability of improvement."""
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
        if value < LEAST_SHOWN:  # a point would stretch the axis until the others overlap
            edge = axes.get_yaxis_transform()
            axes.text(
                0.02, at, f"◂ {minus(f'{value:.3f}')}", transform=edge, va="center", fontsize=8
            )
            continue
        axes.plot([low, high], [at, at], color="tab:blue", linewidth=4, alpha=0.4)
        axes.plot(value, at, "o", color="tab:blue", markersize=4)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.3)


def _profiles(axes: Axes, scores: dict[str, Floats]) -> None:
    library, _ = rliable()
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
