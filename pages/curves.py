"""Curves over the steps of a training, one small figure each, drawn by matplotlib as SVG.

The SVG holds no colour and no font of its own: both come from the page, in the light and in the
dark. So one kind of figure stands beside the other, and its text can be found and copied.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

SIZE = (3.2, 1.6)  # inches, of 72 units each
AXES = (0.14, 0.15, 0.84, 0.76)  # left, bottom, width, height: alike in all figures
MOST_POINTS = 400  # of a line; more are drawn as means of neighbours
FEW_POINTS = 24  # of a line that is drawn as it is, without a mean beside it
RUNS = 7  # how many runs have a colour of their own

# Colours that stand for the page's own.
INK, SOFT, RULE = "#000101", "#000102", "#000103"
NAMES = {INK: "ink", SOFT: "soft", RULE: "rule"} | {f"#00020{i}": f"run{i}" for i in range(RUNS)}

STYLE = {
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 7.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "rearank",
    "text.color": SOFT,
    "xtick.color": RULE,
    "xtick.labelcolor": SOFT,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.color": RULE,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Line:
    """The values of one figure in one run, by step; one at least."""

    steps: list[int]
    values: list[float]
    run: int = 0  # whose colour it takes
    sparse: bool = False  # few measurements, each to be seen
    level: float | None = None  # what to compare them with, drawn dashed


def thinned(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a line, at most MOST_POINTS of them."""
    pieces = min(len(line.steps), MOST_POINTS)
    x, y = (np.array_split(np.array(a, float), pieces) for a in (line.steps, line.values))
    return np.array([part.mean() for part in x]), np.array([part.mean() for part in y])


def smoothed(y: np.ndarray) -> np.ndarray:
    """The mean of about a tenth of the points around each; at the ends of those there are."""
    window = np.ones(2 * (len(y) // 20) + 1)
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def draw(ax: Axes, line: Line) -> None:
    x, y = thinned(line)
    color = f"#00020{line.run}"
    if line.sparse:
        ax.plot(x, y, color=color, linewidth=1.2, marker="o", markersize=2.6, clip_on=False)
    elif len(x) <= FEW_POINTS:
        ax.plot(x, y, color=color, linewidth=1.2, marker="o", markersize=1.6)
    else:
        ax.plot(x, y, color=color, linewidth=0.5, alpha=0.5)
        ax.plot(x, smoothed(y), color=color, linewidth=1.4)
    if line.level is not None:
        ax.axhline(line.level, color=color, linewidth=0.8, dashes=(3, 3))


def figure(lines: list[Line], from_zero: bool = False) -> Markup:
    """The lines in one figure, as an <svg> to put into a page.

    from_zero: the axis begins there, as for shares and times.
    """

    def draw_all(ax: Axes) -> None:
        for line in lines:
            draw(ax, line)
        last = max(line.steps[-1] for line in lines)
        ax.set_xlim(0, max(last, 1))
        ax.margins(y=0.08)
        most = max(max(line.values) for line in lines)
        if from_zero:
            ax.set_ylim(0, ax.get_ylim()[1] if most else 1)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if most >= 1000:
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

    return as_svg(draw_all)


def as_svg(draw: Callable[[Axes], None]) -> Markup:
    """What is drawn, in a figure of the pages' own style."""
    with style.context(["default", STYLE]):  # whatever the user's own matplotlibrc says
        canvas = Figure(figsize=SIZE)
        ax = canvas.add_axes(AXES)
        draw(ax)
        ax.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
        ax.grid(axis="y", color=RULE, linewidth=0.4)
        ax.set_axisbelow(True)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return for_the_page(file.getvalue())


def shorter(numbers: str) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", numbers)


def for_the_page(svg: str) -> Markup:
    """matplotlib's file as an element of a page: its colours, fonts and names taken out."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # "line2d_3"; those that are referred to stay
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="\S+" height="\S+"', r'\1 aria-hidden="true"', svg)
    svg = re.sub(r' (d|x|y|transform)="[^"]*"', lambda found: shorter(found[0]), svg)
    svg = re.sub(r"#000[12]0\d", lambda found: f"var(--{NAMES[found[0]]})", svg)
    return Markup(re.sub(r"\s*\n\s*", " ", svg))
