"""Pages of reports, that of a run first: one HTML file each, style and charts inside, no script.

Every text goes through `escape`; what builds markup (`table`, `section`…) escapes the texts that it
is given, so markup never comes from a run folder.
"""

import base64
import html
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_gym.utils.statistics import Figure

SAMPLES_OPEN = 4
"""Samples shown at once; the others are folded away."""

LONGEST_OPEN = 600
"""Characters of a text that is shown at once; a longer one is folded behind so many."""

UNKNOWN = "–"


@dataclass(frozen=True)
class Run:
    """What a run folder holds; a file that is not there is empty here.

    Attributes:
        summary: summary.json, and what of it config.json and policy.json know.
        evaluation: evaluation.json.
        reward_model: reward_model.json.
        config: config.json.
        samples: Rows of samples.jsonl.
        metrics: Columns of metrics.csv, one value an update, NaN where a cell is empty.
        rounds: round.json of each earlier round of labelling, in turn.
        training_samples: Rows of training_samples.jsonl.
    """

    summary: dict[str, Any]
    evaluation: dict[str, Any]
    reward_model: dict[str, Any]
    config: dict[str, Any]
    samples: list[dict[str, Any]]
    metrics: dict[str, npt.NDArray[np.float64]]
    rounds: list[dict[str, Any]]
    training_samples: list[dict[str, Any]]

    def held_out(self, name: str) -> tuple[Figure | None, Figure | None, Figure | None]:
        """A figure of the reference, of the policy and of the optimum; None where unknown."""
        figures = {**self.evaluation, **self.summary}
        before, after = figures.get(f"{name}_before"), figures.get(f"{name}_after")
        if name == "optimality" and self.optimality:
            return {"value": 0.0}, self.optimality, {"value": 1.0}
        if name == "kl" and figures.get("kl"):
            before, after = {"value": 0.0, "se": 0.0}, figures["kl"]
        optimum = figures.get("objective_optimum")
        if name != "objective" and optimum:  # too few samples for J* are too few for these
            optimum = self.evaluation.get("optimum", {}).get(name)
        return before, after, optimum

    @property
    def optimality(self) -> Figure | None:
        """Optimality; None where it is unknown."""
        found = {**self.evaluation, **self.summary}.get("optimality")
        return found if found and math.isfinite(found["value"]) else None

    @property
    def name(self) -> str:
        """What was run, on one line."""
        parts = [self.summary.get("env_id"), self.summary.get("algorithm")]
        return " · ".join([*(str(p) for p in parts if p), f"seed {self.summary.get('seed')}"])


@dataclass(frozen=True)
class Chart:
    """A PNG and what it shows."""

    png: bytes
    alt: str


def clean(text: object) -> str:
    """A text with the characters that no page or terminal should get shown as �."""
    lines = str(text).replace("\r\n", "\n")
    kept = (c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "�" for c in lines)
    return "".join(kept)


def escape(text: object) -> str:
    """A text for a page, harmless anywhere in it."""
    return html.escape(clean(text))


def show(value: Any) -> str:
    """A plain number, a measured figure with its standard error, or a dash."""
    if isinstance(value, dict):
        return _show_figure(value)
    if value is None or not isinstance(value, (int, float)) or not math.isfinite(value):
        return UNKNOWN
    if isinstance(value, int) or abs(value) >= 1000:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.3g}")


def _show_figure(figure: Figure) -> str:
    value, se = figure.get("value"), figure.get("se")
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if se is None or not math.isfinite(se) or se <= 0:
        return show(float(value))
    # Two digits of the standard error say how many of the value mean anything.
    decimals = min(max(1 - math.floor(math.log10(se)), 0), 6)
    return _minus(f"{value:,.{decimals}f} ±\N{NO-BREAK SPACE}{se:,.{decimals}f}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def page(
    run: Run,
    bar: Chart | None,
    curves: Sequence[Chart],
    diagnostics: Sequence[Chart],
    inspector: str,
    style: str,
) -> str:
    """The whole page.

    Args:
        run: The run.
        bar: Optimality between reference and optimum; None where it is unknown.
        curves: Learning curves.
        diagnostics: Curves of the update itself.
        inspector: The section that shows the training's samples token by token.
        style: Its style.
    """
    sections = (
        _headline(run, bar),
        _figures(run),
        _curves(curves, diagnostics),
        _reward_model(run.reward_model),
        _rounds(run.rounds),
        _samples(run.samples),
        inspector,
        settings("Configuration", [run.config]),
        settings("Versions and hashes", [run.summary.get("versions"), run.summary.get("hashes")]),
    )
    return document(run.name, *sections, style=style)


def document(title: str, *sections: str, style: str = "") -> str:
    """A whole page of sections, empty ones left out, with a style beyond that of every page."""
    body = "\n".join(filter(None, sections))
    return PAGE.format(title=escape(title), style=STYLE + style, body=body)


def section(title: str, *parts: str) -> str:
    """A titled section of parts, which are markup already; empty ones are left out."""
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text, of a class of the style."""
    return f'<p class="{kind}">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """A table of texts; the first column names the row."""
    parts = [f'<div class="wide"><table class="{kind}">']
    if head:
        cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        parts.append(f"<thead><tr>{cells}</tr></thead>")
    for name, *values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        parts.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return "\n".join([*parts, "</table></div>"])


def image(chart: Chart, kind: str = "") -> str:
    """A chart inside the page, of a class of the style."""
    data = base64.b64encode(chart.png).decode("ascii")
    alt = escape(chart.alt)
    return f'<img class="{kind}" alt="{alt}" src="data:image/png;base64,{data}">'


def _headline(run: Run, bar: Chart | None) -> str:
    found = run.optimality
    if found:
        value = (
            f'<p class="headline"><strong>{escape(show(found))}</strong> optimality '
            f"<span>{escape(_interval(found))}</span></p>"
        )
    else:
        value = '<p class="headline"><strong>unknown</strong> optimality</p>'
    best_of = _best_of(run.evaluation.get("best_of_n_optimality") or {})
    return section(
        "Optimality",
        value,
        image(bar, "bar") if bar else paragraph(_why_unknown(run)),
        paragraph(WHAT_IS_OPTIMALITY),
        paragraph(best_of) if best_of else "",
        _run_facts(run.summary),
    )


def _interval(found: Figure) -> str:
    parts = []
    if found.get("low") is not None and found.get("high") is not None:
        parts.append(f"95 % interval {show(found['low'])} to {show(found['high'])}")
    if found.get("n") is not None:
        parts.append(f"{show(found['n'])} held-out prompts")
    return ", ".join(parts)


def _why_unknown(run: Run) -> str:
    if not run.evaluation and "optimality" not in run.summary:
        return "Nothing was measured on held-out prompts; scripts/evaluate.py measures the policy."
    ess = run.evaluation.get("optimum", {}).get("ess")
    if ess is None:
        return "The best possible objective of this run is not known, so neither is its optimality."
    return (
        f"The best possible objective could not be estimated: {show(ess)} effective samples a "
        "prompt are too few. A larger kl_coef or more evaluation samples would help."
    )


def _best_of(found: dict[str, Figure]) -> str:
    if not found:
        return ""
    reached = ", ".join(f"best-of-{k} reaches {show(figure)}" for k, figure in found.items())
    return (
        f"Without training, {reached}: of n responses of the reference, the one with the highest "
        "score is kept; its KL is counted as log n − (n − 1)/n nats a sequence, the most it can be."
    )


def _run_facts(summary: dict[str, Any]) -> str:
    if summary.get("tokens") is None:
        return ""  # no training of this folder's, or one that goes on
    return facts(
        {
            "episodes": show(summary.get("episodes")),
            "tokens": show(summary.get("tokens")),
            "time": _duration(summary.get("seconds")),
            "tokens/s": show(summary.get("tokens_per_second")),
        }
    )


def facts(values: dict[str, str]) -> str:
    """Short texts side by side, each under its name."""
    parts = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
        for name, text in values.items()
    ]
    return f'<dl class="facts">{"".join(parts)}</dl>'


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def _figures(run: Run) -> str:
    names = dict(FIGURES)
    # Pairs that this page has no name for keep their own.
    for key in run.evaluation:
        stem = key.removesuffix("_before")
        if stem != key and f"{stem}_after" in run.evaluation:
            names.setdefault(stem, stem.replace("_", " "))
    triples = [(label, run.held_out(name)) for name, label in names.items()]
    rows = [[label, *map(show, triple)] for label, triple in triples if any(triple)]
    rows += [
        [label, UNKNOWN, show(run.evaluation[name]), UNKNOWN]
        for name, label in AGAINST_REFERENCE
        if run.evaluation.get(name)
    ]
    if not rows:
        return ""
    return section(
        "Before and after",
        paragraph(
            "Means on held-out prompts ± their standard errors over prompts. The reference is the "
            "model before training, the policy the model after."
        ),
        table(["", "reference", "policy", "optimum"], rows, "figures"),
    )


def _curves(curves: Sequence[Chart], diagnostics: Sequence[Chart]) -> str:
    if not curves and not diagnostics:
        return ""
    folded = _charts(diagnostics)
    return section(
        "Learning curves",
        paragraph(
            "Lines are means over the responses of each update, to training prompts: faint as "
            "they came, bold as a running mean. Marks and dashed lines are measured on held-out "
            "prompts, marks with standard errors."
        ),
        _charts(curves),
        f"<details><summary>The update itself</summary>{folded}</details>" if folded else "",
    )


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    return f'<div class="charts">{"".join(image(chart) for chart in charts)}</div>'


def _rounds(rounds: Sequence[dict[str, Any]]) -> str:
    if not rounds:
        return ""
    columns = {
        "comparisons": "new comparisons",
        "score": "score by this round's reward model",
        "gold": "gold score",
        "accuracy_on_own_samples": "accuracy on the policy's samples",
        "accuracy": "accuracy on held-out comparisons",
    }
    return section(
        "Rounds of labelling",
        paragraph(
            "What the policy of each earlier round wrote, judged by the reward model that it "
            "learned from and by the choices that people then made among its samples. A score "
            "that rises while the gold score does not, or an accuracy on the policy's own samples "
            "far below the held-out one, is reward hacking; the next round's model learns from it."
        ),
        table(
            ["round", *columns.values()],
            [
                [show(row.get("round")), *(show(row.get(name)) for name in columns)]
                for row in rounds
            ],
            "figures",
        ),
    )


def _reward_model(figures: dict[str, Any]) -> str:
    if not figures:
        return ""
    rows = [[label, show(figures[name])] for name, label in REWARD_MODEL if figures.get(name)]
    counts = [
        f"{show(figures[name])} comparisons {use}"
        for name, use in (("comparisons", "learnt from"), ("held_out", "held out"))
        if figures.get(name) is not None
    ]
    return section(
        "Reward model",
        paragraph(
            "How often the reward model scores the preferred response highest, on comparisons it "
            "was not trained on, beside what takes no model." + _sentence(counts)
        ),
        table(["", "held out"], rows, "figures"),
    )


def _sentence(parts: Sequence[str]) -> str:
    return f" {', '.join(parts)}." if parts else ""


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    if not samples:
        return ""
    cards = [_sample(sample) for sample in samples]
    rest = "".join(cards[SAMPLES_OPEN:])
    more = f"{len(cards) - SAMPLES_OPEN} more"
    return section(
        "Samples",
        paragraph("Responses to the same prompts, before and after training."),
        *cards[:SAMPLES_OPEN],
        f"<details><summary>{more}</summary>{rest}</details>" if rest else "",
    )


def _sample(sample: dict[str, Any]) -> str:
    prompt = passage(sample.get("prompt"))
    responses = "".join(
        f"<div><h3>{who}</h3>{passage(sample.get(who))}"
        f'<p class="score">{escape(scores(sample, who))}</p></div>'
        for who in ("reference", "policy")
    )
    return f'<article><h3>prompt</h3>{prompt}<div class="pair">{responses}</div></article>'


def passage(text: object) -> str:
    """A text as someone wrote it, line breaks kept."""
    if not text:
        return '<p class="text empty">(empty)</p>'
    return f'<p class="text" dir="auto">{escape(text)}</p>'


def fold(text: object, longest: int = LONGEST_OPEN) -> str:
    """The same, behind its first characters where it has more than `longest`."""
    whole = clean(text)
    if len(whole) <= longest:
        return passage(whole)
    size = f"… {show(len(whole))} characters"
    return (
        f'<details class="text" dir="auto"><summary><span>{escape(whole[:longest])}</span>'
        f'<span class="score">{escape(size)}</span></summary>{passage(whole)}</details>'
    )


def scores(sample: dict[str, Any], who: str) -> str:
    """Score, and gold score where there is one, of the "reference" or the "policy" in a sample."""
    text = f"score {show(sample.get(f'{who}_score'))}"
    gold = sample.get(f"{who}_gold")
    return text if gold is None else f"{text} · gold {show(gold)}"


def settings(title: str, groups: Sequence[dict[str, Any] | None]) -> str:
    """A section of names and JSON values, nested names joined by dots; empty if there are none."""
    rows = [row for group in groups for row in _flat(group or {})]
    return section(title, table([], rows, "settings")) if rows else ""


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return rows


WHAT_IS_OPTIMALITY = (
    "Optimality is the share of the possible gain that training has won: "
    "(J(policy) − J(reference)) / (J* − J(reference)), where the objective J is the score minus "
    "kl_coef times the KL to the reference, and J* the best J that any policy can reach. "
    "0 is the reference, 1 the best there is; below 0 is worse than no training. All figures are "
    "on held-out prompts, with standard errors over prompts."
)

FIGURES = (
    ("objective", "objective J"),
    ("score", "score"),
    ("gold", "gold score"),
    ("kl", "KL to the reference, nats a sequence"),
    ("length", "response length, tokens"),
    ("stopped", "share of responses that an EOS ends"),
    ("ref_perplexity", "perplexity to the reference"),
    ("ref_nll_per_token", "surprise to the reference, nats a token"),
    ("distinct_1", "distinct tokens of a prompt's responses, share"),
    ("distinct_2", "distinct token pairs of a prompt's responses, share"),
)

AGAINST_REFERENCE = (
    ("kl_per_token", "KL to the reference, nats a token"),
    ("win_rate_score", "win rate over the reference, by score"),
    ("win_rate_gold", "win rate over the reference, by gold score"),
)

REWARD_MODEL = (
    ("accuracy", "accuracy of the reward model"),
    ("accuracy_longest", "accuracy of preferring the longest response"),
    ("accuracy_chance", "accuracy of chance"),
    ("nll", "negative log likelihood of the reward model, nats a comparison"),
)

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d8dde3;
  --ground: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #343b44; --ground: #14181d; --card: #1c2128; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--ground); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: 0 0 .15rem; }
p { margin: .6rem 0; max-width: 46rem; }
img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 6px;
  border: 1px solid var(--line); }
img.bar { max-width: 36rem; margin: .75rem 0; }
.headline strong { font-size: 2rem; font-weight: 650; line-height: 1.2; }
.headline span { display: block; }
.headline span, .score, .empty { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .5rem;
  margin: 1rem 0 0; max-width: 46rem; }
.facts dt { font-size: .8rem; color: var(--soft); }
.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-size: .82rem; vertical-align: bottom; }
.figures th { overflow-wrap: break-word; }
.figures td, .figures thead th:not(:first-child) { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.figures { max-width: 52rem; }
.settings th { color: var(--soft); width: 38%; }
.settings td { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85rem;
  white-space: pre-wrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: .75rem; margin: .75rem 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; margin: .75rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
  gap: .8rem 1.5rem; margin-top: .8rem; }
.text { white-space: pre-wrap; margin: 0; }
.text + h3 { margin-top: .8rem; }
.score { font-size: .85rem; margin: .3rem 0 0; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; color: var(--soft); margin: .75rem 0; }
.text > summary { color: inherit; margin: 0; }
.text[open] > summary > :first-child { display: none; }
@media (max-width: 30rem) {
  table { font-size: .82rem; }
  th, td { padding-right: .45rem; }
  .figures td { white-space: normal; }
}
@media print { body { max-width: none; } section, article { break-inside: avoid-page; } }
"""

# The policy forbids the page every request, whatever a sample may hold.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
