"""Results of a reward model's evaluation: a table for the terminal, and a page."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from rlhf_gym.reports.charts import BLUE, GREY, Chart, chart, dress
from rlhf_gym.reports.display import Passage, between, setting_rows, show
from rlhf_gym.reports.pages import render
from rlhf_gym.utils.statistics import Figure

MISTAKES_OPEN = 5
"""Mistakes shown at once; the others are folded away."""

RULES = {
    "longest": "always the longest",
    "bag_of_words": "bag of words",
    "chance": "chance",
}

COUNTS = {
    "whole": "read in full",
    "cut": "shortened by whole turns to fit the model's context",
    "dropped": "dropped because they do not fit it",
    "skipped": "rows of the data that are not a comparison (skipped)",
    "skipped_train": "rows skipped in the training data of the bag of words",
}
"""Counts of the evaluation, and their names on the page."""

MEASURED = ["95 % interval", "n"]
"""Names of the columns after each figure."""

SLICE_HEAD = ["top-1", *MEASURED, "chance"]


@dataclass(frozen=True)
class Text:
    """A text under its heading. For a candidate, also P(best) by the model; else empty."""

    heading: str
    passage: Passage
    probability: str = ""


@dataclass(frozen=True)
class Mistake:
    """A comparison that the model gets wrong: prompt, candidates, negative log-likelihood."""

    turns: list[Text]
    candidates: list[Text]
    nll: str


def summary(figures: dict[str, Any]) -> str:
    """Return one line with likelihood and calibration."""
    return (
        f"NLL {show(figures['nll'])} nats (uniform guess: "
        f"{show(figures['nll_uniform']['value'])}); expected calibration error "
        f"{show(figures['ece'])}"
    )


def terminal_table(figures: dict[str, Any]) -> Table:
    """Return a table for the terminal: the model, and the simple rules."""
    out = Table(title="accuracy, ± standard error and 95 % interval over prompts")
    out.add_column("")
    for heading in ("top-1", "pairwise", "model's lead", "n"):
        out.add_column(heading, justify="right")
    rows = {"reward model": figures}
    rows |= {RULES[name]: rule for name, rule in figures["rules"].items()}
    for name, row in rows.items():
        cells = [row["accuracy"], row["accuracy_pairwise"], row.get("lead")]
        shown = [f"{show(cell)}\n{between(cell)}" if cell else "" for cell in cells]
        out.add_row(name, *shown, show(row["accuracy"]["n"]), end_section=True)
    return out


def page(figures: dict[str, Any]) -> str:
    """Return the page; a section without content is left out.

    Args:
        figures: The content of reward_evaluation.json.
    """
    config, accuracy, rules = figures["config"], figures["accuracy"], figures["rules"]
    curve, shared = figures["reliability"], figures["annotator_agreement"]
    context = {
        "title": f"Reward model {config['reward_model']} on {config['data']}",
        "accuracy": show(accuracy),
        "accuracy_interval": between(accuracy),
        "accuracy_n": show(accuracy["n"]),
        "facts": [
            ("NLL, nats", show(figures["nll"])),
            ("NLL of a uniform guess", show(figures["nll_uniform"]["value"])),
            ("calibration error", show(figures["ece"])),
            ("comparisons", show(figures["comparisons"])),
            ("prompts", show(figures["prompts"])),
        ],
        "measured": MEASURED,
        "accuracies": [
            _accuracy_row("reward model", figures),
            *(_accuracy_row(RULES[name], rule) for name, rule in rules.items()),
        ],
        "leads": [[RULES[name], *_with_interval(rule["lead"])] for name, rule in rules.items()],
        "bag_of_words": _about_bag_of_words(figures),
        "ece": show(figures["ece"]),
        "reliability": _reliability(curve) if curve else None,
        "bins": [[show(row["said"]), show(row["was"]), show(row["n"])] for row in curve],
        "slice_head": SLICE_HEAD,
        "by_candidates": [[show(r["k"]), *_slice_cells(r)] for r in figures["by_candidates"]],
        "by_margin": list(_quarters(figures["by_margin"], show)),
        "by_length": list(_quarters(figures["by_length"], lambda x: show(round(x)))),
        "agreement": show(shared) if shared is not None else "",
        "agreement_interval": between(shared) if shared is not None else "",
        "agreement_n": show(shared["n"]) if shared is not None else "",
        "mistakes": [_mistake(one) for one in figures["mistakes"]],
        "mistakes_open": MISTAKES_OPEN,
        "judged": _judged_rows(figures),
        "configuration": setting_rows(config),
    }
    return render("reward_model_page.html", context)


def _accuracy_row(name: str, row: dict[str, Any]) -> list[str]:
    """Return the cells with both accuracies of a model or a rule."""
    return [name, *_with_interval(row["accuracy"]), *_with_interval(row["accuracy_pairwise"])]


def _with_interval(figure: Figure) -> list[str]:
    """Return three cells: a figure, its interval, and the number of values in its mean."""
    return [show(figure), between(figure), show(figure["n"])]


def _about_bag_of_words(figures: dict[str, Any]) -> str:
    """Say what the bag of words was fitted to, or why it is missing."""
    learnt = figures["bag_of_words_learnt_from"]
    if "bag_of_words" in figures["rules"]:
        return (
            f"The bag of words is a Bradley–Terry model that sees only the words of the "
            f"candidates. It is fitted to {show(learnt)} other comparisons."
        )
    if learnt:
        return "The bag of words is left out: there are too few preferences to fit it to."
    return (
        "The bag of words is left out: it must be fitted to other comparisons; use --held-out or "
        "--train-data."
    )


def _reliability(curve: list[dict[str, Any]]) -> Chart:
    """Plot how often candidates were preferred against the model's probability of it."""
    title = "Reliability of P(best)"

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.1, label="calibrated")
        said, was, n = (np.array([row[key] for row in curve]) for key in ("said", "was", "n"))
        axes.plot(said, was, color=BLUE, linewidth=1.2)
        axes.scatter(said, was, s=12 + 120 * n / n.max(), color=BLUE, alpha=0.7, label="model")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        dress(axes, title, "mean P(best) by the model")
        axes.set_ylabel("share preferred by people", fontsize=9)

    return chart(draw, f"{title}: {len(curve)} bins")


def _quarters(rows: list[dict[str, Any]], digits: Callable[[float], str]) -> Iterator[list[str]]:
    """Yield the rows of quartile slices; `digits` formats the ends of each range."""
    for row in rows:
        yield [f"{digits(row['from'])} to {digits(row['to'])}", *_slice_cells(row)]


def _slice_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a slice, after its name."""
    return [*_with_interval(row["accuracy"]), show(row["chance"])]


def _mistake(one: dict[str, Any]) -> Mistake:
    highest = max(one["probabilities"])
    candidates = []
    for i, (text, said) in enumerate(zip(one["candidates"], one["probabilities"], strict=True)):
        marks = ["people's choice"] * (i in one["preferred"]) + ["model's choice"] * (
            said == highest
        )
        heading = " · ".join([f"candidate {i + 1}", *marks])
        candidates.append(Text(heading, Passage.of(text.strip()), show(said)))
    return Mistake(_turns(one["prompt"]), candidates, show(one["nll"]))


def _turns(prompt: str | list[dict[str, Any]]) -> list[Text]:
    """Return a prompt as one text, or as one text per message."""
    if isinstance(prompt, str):
        return [Text("prompt", Passage.of(prompt.strip()))]
    return [Text(turn["role"], Passage.of(str(turn["content"]).strip())) for turn in prompt]


def _judged_rows(figures: dict[str, Any]) -> list[list[str]]:
    """Return the counts of judged, shortened and skipped comparisons."""
    counts = figures["counts"]
    rows = [[name, show(counts[key])] for key, name in COUNTS.items() if key in counts]
    none = show(figures["without_preference"])
    return [*rows, ["judged without a preference (they count only for NLL)", none]]
