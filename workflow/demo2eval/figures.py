"""How all figures look, and how they are written: the same bytes each time.

Colors are Okabe and Ito's, which the color-blind tell apart. What a color says, a marker or a line
style says as well: the figures are printed in gray too.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo2eval.provenance import write_atomic

BLUE, VERMILION, GRAY = "#0072B2", "#D55E00", "0.75"
STYLES = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": "#000000", "marker": "x", "linestyle": (0, (8, 2))},
)
"""Of the first, second, ... of several curves; a seventh begins again."""


@contextmanager
def new_figure(file: Path, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, and write them as a PNG file at the end.

    Args:
        file: to write.
        options: of `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained", **options)
    for panel in figure.axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    yield figure, axes
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png", metadata={"Software": None})
    pyplot.close(figure)
    write_atomic(file, image.getvalue())


def draw_published(panel: Any, published: dict[str, float]) -> None:
    """Draw published success rates as dotted lines, named beside the panel.

    Args:
        panel: with success in percent on the y axis.
        published: {name and source: percent}.
    """
    for name, percent in published.items():
        panel.axhline(percent, color="0.5", linestyle=":", linewidth=1)
        panel.annotate(
            f"{name}: {percent:g}",
            (1.01, percent),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            color="0.3",
            verticalalignment="center",
            annotation_clip=False,
        )
