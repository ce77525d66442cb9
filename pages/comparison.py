"""The page of a comparison: its tables, each difference drawn query by query, and every query."""

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from pages.curves import MOST_POINTS, RULE, as_svg
from pages.document import Block
from pages.render import render

BETTER, WORSE = "#000200", "#000201"  # the page's blue and vermilion
MOST_QUERIES = 20_000  # that the page lists


def gains_figure(gains: list[float]) -> Markup:
    """A bar for each query, from the greatest gain to the greatest loss; of more than MOST_POINTS
    queries, for the mean of neighbours."""
    falling = np.sort(gains)[::-1]
    parts = np.array_split(falling, min(len(falling), MOST_POINTS))
    heights = [part.mean() for part in parts]

    def draw(ax: Axes) -> None:
        colors = [BETTER if height > 0 else WORSE for height in heights]
        ax.bar(range(len(heights)), heights, width=0.8, color=colors)
        ax.axhline(0, color=RULE, linewidth=0.6)
        ax.set_xlim(-0.6, len(heights) - 0.4)
        ax.set_xticks([])

    return as_svg(draw)


def comparison_page(
    blocks: list[Block], figures: dict[str, dict[str, list[float]]], names: list[str], rows: list
) -> str:
    """figures: by a comparison's title and by dataset, what each query gained.
    names: of the columns of `rows`: {"dataset", "qid", "query", "values": a figure or None each}.
    """

    def spread(row: dict) -> float:
        there = [value for value in row["values"] if value is not None]
        return max(there) - min(there)

    shown = sorted(rows, key=spread, reverse=True)[:MOST_QUERIES]
    drawn = {
        title: {name: gains_figure(gains) for name, gains in by_dataset.items()}
        for title, by_dataset in figures.items()
    }
    return render(
        "comparison",
        {"names": names, "rows": shown},
        title=" against ".join(names[1:]),
        blocks=[(type(block).__name__, block) for block in blocks],
        figures=drawn,
        left_out=len(rows) - len(shown),
    )
