"""Render a conversation as text, in a terminal or as an image.

Each token is coloured by its log-ratio log π − log π_ref if an actor is bound: red if the policy
gives it more probability than the reference does, blue if less. If nobody is bound, the colour is
that of log π_ref.
"""

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.text import Text

SCALE = 2.0
"""Nats at which a colour reaches full strength."""

SIZE = (640, 360)
MARGIN, LINE = 16, 22
GREY, BLACK, WHITE = (110, 110, 110), (20, 20, 20), (255, 255, 255)

Color = tuple[int, int, int]

_console = Console(soft_wrap=True)


@dataclass
class Trace:
    """One conversation so far.

    Attributes:
        prompt: The prompt as text.
        tokens: Text of each response token.
        log_ratios: log π − log π_ref of each token, or log π_ref if nobody is bound.
        bound: Whether they are ratios.
        score: R(x, y) once it has ended.
        finish_reason: "stop" or "length" once it has ended.
    """

    prompt: str
    tokens: list[str] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    bound: bool = False
    score: float | None = None
    finish_reason: str = ""

    def add(self, token: str, log_ratio: float, bound: bool) -> None:
        """Append one token."""
        self.tokens.append(token)
        self.log_ratios.append(log_ratio)
        self.bound = bound

    @property
    def footer(self) -> str:
        """One line about the whole response."""
        what = "Σ log π/π_ref" if self.bound else "Σ log π_ref"
        line = f"{len(self.tokens)} tokens, {what} {sum(self.log_ratios):.2f} nats"
        return (
            line if self.score is None else f"{line}, {self.finish_reason}, score {self.score:.3f}"
        )


def color(log_ratio: float) -> Color:
    """Background of a token: white at 0, red above, blue below."""
    share = float(np.clip(abs(log_ratio) / SCALE, 0.0, 1.0))
    fade = round(255 * (1 - 0.6 * share))
    return (255, fade, fade) if log_ratio > 0 else (fade, fade, 255)


def as_text(trace: Trace) -> str:
    """Plain text: prompt, response and a footer, three lines."""
    return f"{trace.prompt}\n{''.join(trace.tokens)}\n[{trace.footer}]"


def to_terminal(trace: Trace) -> None:
    """Print what is new: first the prompt, then each token in its colour, at the end the footer."""
    if not trace.tokens:
        _console.print(Text(f"\n{trace.prompt} ", style="dim"), end="")
        return
    red, green, blue = color(trace.log_ratios[-1])
    style = f"black on rgb({red},{green},{blue})"
    _console.print(Text(trace.tokens[-1], style=style), end="")
    if trace.score is not None:
        _console.print(Text(f"\n[{trace.footer}]", style="dim"))


def as_image(trace: Trace) -> npt.NDArray[np.uint8]:
    """An RGB image, (360, 640, 3) uint8; long conversations scroll out at the top."""
    # Pillow's default font has no Greek letters.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 15)
    pieces = [(piece, None) for piece in _words(trace.prompt)]
    lines = _wrapped(
        [*pieces, (" ", None), *zip(trace.tokens, map(color, trace.log_ratios), strict=True)], font
    )
    image = Image.new("RGB", SIZE, WHITE)
    draw = ImageDraw.Draw(image)
    room = (SIZE[1] - 2 * MARGIN) // LINE - 2
    for i, line in enumerate(lines[-room:]):
        x, y = float(MARGIN), MARGIN + i * LINE
        for piece, background in line:
            width = font.getlength(piece)
            if background is not None:
                draw.rectangle((x, y, x + width, y + LINE - 3), fill=background)
            draw.text((x, y), piece, fill=GREY if background is None else BLACK, font=font)
            x += width
    draw.text((MARGIN, SIZE[1] - MARGIN - LINE), trace.footer, fill=BLACK, font=font)
    return np.asarray(image)


Piece = tuple[str, Color | None]


def _words(text: str) -> list[str]:
    return [f"{word} " for word in text.split(" ")]


def _wrapped(
    pieces: list[Piece], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[list[Piece]]:
    lines: list[list[Piece]] = [[]]
    x = 0.0
    for piece, background in pieces:
        flat = piece.replace("\n", "↵")
        width = font.getlength(flat)
        if x + width > SIZE[0] - 2 * MARGIN and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((flat, background))
        x += width
    return lines
