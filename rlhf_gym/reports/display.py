"""Format numbers and texts for a page or a terminal. No HTML."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_gym.utils.statistics import Figure

UNKNOWN = "–"
"""Shown for a value that is missing or not finite."""

MEASURED_ON = {"all": "all prompts", "train": "training prompts"}
"""What to call the prompts of a split; all others, and those of files without one, are held out."""

LONGEST_OPEN = 600
"""Characters of a text that a page shows at once; the rest of a longer text is folded away."""

# All of Unicode's categories Cc (control), except tab and line feed, and Cs (surrogates). Control
# characters can move a terminal's cursor or change its colours; a lone surrogate, which a JSON
# file may contain, cannot be written as UTF-8.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: object) -> str:
    """Return a text with � in place of each character that is unsafe on a page or a terminal.

    Marks of writing direction (bidi) stay, because right-to-left text needs them. On a page their
    effect ends with the paragraph or table cell that shows the text.
    """
    return UNSAFE.sub("�", str(text).replace("\r\n", "\n"))


def measured_on(figures: Mapping[str, Any]) -> str:
    """Return what to call the prompts that an evaluation's figures were measured on."""
    return MEASURED_ON.get(str(figures.get("split")), "held-out prompts")


def show(value: Any) -> str:
    """Return a plain number, a measured figure with its standard error, or a dash."""
    if isinstance(value, dict):
        return _show_figure(value)
    if value is None or not isinstance(value, (int, float)) or not math.isfinite(value):
        return UNKNOWN
    if isinstance(value, int) or abs(value) >= 1000:
        return minus(f"{value:,.0f}")
    return minus(f"{value:.3g}")


def _show_figure(figure: Figure) -> str:
    value, se = figure.get("value"), figure.get("se")
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if se is None or not math.isfinite(se) or se <= 0:
        return show(float(value))
    # Digits of the value below the second digit of the standard error mean nothing.
    decimals = min(max(1 - math.floor(math.log10(se)), 0), 6)
    return minus(f"{value:,.{decimals}f} ±\N{NO-BREAK SPACE}{se:,.{decimals}f}")


def minus(text: str) -> str:
    """Return a formatted number with a minus sign in place of each hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def between(figure: Figure) -> str:
    """Return the 95 % interval of a figure; empty if it has none."""
    if figure.get("low") is None:
        return ""
    return minus(f"{figure['low']:.3f} to {figure['high']:.3f}")


def duration(seconds: float | None) -> str:
    """Return a time in hours and minutes, minutes and seconds, or seconds."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def scores(sample: Mapping[str, Any], who: str) -> str:
    """Return the score, and the gold score if there is one, of a row of samples.jsonl.

    Args:
        sample: The row.
        who: "reference" or "policy".
    """
    text = f"score {show(sample.get(f'{who}_score'))}"
    gold = sample.get(f"{who}_gold")
    return text if gold is None else f"{text} · gold {show(gold)}"


@dataclass(frozen=True)
class Passage:
    """A text from a model or from the data.

    Attributes:
        text: The whole text.
        opening: Its first characters if it is too long to show at once; else empty.
        size: The length of the whole text, as shown to the reader.
    """

    text: str
    opening: str
    size: str

    @classmethod
    def of(cls, text: object) -> "Passage":
        """Fold a text behind its first characters if it has more than `LONGEST_OPEN`."""
        whole = clean(text)
        opening = whole[:LONGEST_OPEN] if len(whole) > LONGEST_OPEN else ""
        return cls(whole, opening, f"… {show(len(whole))} characters")


def setting_rows(*groups: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return names and JSON values of nested settings; dots join the names of a path."""
    return [row for group in groups for row in _flat(group or {}, "")]


def _flat(values: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return rows
