"""`python scripts/report.py --run-dir DIR` writes the report of a run into its folder.

Writes report.html (one file, readable without a network) and curves.png (the learning curves).
The folder is one of rlhf.py, train_policy.py or evaluate.py. Reads summary.json, evaluation.json,
metrics.csv, policy.json, reward_model.json, samples.jsonl, training_samples.jsonl, config.json and
evaluation_config.json where they are there: a file that is not leaves its section out.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _report_html import Chart, Run, clean, page, scores, show
from _report_tokens import STYLE as INSPECTOR_STYLE
from _report_tokens import inspector
from common import run as run_script
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import EngFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_gym.errors import InputError
from rlhf_gym.files import read_json, write_text

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Draw = Callable[[Axes], None]

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c4601a", "#2c7a4b", "#6b7280"

RESULTS = ("summary.json", "evaluation.json", "metrics.csv")
"""Files that a report can be made of, each by itself."""

DPI = 160

BAR_LIMITS = (-1.0, 1.5)
"""Optimality beyond these is drawn at the edge, so that the rest stays readable."""

SAMPLES_PRINTED = 3
LONGEST_PRINTED = 400


@dataclass(frozen=True)
class Config:
    """Options of the script."""

    run_dir: Path
    """Folder of the run."""


@dataclass(frozen=True)
class Panel:
    """A learning curve: a column of metrics.csv, its title, and its figure on held-out prompts."""

    column: str
    title: str
    held_out: str = ""


CURVES = (
    Panel("rollout/objective", "Objective (score − kl_coef · KL)", "objective"),
    Panel("rollout/score", "Score", "score"),
    Panel("rollout/kl_per_sequence", "KL to the reference (nats a sequence)", "kl"),
    Panel("rollout/length", "Response length (tokens)", "length"),
    Panel("rollout/stopped", "Share of responses that an EOS ends", "stopped"),
    Panel("rollout/optimality", "Optimality", "optimality"),
)

DIAGNOSTICS = (
    Panel("rollout/entropy_estimate", "Entropy, estimated (nats a token)"),
    Panel("train/clip_fraction", "Share of clipped ratios"),
    Panel("train/ratio_max", "Largest ratio to the policy before the update"),
    Panel("train/ratio_min", "Smallest ratio to the policy before the update"),
    Panel("train/kl_old", "KL to the policy before the update (nats)"),
    Panel("train/explained_variance", "Explained variance of the values"),
    Panel("train/learning_rate", "Learning rate"),
    Panel("time/tokens_per_second", "Tokens a second, whole iterations"),
)


def main(config: Config) -> None:
    """Write the report and say where."""
    print(f"report: {write_report(config.run_dir)}")


def write_report(run_dir: Path) -> Path:
    """Write report.html, and curves.png where there are metrics, into a run folder.

    Args:
        run_dir: Folder of a run.

    Returns:
        The file report.html.

    Raises:
        InputError: There is nothing to report, or one of the files cannot be read.
    """
    run = read_run(run_dir)
    curves = [(title, _pixels(draw)) for title, draw in _curves(run)]
    if curves:
        (run_dir / "curves.png").write_bytes(_png(_tiled([pixels for _, pixels in curves])))
    diagnostics = [p for p in DIAGNOSTICS if _has(run, p.column)]
    text = page(
        run,
        _bar(run),
        [Chart(_png(pixels), title) for title, pixels in curves],
        [chart(_curve(run, panel), panel.title) for panel in diagnostics],
        inspector(run.training_samples),
        INSPECTOR_STYLE,
    )
    file = run_dir / "report.html"
    write_text(file, text)
    return file


def print_samples(run_dir: Path, console: Console) -> None:
    """Print some responses before and after training, or nothing where there are none."""
    samples = _read_rows(run_dir / "samples.jsonl")
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


def read_run(run_dir: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: There is nothing to report, or one of the files cannot be read.
    """
    if not any((run_dir / name).exists() for name in RESULTS):
        raise InputError(
            f"{run_dir} has none of {', '.join(RESULTS)}; --run-dir is the folder of a run"
        )
    config = _read_json(run_dir / "config.json") or _read_json(run_dir / "evaluation_config.json")
    return Run(
        # What rlhf.py sums up other scripts leave in other files.
        summary={
            "env_id": config.get("env"),
            "algorithm": config.get("algorithm"),
            "seed": config.get("seed"),
            **_read_json(run_dir / "policy.json"),
            **_read_json(run_dir / "summary.json"),
        },
        evaluation=_read_json(run_dir / "evaluation.json"),
        reward_model=_read_json(run_dir / "reward_model.json"),
        config=config,
        samples=_read_rows(run_dir / "samples.jsonl"),
        metrics=_read_metrics(run_dir / "metrics.csv"),
        rounds=_read_rounds(run_dir / "rounds"),
        training_samples=_read_rows(run_dir / "training_samples.jsonl"),
    )


def _read_rounds(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*/round.json"), key=lambda file: int(file.parent.name))
    return [_read_json(file) for file in files]


def _read_json(file: Path) -> dict[str, Any]:
    return _object(file, read_json(file)) if file.exists() else {}


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for i, line in enumerate(_read_text(file).split("\n"), 1):
        try:
            rows += [_object(f"line {i} of {file}", json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(
                f"line {i} of {file} is not valid JSON ({error}); delete the file to do without it"
            ) from error
    return rows


def _object(where: object, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where} holds no JSON object; delete the file to make it anew")
    return values


def _read_text(file: Path) -> str:
    """The text of a file, or nothing where it is not there."""
    try:
        return file.read_text(encoding="utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {file}: {error}; delete the file to do without it"
        ) from error


def _read_metrics(file: Path) -> dict[str, Floats]:
    reader = csv.DictReader(io.StringIO(_read_text(file)))
    rows = list(reader)
    return {
        name: np.array([_number(row[name]) for row in rows]) for name in reader.fieldnames or ()
    }


def _number(cell: str | None) -> float:
    """A cell as a number; NaN where it is empty, cut off, infinite or a text."""
    try:
        value = float(cell or "nan")
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")


def _has(run: Run, column: str) -> bool:
    return bool(np.isfinite(run.metrics.get(column, np.empty(0))).any())


def _curves(run: Run) -> list[tuple[str, Draw]]:
    """The learning curves that the metrics allow: title and how to draw it."""
    drawn = [(panel.title, _curve(run, panel)) for panel in CURVES if _has(run, panel.column)]
    if _has(run, "rollout/score") and _has(run, "rollout/kl_per_sequence"):
        title = "Score against KL"
        drawn.insert(3, (title, lambda axes: _score_against_kl(run, axes, title)))
    return drawn


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
        _point(axes, end, after, label="policy, held out", color=ORANGE, marker="o")


def _point(axes: Axes, x: float, figure: dict[str, float], **style: Any) -> None:
    """A measured figure with its standard error, unless that is unknown."""
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
    marks = (("reference", GREY, "s"), ("policy, held out", ORANGE, "o"), ("optimum", GREEN, "D"))
    places = zip(run.held_out("kl"), run.held_out("score"), marks, strict=True)
    for x, y, (label, color, marker) in places:
        if x and y:
            _point(axes, x["value"], y, xerr=_error(x), label=label, color=color, marker=marker)
    dress(axes, title, "KL to the reference (nats a sequence)")
    axes.set_ylabel("score", fontsize=9)


def _running_mean(values: Floats) -> Floats:
    """Mean over a twentieth of the curve around each point."""
    kernel = np.ones(max(len(values) // 20, 1))
    if not len(values):
        return values
    sums: Floats = np.convolve(values, kernel, "same")
    return sums / np.convolve(np.ones(len(values)), kernel, "same")


def dress(axes: Axes, title: str, x_label: str) -> None:
    """Title, label, grid and legend, as on every chart."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        # Below the chart, where no curve can run through it.
        axes.legend(
            fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.19)
        )


def chart(draw: Draw, alt: str, width: float = 4.6, height: float = 3.2) -> Chart:
    """A chart for a page; sizes in inches."""
    return Chart(_png(_pixels(draw, width, height)), alt)


def _pixels(draw: Draw, width: float = 4.6, height: float = 3.2) -> Pixels:
    """Draw on white, (height, width, RGBA); sizes in inches."""
    # No pyplot: nothing global, no window, and safe beside the caller's own figures.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def _tiled(charts: list[Pixels]) -> Pixels:
    """Charts of one size, three abreast."""
    blank = np.full_like(charts[0], 255)
    columns = min(len(charts), 3)
    charts = charts + [blank] * (-len(charts) % columns)
    return np.vstack([np.hstack(charts[i : i + columns]) for i in range(0, len(charts), columns)])


def _bar(run: Run) -> Chart | None:
    """Optimality on the line from the reference, 0, to the optimum, 1."""
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
        # Labels at heights of their own never meet.
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


if __name__ == "__main__":
    run_script(main, Config, __doc__)
