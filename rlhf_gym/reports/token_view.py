"""The report's token inspector: sample responses of the training, each token in colour, no script.

The style attribute of a token has one custom property per quantity, with its colour. Radio buttons
select which of them is the background.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlhf_gym.reports.display import show

LEVELS = 4
"""Colour steps on each side of the middle."""


class Palette(NamedTuple):
    """Colours of the light or the dark page.

    Attributes:
        up: Colour of values above the middle of a scale.
        down: Colour of values below the middle.
        strengths: Percentage of that colour at each level; the rest is the background.
    """

    up: str
    down: str
    strengths: tuple[int, int, int, int]


PALETTES = {
    "light": Palette("#e8791c", "#2f7fe0", (16, 32, 48, 66)),
    "dark": Palette("#d9650a", "#2a78d8", (20, 36, 52, 66)),
}
"""Orange and blue: colour-blind readers can tell them apart, and text is readable on both."""


@dataclass(frozen=True)
class Quantity:
    """A quantity that can colour the tokens.

    Attributes:
        key: Its key in a token's record.
        letter: Its name in the page's CSS.
        label: Its name on the page.
        meaning: Its explanation on the page.
        centred: If True, the middle of its scale is the mean of the shown values; else 0.
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
        "does. The sum over a response estimates its KL.",
    ),
    Quantity(
        "value",
        "v",
        "value",
        "The return that the critic expects for the rest of the response, before the token.",
        centred=True,
    ),
    Quantity(
        "advantage",
        "a",
        "advantage",
        "How much better than expected the token was; the update makes tokens above 0 more likely.",
    ),
)


@dataclass(frozen=True)
class Scale:
    """Colour scale of a quantity: its middle, and the distance of the strongest colours from it."""

    middle: float
    reach: float

    @classmethod
    def of(cls, values: Sequence[float], *, centred: bool) -> "Scale":
        """Return the scale that covers 98 % of the values; outliers get the strongest colour."""
        if not values:
            return cls(0.0, 1.0)
        middle = float(np.mean(values)) if centred else 0.0
        reach = float(np.quantile(np.abs(np.array(values) - middle), 0.98))
        return cls(middle, max(reach, 1e-9))

    def level(self, value: float | None) -> int:
        """Return the level of a value, from −LEVELS to LEVELS; 0 if it is unknown."""
        if value is None:
            return 0
        return round(float(np.clip((value - self.middle) / self.reach, -1, 1)) * LEVELS)


@dataclass(frozen=True)
class Token:
    """A token on the page.

    Attributes:
        style: Its colours, as CSS custom properties.
        numbers: Its quantities, for the tooltip.
        text: Its text.
    """

    style: str
    numbers: str
    text: str


@dataclass(frozen=True)
class TokenResponse:
    """A response of the training: its prompt (None if unknown), tokens and figures."""

    prompt: object
    tokens: list[Token]
    figures: str


@dataclass(frozen=True)
class Update:
    """Responses of one update, with its number and the tokens sampled until then."""

    number: object
    tokens: str
    responses: list[TokenResponse]


@dataclass(frozen=True)
class Legend:
    """Legend of a quantity: colours from low to high, and the numbers at ends and middle."""

    quantity: Quantity
    colors: list[str]
    low: str
    middle: str
    high: str


@dataclass(frozen=True)
class Inspector:
    """The contents of the inspector section."""

    legends: list[Legend]
    updates: list[Update]


def inspector(rows: Sequence[dict[str, Any]]) -> Inspector | None:
    """Prepare the last and the first update of training_samples.jsonl; None without rows."""
    rows = [row for row in rows if _has_pieces(row)]
    if not rows:
        return None
    updates = list(dict.fromkeys(row.get("update") for row in rows))
    groups = {u: [row for row in rows if row.get("update") == u] for u in (updates[-1], updates[0])}
    pieces = [piece for group in groups.values() for row in group for piece in row["pieces"]]
    scales = {q.key: Scale.of(_known(pieces, q.key), centred=q.centred) for q in QUANTITIES}
    return Inspector(
        [_legend(q, scales[q.key]) for q in QUANTITIES],
        [
            Update(update, show(group[0].get("tokens")), [_response(row, scales) for row in group])
            for update, group in groups.items()
        ],
    )


def _has_pieces(row: dict[str, Any]) -> bool:
    pieces = row.get("pieces")
    sound = isinstance(pieces, list) and all(isinstance(piece, dict) for piece in pieces)
    return sound and bool(pieces)


def _known(pieces: Iterable[dict[str, Any]], key: str) -> list[float]:
    found = (_number(piece, key) for piece in pieces)
    return [value for value in found if value is not None]


def _number(piece: dict[str, Any], key: str) -> float | None:
    value = piece.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _legend(quantity: Quantity, scale: Scale) -> Legend:
    low, middle, high = (show(scale.middle + side * scale.reach) for side in (-1, 0, 1))
    colors = [_color(level) for level in range(-LEVELS, LEVELS + 1)]
    return Legend(quantity, colors, low, middle, high)


def _response(row: dict[str, Any], scales: dict[str, Scale]) -> TokenResponse:
    figures = f"score {show(row.get('score'))} · KL {show(row.get('kl'))} nats"
    if row.get("finish_reason"):
        figures += f" · ended by {'an EOS' if row['finish_reason'] == 'stop' else 'the budget'}"
    return TokenResponse(row.get("prompt"), [_token(p, scales) for p in row["pieces"]], figures)


def _token(piece: dict[str, Any], scales: dict[str, Scale]) -> Token:
    values = {q: _number(piece, q.key) for q in QUANTITIES}
    numbers = " · ".join(f"{q.label} {show(value)}" for q, value in values.items())
    style = ";".join(
        f"--{q.letter}:{_color(scales[q.key].level(value))}" for q, value in values.items()
    )
    # A token may be the first bytes of a character, or nothing but a line break.
    return Token(style, numbers, str(piece.get("text") or "∅").replace("\n", "⏎\n"))


def _color(level: int) -> str:
    return "none" if not level else f"var(--{'up' if level > 0 else 'down'}{abs(level)})"
