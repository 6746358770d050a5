"""The report's token inspector: sample responses of the training, each token in colour, no script.

A token carries a colour for each quantity, as custom properties of its style; radio buttons choose
which of them is its background.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlhf_gym.reports.html import escape, paragraph, passage, section, show

Sample = dict[str, Any]

LEVELS = 4
"""Steps of colour on each side of the middle."""


class Palette(NamedTuple):
    """Colours of a page, light or dark.

    Attributes:
        up: Of what is above the middle of a scale.
        down: Of what is below.
        strengths: Percent of that colour at each level; the rest is the ground.
    """

    up: str
    down: str
    strengths: tuple[int, int, int, int]


PALETTES = {
    "light": Palette("#e8791c", "#2f7fe0", (16, 32, 48, 66)),
    "dark": Palette("#d9650a", "#2a78d8", (20, 36, 52, 66)),
}
"""Orange and blue, which everyone tells apart; the ink stays readable on all of them."""


@dataclass(frozen=True)
class Quantity:
    """What tokens can be coloured by.

    Attributes:
        key: Its name in a token's record.
        letter: Its name in the page's style.
        label: What the page calls it.
        meaning: What it is, in a sentence.
        centred: Whether the middle of its scale is the mean of what is shown; else 0.
    """

    key: str
    letter: str
    label: str
    meaning: str
    centred: bool = False


QUANTITIES = (
    Quantity(
        "log_ratio",
        "r",
        "log-ratio",
        "log π − log π_ref of the token: above 0 the policy takes it more often than the reference "
        "does. Summed over a response, an estimate of its KL.",
    ),
    Quantity(
        "value",
        "v",
        "value",
        "What the critic expects of the rest of the response, before the token is taken.",
        centred=True,
    ),
    Quantity(
        "advantage",
        "a",
        "advantage",
        "How much better than expected the token turned out; the update makes tokens above 0 more "
        "likely.",
    ),
)


@dataclass(frozen=True)
class Scale:
    """Colours of a quantity: the middle of its scale, and how far the strongest colours are."""

    middle: float
    reach: float

    @classmethod
    def of(cls, values: Sequence[float], *, centred: bool) -> "Scale":
        """The scale on which only a fiftieth of the values is beyond the strongest colours."""
        if not values:
            return cls(0.0, 1.0)
        middle = float(np.mean(values)) if centred else 0.0
        reach = float(np.quantile(np.abs(np.array(values) - middle), 0.98))
        return cls(middle, max(reach, 1e-9))

    def level(self, value: float | None) -> int:
        """From −LEVELS to LEVELS; 0 where the value is unknown."""
        if value is None:
            return 0
        return round(float(np.clip((value - self.middle) / self.reach, -1, 1)) * LEVELS)


def inspector(rows: Sequence[Sample]) -> str:
    """The section on rows of training_samples.jsonl: last and first update; empty without rows."""
    rows = [row for row in rows if _has_pieces(row)]
    if not rows:
        return ""
    updates = list(dict.fromkeys(row.get("update") for row in rows))
    groups = {u: [row for row in rows if row.get("update") == u] for u in (updates[-1], updates[0])}
    pieces = [piece for group in groups.values() for row in group for piece in row["pieces"]]
    scales = {q.key: Scale.of(_known(pieces, q.key), centred=q.centred) for q in QUANTITIES}
    body = [*map(_switch, QUANTITIES), *(_legend(q, scales[q.key]) for q in QUANTITIES)]
    for update, group in groups.items():
        tokens = show(group[0].get("tokens"))
        body.append(f"<h3>update {escape(update)}, {escape(tokens)} tokens sampled</h3>")
        body += [_sample(row, scales) for row in group]
    return section(
        "Token by token",
        paragraph(
            "Responses to training prompts in the last update that was recorded and in the first, "
            "each token in the colour of a quantity. Point at a token for its numbers."
        ),
        f'<div class="inspector">{"".join(body)}</div>',
    )


def _has_pieces(row: Sample) -> bool:
    pieces = row.get("pieces")
    sound = isinstance(pieces, list) and all(isinstance(piece, dict) for piece in pieces)
    return sound and bool(pieces)


def _known(pieces: Iterable[dict[str, Any]], key: str) -> list[float]:
    found = (_number(piece, key) for piece in pieces)
    return [value for value in found if value is not None]


def _number(piece: dict[str, Any], key: str) -> float | None:
    value = piece.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _switch(quantity: Quantity) -> str:
    name = f"by-{quantity.letter}"
    checked = " checked" if quantity is QUANTITIES[0] else ""
    return (
        f'<input type="radio" name="by" id="{name}"{checked}>'
        f'<label for="{name}">{escape(quantity.label)}</label>'
    )


def _legend(quantity: Quantity, scale: Scale) -> str:
    swatches = "".join(
        f'<i style="background:{_color(level)}"></i>' for level in range(-LEVELS, LEVELS + 1)
    )
    low, high = (show(scale.middle + side * scale.reach) for side in (-1, 1))
    return (
        f'<div class="legend of-{quantity.letter}"><p class="scale"><span>≤ {escape(low)}</span>'
        f"<span>{swatches}</span><span>≥ {escape(high)}</span>"
        f"<span>middle {escape(show(scale.middle))}</span></p>{paragraph(quantity.meaning)}</div>"
    )


def _sample(row: Sample, scales: dict[str, Scale]) -> str:
    tokens = "".join(_token(piece, scales) for piece in row["pieces"])
    figures = f"score {show(row.get('score'))} · KL {show(row.get('kl'))} nats"
    if row.get("finish_reason"):
        figures += f" · ended by {'an EOS' if row['finish_reason'] == 'stop' else 'the budget'}"
    return (
        f"<article>{passage(row.get('prompt'))}"
        f'<p class="text tokens" dir="auto">{tokens}</p>'
        f'<p class="score">{escape(figures)}</p></article>'
    )


def _token(piece: dict[str, Any], scales: dict[str, Scale]) -> str:
    values = {q: _number(piece, q.key) for q in QUANTITIES}
    title = " · ".join(f"{q.label} {show(value)}" for q, value in values.items())
    colors = ";".join(
        f"--{q.letter}:{_color(scales[q.key].level(value))}" for q, value in values.items()
    )
    # A token may be the first bytes of a character, or nothing but a line break.
    text = str(piece.get("text") or "∅").replace("\n", "⏎\n")
    return f'<span style="{colors}" title="{escape(title)}">{escape(text)}</span>'


def _color(level: int) -> str:
    return "none" if not level else f"var(--{'up' if level > 0 else 'down'}{abs(level)})"


def _palette(mode: str) -> str:
    """Colours by level, mixed into the cards' ground."""
    return " ".join(
        f"--{name}{level}: color-mix(in srgb, {color} {strength}%, var(--card));"
        for name, color in (("up", PALETTES[mode].up), ("down", PALETTES[mode].down))
        for level, strength in enumerate(PALETTES[mode].strengths, 1)
    )


def _chosen(quantity: Quantity) -> str:
    """What the quantity's radio button changes."""
    on = f"#by-{quantity.letter}:checked ~"
    return (
        f"{on} .of-{quantity.letter} {{ display: block; }} "
        f"{on} * .tokens span {{ background: var(--{quantity.letter}); }}"
    )


STYLE = f"""
:root {{ {_palette("light")} }}
@media (prefers-color-scheme: dark) {{
  :root {{ {_palette("dark")} }}
}}
.inspector > h3 {{ margin-top: 1.2rem; }}
.inspector > label {{ padding: .1rem .9rem .1rem .3rem; cursor: pointer; }}
.inspector > .legend {{ display: none; }}
.inspector article > .text:first-child {{ color: var(--soft); }}
.scale {{ display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; font-size: .85rem;
  color: var(--soft); font-variant-numeric: tabular-nums; }}
.scale i {{ display: inline-block; width: 1.5rem; height: 1rem; vertical-align: middle;
  border: 1px solid var(--line); print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
.tokens {{ margin-top: .4rem; line-height: 1.9; }}
.tokens span {{ padding: .12rem 0; border-radius: 3px; box-shadow: inset 0 -1px var(--line);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
.tokens span:hover {{ outline: 2px solid var(--ink); }}
{" ".join(map(_chosen, QUANTITIES))}
"""
