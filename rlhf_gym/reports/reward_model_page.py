"""The page on a reward model."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from rlhf_gym.reports.charts import BLUE, GREY, chart, dress
from rlhf_gym.reports.html import (
    document,
    escape,
    facts,
    fold,
    image,
    paragraph,
    section,
    settings,
    show,
    table,
)
from rlhf_gym.utils.statistics import Figure

MISTAKES_OPEN = 5
"""Mistakes shown at once; the others are folded away."""


RULES = {
    "longest": "always the longest",
    "bag_of_words": "bag of words",
    "chance": "chance",
}


def summary(figures: dict[str, Any]) -> str:
    """One line: likelihood and calibration."""
    return (
        f"NLL {show(figures['nll'])} nats, of a uniform guess "
        f"{show(figures['nll_uniform']['value'])}; expected calibration error "
        f"{show(figures['ece'])}"
    )


def terminal_table(figures: dict[str, Any]) -> Table:
    """Model and rules on the terminal."""
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


def between(figure: Figure) -> str:
    """The 95 % interval of a figure, or nothing where it has none."""
    if figure.get("low") is None:
        return ""
    return f"{figure['low']:.3f} to {figure['high']:.3f}".replace("-", "\N{MINUS SIGN}")


def page(figures: dict[str, Any]) -> str:
    """The report of these figures, a whole HTML page."""
    config = figures["config"]
    return document(
        f"Reward model {config['reward_model']} on {config['data']}",
        headline(figures),
        beside_rules(figures),
        reliability(figures),
        slices(figures),
        annotators(figures["annotator_agreement"]),
        mistakes(figures["mistakes"]),
        what_was_judged(figures),
        settings("Configuration", [config]),
    )


def headline(figures: dict[str, Any]) -> str:
    """Accuracy, likelihood and calibration."""
    accuracy = figures["accuracy"]
    return section(
        "Accuracy",
        f'<p class="headline"><strong>{escape(show(accuracy))}</strong> top-1 accuracy '
        f"<span>95 % interval {escape(between(accuracy))}, {escape(show(accuracy['n']))} "
        "comparisons</span></p>",
        paragraph(
            "How often the model's highest logit belongs to a candidate that people preferred; "
            "equal logits share. Standard errors and 95 % intervals, here and below, are by "
            "bootstrap over prompts, since comparisons on one prompt are not independent."
        ),
        facts(
            {
                "NLL, nats": show(figures["nll"]),
                "of a uniform guess": show(figures["nll_uniform"]["value"]),
                "calibration error": show(figures["ece"]),
                "comparisons": show(figures["comparisons"]),
                "prompts": show(figures["prompts"]),
            }
        ),
        paragraph(
            "NLL is the negative log-likelihood of what people said of a comparison. A uniform "
            "guess has log K for a single choice among K candidates, and more for a ranking, which "
            "is a choice for each place."
        ),
    )


def beside_rules(figures: dict[str, Any]) -> str:
    """The model beside rules that take no reward model, on the same comparisons."""
    rows, leads = [accuracy_row("reward model", figures)], []
    for name, rule in figures["rules"].items():
        rows.append(accuracy_row(RULES[name], rule))
        leads.append([RULES[name], *with_interval(rule["lead"])])
    measured = ["95 % interval", "n"]
    return section(
        "Beside plain rules",
        table(["", "top-1", *measured, "pairwise", *measured], rows, "figures"),
        paragraph(
            "Pairwise: the share of the pairs that a label implies in the right order, a mean over "
            "comparisons; equal logits count half."
        ),
        paragraph(why_no_bag(figures)),
        paragraph(
            "The model's lead in top-1 accuracy over each rule, comparison by comparison: its "
            "interval is that of the differences."
        ),
        table(["", "lead", *measured], leads, "figures"),
    )


def accuracy_row(name: str, row: dict[str, Any]) -> list[str]:
    """Both accuracies of a model or a rule."""
    return [name, *with_interval(row["accuracy"]), *with_interval(row["accuracy_pairwise"])]


def with_interval(figure: Figure) -> list[str]:
    """Three cells: a figure, its interval, and how many it is of."""
    return [show(figure), between(figure), show(figure["n"])]


def why_no_bag(figures: dict[str, Any]) -> str:
    """What the bag of words was fitted to, or why there is none."""
    learnt = figures["bag_of_words_learnt_from"]
    if "bag_of_words" in figures["rules"]:
        return (
            f"The bag of words, a Bradley–Terry model on the words of the candidates alone, is "
            f"fitted to {show(learnt)} other comparisons."
        )
    if learnt:
        return "The bag of words is left out: too few preferences were given to fit it to."
    return (
        "The bag of words is left out: it must be fitted to other comparisons; --held-out or "
        "--train-data gives it some."
    )


def reliability(figures: dict[str, Any]) -> str:
    """How far the model's probabilities can be believed."""
    curve = figures["reliability"]
    if not curve:
        return ""
    title = "Reliability of P(best)"

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.1, label="calibrated")
        said, was, n = (np.array([row[key] for row in curve]) for key in ("said", "was", "n"))
        axes.plot(said, was, color=BLUE, linewidth=1.2)
        axes.scatter(said, was, s=12 + 120 * n / n.max(), color=BLUE, alpha=0.7, label="model")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        dress(axes, title, "mean P(best) that the model gives")
        axes.set_ylabel("share that people preferred", fontsize=9)

    rows = [[show(row["said"]), show(row["was"]), show(row["n"])] for row in curve]
    bins = table(["model says", "people preferred", "candidates"], rows, "figures")
    return section(
        "Calibration",
        paragraph(
            f"Expected calibration error {show(figures['ece'])}: the mean gap between the "
            "probability that the model gives a candidate and how often such candidates were "
            "preferred, over ten bins of equal width. Larger dots hold more candidates."
        ),
        image(chart(draw, f"{title}: {len(curve)} bins"), "bar"),
        f"<details><summary>The bins</summary>{bins}</details>",
    )


SLICE_HEAD = ("top-1", "95 % interval", "n", "chance")


def slices(figures: dict[str, Any]) -> str:
    """Accuracy by kind of comparison."""

    def quarters(name: str, unit: str, digits: Callable[[float], str] = show) -> str:
        rows = [
            [f"{digits(row['from'])} to {digits(row['to'])}", *slice_cells(row)]
            for row in figures[name]
        ]
        return table([unit, *SLICE_HEAD], rows, "figures")

    sizes = [[show(row["k"]), *slice_cells(row)] for row in figures["by_candidates"]]
    return section(
        "Where it is right",
        paragraph("Top-1 accuracy by the number of candidates."),
        table(["candidates", *SLICE_HEAD], sizes, "figures"),
        paragraph(
            "By the model's own margin, its highest logit less the second, in quarters: a model "
            "that knows what it knows is right more often where its margin is wide."
        ),
        quarters("by_margin", "margin, logits"),
        paragraph(
            "By length, in quarters: characters of the preferred candidate less the mean of the "
            "others. A model that goes by length fails at one of the ends."
        ),
        quarters("by_length", "length difference, characters", lambda x: show(round(x))),
    )


def slice_cells(row: dict[str, Any]) -> list[str]:
    """Cells of a slice, behind its name."""
    return [*with_interval(row["accuracy"]), show(row["chance"])]


def annotators(shared: Figure | None) -> str:
    """How far people agree with each other."""
    if shared is None:
        return ""
    return section(
        "Between annotators",
        paragraph(
            f"Two annotators of one comparison say the same with a chance of {show(shared)} "
            f"(95 % interval {between(shared)}, {show(shared['n'])} comparisons with two or more "
            "votes); finding a tie is one of the answers that they can give."
        ),
    )


def mistakes(found: Sequence[dict[str, Any]]) -> str:
    """The mistakes to read."""
    if not found:
        return ""
    cards = [card(one) for one in found]
    rest = "".join(cards[MISTAKES_OPEN:])
    more = f"<details><summary>{len(cards) - MISTAKES_OPEN} more</summary>{rest}</details>"
    return section(
        "Worst mistakes",
        paragraph(
            "Comparisons whose highest logit is not on a preferred candidate, the least likely "
            "choices first, each candidate with the model's probability that it is the best."
        ),
        *cards[:MISTAKES_OPEN],
        more if rest else "",
    )


def card(one: dict[str, Any]) -> str:
    """A mistake: the prompt, and the candidates side by side."""
    highest = max(one["probabilities"])
    candidates = []
    for i, (text, said) in enumerate(zip(one["candidates"], one["probabilities"], strict=True)):
        marks = ["people's choice"] * (i in one["preferred"]) + ["model's choice"] * (
            said == highest
        )
        name = " · ".join([f"candidate {i + 1}", *marks])
        candidates.append(
            f"<div><h3>{escape(name)}</h3>{fold(text.strip())}"
            f'<p class="score">P(best) {escape(show(said))}</p></div>'
        )
    return (
        f'<article>{turns(one["prompt"])}<div class="pair">{"".join(candidates)}</div>'
        f'<p class="score">NLL {escape(show(one["nll"]))} nats</p></article>'
    )


def turns(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text, or message by message."""
    if isinstance(prompt, str):
        return f"<h3>prompt</h3>{fold(prompt.strip())}"
    return "".join(
        f"<h3>{escape(message['role'])}</h3>{fold(str(message['content']).strip())}"
        for message in prompt
    )


def what_was_judged(figures: dict[str, Any]) -> str:
    """What of the data was judged, and what was left out."""
    counts = figures["counts"]
    names = {
        "whole": "read as they are",
        "cut": "cut by whole turns to fit the model's context",
        "dropped": "dropped as too long for it",
        "skipped": "rows of the data skipped as no comparison",
        "skipped_train": "rows skipped in what the bag of words is fitted to",
    }
    rows = [[name, show(counts[key])] for key, name in names.items() if key in counts]
    none = show(figures["without_preference"])
    rows.append(["judged that prefer no candidate, and count for NLL alone", none])
    return section("What was judged", table(["comparisons", "number"], rows, "figures"))
