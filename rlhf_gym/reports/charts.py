"""Charts as PNG images, drawn by matplotlib and embedded in the pages."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c4601a", "#2c7a4b", "#6b7280"


Pixels = npt.NDArray[np.uint8]
Draw = Callable[[Axes], None]

DPI = 160


@dataclass(frozen=True)
class Chart:
    """A PNG image and its alternative text."""

    png: bytes
    alt: str

    @property
    def source(self) -> str:
        """The PNG as a data URI, so that a page needs no second file."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def dress(axes: Axes, title: str, x_label: str) -> None:
    """Add the title, label, grid and legend that all charts share."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        # Below the chart, where no curve can cross it.
        axes.legend(
            fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.19)
        )


def chart(draw: Draw, alt: str, width: float = 4.6, height: float = 3.2) -> Chart:
    """Draw a chart for a page; sizes in inches."""
    return Chart(png(pixels(draw, width, height)), alt)


def pixels(draw: Draw, width: float = 4.6, height: float = 3.2) -> Pixels:
    """Draw on a white ground; sizes in inches. Return the pixels (height, width, RGBA)."""
    # Not pyplot: it keeps every figure in a global list until it is closed, may open a window, and
    # would change the current figure of the caller's own plots.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def png(pixels: Pixels) -> bytes:
    """Encode pixels as a PNG file."""
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def tiled(charts: list[Pixels]) -> Pixels:
    """Tile charts of one size, three per row."""
    blank = np.full_like(charts[0], 255)
    columns = min(len(charts), 3)
    charts = charts + [blank] * (-len(charts) % columns)
    return np.vstack([np.hstack(charts[i : i + columns]) for i in range(0, len(charts), columns)])
