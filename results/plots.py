"""The figures of the analyses, as PNG files."""

from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, RULE, BLUE, VERMILION = "#1d1b18", "#68645c", "#d9d5cb", "#0072b2", "#d55e00"
STYLE = {
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "font.size": 9,
    "text.color": INK,
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
}
ACROSS = 3  # panels in a row at most


def grid(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, of so many inches each."""
    rows, across = -(-panels // ACROSS), min(ACROSS, panels)
    canvas = Figure(figsize=(width * across, height * rows), layout="constrained")
    axes = list(canvas.subplots(rows, across, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    return canvas, axes[:panels]


def variants_figure(path: Path, panels: dict[str, dict]) -> None:
    """A panel for each dataset: nDCG@10 of each variant, with the interval of its difference from
    the first, which is a line, as is the first stage.

    panels: by dataset {"first_stage": x, "variants": {name: (x, half of the interval or None)}}.
    """
    variants = max(len(panel["variants"]) for panel in panels.values())
    with style.context(["default", STYLE]):
        canvas, axes = grid(len(panels), 4.3, 1.1 + 0.32 * variants)
        for ax, (dataset, panel) in zip(axes, panels.items()):
            draw_variants(ax, dataset, panel)
        canvas.supxlabel(
            "nDCG@10 in points. Line: the first variant; bars: the 95% interval\n"
            "of the difference from it. Dashed: the first stage.",
            fontsize=8,
        )
        canvas.savefig(path, dpi=200)


def draw_variants(ax: Axes, dataset: str, panel: dict) -> None:
    names, told = list(panel["variants"]), list(panel["variants"].values())
    places = range(len(names))
    values = [value for value, _ in told]
    ax.axvline(panel["first_stage"], color=SOFT, linestyle=(0, (2, 2)), linewidth=1)
    ax.axvline(values[0], color=BLUE, linewidth=0.8)
    ax.errorbar(
        values,
        places,
        xerr=[noise or 0 for _, noise in told],
        fmt="o",
        color=BLUE,
        markersize=5,
        elinewidth=1.5,
    )
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, values[0] - 1), max(high, values[0] + 1))
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=RULE, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.set_title(dataset)


def lengths_figure(path: Path, panels: dict[str, dict]) -> None:
    """A panel for each evaluation: what each query gained by how many tokens its responses have,
    and the means of its bins with their intervals.

    panels: by name {"tokens", "gains": one a query, "bins": [(mean tokens, mean gain, half of the
    interval or None)]}.
    """
    with style.context(["default", STYLE]):
        canvas, axes = grid(len(panels), 4.6, 3.4)
        for ax, (name, panel) in zip(axes, panels.items()):
            ax.axhline(0, color=SOFT, linewidth=0.8)
            ax.scatter(panel["tokens"], panel["gains"], s=12, color=BLUE, alpha=0.5, linewidth=0)
            x, y, noise = (np.array(column, float) for column in zip(*panel["bins"]))
            ax.errorbar(x, y, yerr=np.nan_to_num(noise), fmt="o-", color=VERMILION, markersize=5)
            ax.set_xlabel("tokens of a response, mean of the query's windows")
            ax.set_ylabel("gain in nDCG@10, points")
            ax.set_title(name)
        canvas.savefig(path, dpi=200)
