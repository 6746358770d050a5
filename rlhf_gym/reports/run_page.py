"""The page of a run, report.html, from the files in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_gym.reports import token_view
from rlhf_gym.reports.charts import Chart, pixels, png, tiled
from rlhf_gym.reports.display import UNKNOWN, duration, measured_on, scores, setting_rows, show
from rlhf_gym.reports.pages import render
from rlhf_gym.reports.run_charts import bar, curves, diagnostics
from rlhf_gym.reports.run_files import Run, read_run
from rlhf_gym.utils.files import write_text
from rlhf_gym.utils.statistics import Figure

SAMPLES_OPEN = 4
"""Samples shown at once; the others are folded away."""

FIGURES = (
    ("objective", "objective J"),
    ("score", "score"),
    ("gold", "gold score"),
    ("kl", "KL to the reference, nats per sequence"),
    ("length", "response length, tokens"),
    ("stopped", "share of responses that end with an EOS"),
    ("ref_perplexity", "perplexity under the reference"),
    ("ref_nll_per_token", "negative log-likelihood under the reference, nats per token"),
    ("distinct_1", "share of distinct tokens in a prompt's responses"),
    ("distinct_2", "share of distinct token pairs in a prompt's responses"),
)
"""Figures of reference and policy, and their names on the page."""

AGAINST_REFERENCE = (
    ("kl_per_token", "KL to the reference, nats per token"),
    ("win_rate_score", "win rate over the reference, by score"),
    ("win_rate_gold", "win rate over the reference, by gold score"),
)
"""Figures that only the policy has."""

REWARD_MODEL = (
    ("accuracy", "accuracy of the reward model"),
    ("accuracy_longest", "accuracy of preferring the longest response"),
    ("accuracy_chance", "accuracy of a random guess"),
    ("nll", "negative log-likelihood of the reward model, nats per comparison"),
)

ROUND = (
    ("comparisons", "new comparisons"),
    ("score", "score by this round's reward model"),
    ("gold", "gold score"),
    ("accuracy_on_own_samples", "accuracy on the policy's samples"),
    ("accuracy", "accuracy on held-out comparisons"),
)
"""Figures of a round of labelling."""


@dataclass(frozen=True)
class Response:
    """A response to a prompt: its author, its text (None if unknown) and its scores."""

    who: str
    text: object
    scores: str


@dataclass(frozen=True)
class Sample:
    """A prompt and the responses of the reference and the policy."""

    prompt: object
    responses: tuple[Response, ...]


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run folder, and curves.png if there are metrics.

    Args:
        run_dir: Folder of a run.

    Returns:
        The file report.html.

    Raises:
        InputError: There is nothing to report, or one of the files cannot be read.
    """
    run = read_run(run_dir)
    drawn = [(title, pixels(draw)) for title, draw in curves(run)]
    if drawn:
        (run_dir / "curves.png").write_bytes(png(tiled([image for _, image in drawn])))
    file = run_dir / "report.html"
    write_text(file, page(run, bar(run), [Chart(png(x), title) for title, x in drawn]))
    return file


def page(run: Run, optimality_bar: Chart | None, learning_curves: Sequence[Chart]) -> str:
    """Return the page; a section without content is left out.

    Args:
        run: The run.
        optimality_bar: Optimality between reference and optimum; None if it is unknown.
        learning_curves: Charts of the learning curves.
    """
    found = run.optimality
    context = {
        "title": run.name,
        "optimality": show(found) if found else "",
        "interval": _interval(found, measured_on(run.evaluation)) if found else "",
        "measured_on": measured_on(run.evaluation),
        "bar": optimality_bar,
        "why_unknown": "" if found else _why_unknown(run),
        "best_of": _best_of(run.evaluation.get("best_of_n_optimality") or {}),
        "facts": _run_facts(run.summary),
        "figures": _figure_rows(run),
        "curves": learning_curves,
        "diagnostics": diagnostics(run),
        "has_reward_model": bool(run.reward_model),
        "reward_model": [
            [label, show(run.reward_model[name])]
            for name, label in REWARD_MODEL
            if run.reward_model.get(name)
        ],
        "comparisons": _comparisons(run.reward_model),
        "round_head": ["round", *(label for _, label in ROUND)],
        "rounds": [
            [show(row.get("round")), *(show(row.get(name)) for name, _ in ROUND)]
            for row in run.rounds
        ],
        "samples": [_sample(row) for row in run.samples],
        "samples_open": SAMPLES_OPEN,
        "inspector": token_view.inspector(run.training_samples),
        "quantities": token_view.QUANTITIES,
        "palettes": token_view.PALETTES,
        "configuration": setting_rows(run.config),
        "versions": setting_rows(run.summary.get("versions"), run.summary.get("hashes")),
    }
    return render("run_page.html", context)


def _interval(found: Figure, prompts: str) -> str:
    parts = []
    if found.get("low") is not None and found.get("high") is not None:
        parts.append(f"95 % interval {show(found['low'])} to {show(found['high'])}")
    if found.get("n") is not None:
        parts.append(f"{show(found['n'])} {prompts.removeprefix('all ')}")
    return ", ".join(parts)


def _why_unknown(run: Run) -> str:
    """Say why the optimality of a run is unknown."""
    if not run.evaluation and "optimality" not in run.summary:
        return "Nothing was measured on held-out prompts; scripts/evaluate.py measures the policy."
    ess = run.evaluation.get("optimum", {}).get("ess")
    if ess is None:
        return "The best possible objective of this run is not known, so neither is its optimality."
    return (
        f"The best possible objective could not be estimated: {show(ess)} effective samples "
        "per prompt are too few. A larger kl_coef or more evaluation samples would help."
    )


def _best_of(found: dict[str, Figure]) -> str:
    return ", ".join(f"best-of-{k} reaches {show(figure)}" for k, figure in found.items())


def _run_facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return size and time of the training; empty if there is none or it has not finished."""
    if summary.get("tokens") is None:
        return []
    return [
        ("episodes", show(summary.get("episodes"))),
        ("tokens", show(summary.get("tokens"))),
        ("time", duration(summary.get("seconds"))),
        ("tokens/s", show(summary.get("tokens_per_second"))),
    ]


def _figure_rows(run: Run) -> list[list[str]]:
    """Return label, reference, policy and optimum of each known figure."""
    names = dict(FIGURES)
    # Pairs that have no name in FIGURES are shown under their key.
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
    return rows


def _comparisons(figures: dict[str, Any]) -> str:
    """Say how many comparisons the reward model was trained and evaluated on."""
    counts = [
        f"{show(figures[name])} comparisons {use}"
        for name, use in (("comparisons", "for training"), ("held_out", "held out"))
        if figures.get(name) is not None
    ]
    return f" {', '.join(counts)}." if counts else ""


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        row.get("prompt"),
        tuple(Response(who, row.get(who), scores(row, who)) for who in ("reference", "policy")),
    )
