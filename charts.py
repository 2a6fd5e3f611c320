"""Recall results side by side: what to call them, a table for the terminal, and a picture.

matplotlib is imported by `draw_recall` alone.
"""

import logging
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import data

ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito 2008: told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
# Fonts with Chinese characters, of Linux, Windows and macOS.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei",
             "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
             "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS")


def labels(paths: Sequence[str]) -> list[str]:
    """What tells the paths apart: each without the folders, and the name, that all have in common; of one its name.

    before/recall.txt and after/recall.txt are before and after. A path that is there again gets a number.
    """
    parts = [PurePath(os.path.normpath(path)).parts for path in paths]
    if len(paths) == 1:
        return [parts[0][-1]]
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        while min(map(len, parts)) > 1 and len({each[end] for each in parts}) == 1:
            parts = [each[rest] for each in parts]
    seen: Counter[str] = Counter()
    names = []
    for name in ("/".join(each) for each in parts):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns, the first to the left, the others to the right; Chinese characters are two places wide."""
    def width(text: str) -> int:
        return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)

    widths = [max(map(width, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        spaces = [" " * (most - width(cell)) for cell, most in zip(row, widths)]
        cells = [row[0] + spaces[0], *(space + cell for cell, space in zip(row[1:], spaces[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def draw_recall(path: str, results: Mapping[str, Sequence[float]], queries: int) -> None:
    """Draw Recall@k as bars, a group for every k and a colour for every result.

    Args:
        path: where to, ending in one of ENDINGS; complete or not at all.
        results: by label Recall@k in percent, for every k of data.RECALL_KS.
        queries: of how many it is the mean.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    places, width = range(len(data.RECALL_KS)), 0.84 / len(results)
    columns = 2 if max(map(len, results)) <= 40 else 1  # of the legend
    with matplotlib.rc_context({"font.family": fonts, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        size = min(16, max(6.4, 1.6 + 2.2 * len(results))), 4.6 + 0.22 * -(-len(results) // columns)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for number, recall in enumerate(results.values()):
            shift = (number - (len(results) - 1) / 2) * width
            bars = axes.bar([place + shift for place in places], recall, 0.94 * width, label=str(number),
                            color=COLOURS[number % len(COLOURS)], hatch="/" * (3 * (number // len(COLOURS))))
            if len(results) <= 6:  # more would overlap
                axes.bar_label(bars, [f"{value:.1f}" for value in recall], padding=2, fontsize=8)
        axes.set_title(f"Recall@k of {queries:,} queries", pad=16)
        axes.set(xlabel="k", ylabel="queries with a target among the first k, %", ylim=(0, 100), xticks=places,
                 xticklabels=data.RECALL_KS, yticks=range(0, 101, 20))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False)
        for text, label in zip(legend.get_texts(), results):  # as it is: matplotlib leaves _x out and reads $x$ as TeX
            text.set(text=label, parse_math=False)
        with data.new_file(path, "wb") as file:
            figure.savefig(file, format=path.rsplit(".")[-1].lower(), dpi=150, bbox_inches="tight")
