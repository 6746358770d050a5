"""Charts of a run: learning curves, diagnostics of the update, and the optimality bar."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from rlhf_gym.reports.charts import BLUE, GREEN, GREY, ORANGE, Chart, Draw, chart, dress
from rlhf_gym.reports.display import measured_on, show
from rlhf_gym.reports.run_files import Run
from rlhf_gym.utils.arrays import Floats

BAR_LIMITS = (-1.0, 1.5)
"""Optimality outside these limits is drawn at the edge, so that the rest stays readable."""


@dataclass(frozen=True)
class Panel:
    """A learning curve: column of metrics.csv, title, and name of the held-out figure (if any)."""

    column: str
    title: str
    held_out: str = ""


CURVES = (
    Panel("rollout/objective", "Objective (score − kl_coef · KL)", "objective"),
    Panel("rollout/score", "Score", "score"),
    Panel("rollout/kl_per_sequence", "KL to the reference (nats per sequence)", "kl"),
    Panel("rollout/length", "Response length (tokens)", "length"),
    Panel("rollout/stopped", "Share of responses that end with an EOS", "stopped"),
    Panel("rollout/optimality", "Optimality", "optimality"),
)


DIAGNOSTICS = (
    Panel("rollout/entropy_estimate", "Entropy, estimated (nats per token)"),
    Panel("train/clip_fraction", "Share of clipped ratios"),
    Panel("train/ratio_max", "Largest ratio to the policy before the update"),
    Panel("train/ratio_min", "Smallest ratio to the policy before the update"),
    Panel("train/kl_old", "KL to the policy before the update (nats)"),
    Panel("train/explained_variance", "Explained variance of the values"),
    Panel("train/learning_rate", "Learning rate"),
    Panel("time/tokens_per_second", "Tokens per second, whole iterations"),
)


def curves(run: Run) -> list[tuple[str, Draw]]:
    """Return title and drawing function of each learning curve that the metrics have data for."""
    drawn = [(panel.title, _curve(run, panel)) for panel in CURVES if _has(run, panel.column)]
    if _has(run, "rollout/score") and _has(run, "rollout/kl_per_sequence"):
        title = "Score against KL"
        drawn.insert(3, (title, lambda axes: _score_against_kl(run, axes, title)))
    return drawn


def diagnostics(run: Run) -> list[Chart]:
    """Draw the update diagnostics that the metrics have data for."""
    known = [panel for panel in DIAGNOSTICS if _has(run, panel.column)]
    return [chart(_curve(run, panel), panel.title) for panel in known]


def _has(run: Run, column: str) -> bool:
    return bool(np.isfinite(run.metrics.get(column, np.empty(0))).any())


def _curve(run: Run, panel: Panel) -> Draw:
    def draw(axes: Axes) -> None:
        values = run.metrics[panel.column]
        tokens = run.metrics.get("tokens", np.arange(1.0, len(values) + 1))
        known = np.isfinite(values) & np.isfinite(tokens)
        x, y = tokens[known], values[known]
        axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=0.9)
        axes.plot(x, _running_mean(y), color=BLUE, linewidth=1.8)
        if len(x) and panel.held_out:
            _held_out_marks(run, panel.held_out, axes, float(x[-1]))
        x_label = "training tokens" if "tokens" in run.metrics else "updates"
        dress(axes, panel.title, x_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    return draw


def _held_out_marks(run: Run, name: str, axes: Axes, end: float) -> None:
    before, after, optimum = run.held_out(name)
    for figure, label, color in ((before, "reference", GREY), (optimum, "optimum", GREEN)):
        if figure:
            axes.axhline(figure["value"], color=color, linestyle="--", linewidth=1.1, label=label)
    if after:
        _point(axes, end, after, label=_after(run), color=ORANGE, marker="o")


def _after(run: Run) -> str:
    """Name the mark of the trained policy, which is not held out if all prompts were measured."""
    is_held_out = measured_on(run.evaluation) == "held-out prompts"
    return "policy, held out" if is_held_out else "policy, evaluated"


def _point(axes: Axes, x: float, figure: dict[str, float], **style: Any) -> None:
    """Draw a measured figure, with its standard error if that is known."""
    style |= {"linestyle": "none", "markersize": 5.5, "capsize": 2.5, "zorder": 3}
    axes.errorbar([x], [figure["value"]], yerr=[[_error(figure)], [_error(figure)]], **style)


def _error(figure: dict[str, float]) -> float:
    se = figure.get("se")
    return float(se) if se is not None and np.isfinite(se) else 0.0


def _score_against_kl(run: Run, axes: Axes, title: str) -> None:
    kl, score = run.metrics["rollout/kl_per_sequence"], run.metrics["rollout/score"]
    known = np.isfinite(kl) & np.isfinite(score)
    kl, score = kl[known], score[known]
    axes.plot(kl, score, color=BLUE, alpha=0.3, linestyle="none", marker=".", markersize=4)
    axes.plot(_running_mean(kl), _running_mean(score), color=BLUE, linewidth=1.8)
    marks = (("reference", GREY, "s"), (_after(run), ORANGE, "o"), ("optimum", GREEN, "D"))
    places = zip(run.held_out("kl"), run.held_out("score"), marks, strict=True)
    for x, y, (label, color, marker) in places:
        if x and y:
            _point(axes, x["value"], y, xerr=_error(x), label=label, color=color, marker=marker)
    dress(axes, title, "KL to the reference (nats per sequence)")
    axes.set_ylabel("score", fontsize=9)


def _running_mean(values: Floats) -> Floats:
    """Return the mean over a window of a twentieth of the curve around each point."""
    kernel = np.ones(max(len(values) // 20, 1))
    if not len(values):
        return values
    sums: Floats = np.convolve(values, kernel, "same")
    return sums / np.convolve(np.ones(len(values)), kernel, "same")


def bar(run: Run) -> Chart | None:
    """Draw optimality between the reference (0) and the optimum (1); None if it is unknown."""
    found = run.optimality
    if not found:
        return None
    value = _on_bar(found["value"])
    ends = [_on_bar(found.get(end), value) for end in ("low", "high")]
    marks = [
        (f"best-of-{k}", _on_bar(mark["value"]))
        for k, mark in (run.evaluation.get("best_of_n_optimality") or {}).items()
    ]

    def draw(axes: Axes) -> None:
        _draw_bar(axes, value, ends, marks)

    alt = f"Optimality {show(found)} on a bar from the reference, 0, to the optimum, 1"
    return chart(draw, alt, 4.8, 1.45)


def _draw_bar(axes: Axes, value: float, ends: list[float], marks: list[tuple[str, float]]) -> None:
    axes.barh(0, 1, height=0.5, color="#e5e7eb")
    axes.barh(0, value, height=0.5, color=BLUE)
    errors = [[max(value - ends[0], 0)], [max(ends[1] - value, 0)]]
    axes.errorbar([value], [0], xerr=errors, color="black", capsize=4, linewidth=1.3)
    for i, (label, x) in enumerate(marks):
        # Each label has its own height, so that labels never overlap.
        axes.plot([x, x], [-0.25, 0.42 + 0.3 * i], color=ORANGE, linewidth=1.3)
        axes.text(x, 0.44 + 0.3 * i, label, color=ORANGE, fontsize=9, ha="center", va="bottom")
    drawn = [0.0, 1.0, value, *ends, *(x for _, x in marks)]
    axes.set_xlim(min(drawn) - 0.08, max(drawn) + 0.08)
    axes.set_ylim(-0.3, 0.75 + 0.3 * len(marks))
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nreference", "0.25", "0.5", "0.75", "1\noptimum"])
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _on_bar(value: float | None, unknown: float = 0.0) -> float:
    known = value if value is not None and np.isfinite(value) else unknown
    return float(np.clip(known, *BAR_LIMITS))
