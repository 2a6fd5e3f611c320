"""Draw charts of the documentation from what benchmarks have measured.

    python benchmarks/run.py shapes --json shapes.json
    python benchmarks/chart.py throughput shapes.json docs/throughput.svg
    python benchmarks/chart.py recall benchmarks/quality.json docs/recall.svg
"""

import json
import re
import sys
from statistics import fmean
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "simcse"  # the same data gives the same file

KS = (1, 5, 10, 20, 50)


class Curve(NamedTuple):
    """A curve of Recall@k.

    Attributes:
        label: its name in the legend.
        recipe: that of quality.py.
        suffix: of the recall, as the recipe has it.
        colour: as matplotlib names it.
        style: marker and line, in matplotlib's format.
    """

    label: str
    recipe: str
    suffix: str
    colour: str
    style: str


CURVES = (
    Curve("trained on pairs, fused with BM25", "first_avg, pairs of documents", " + BM25", "tab:red", "o-"),
    Curve("BM25", "BM25", "", "tab:gray", "o--"),
    Curve("trained on pairs from documents", "first_avg, pairs of documents", "", "tab:orange", "o-"),
    Curve("whitened, not trained", "first_avg, whitened on corpus.csv", "", "tab:green", "o-"),
    Curve("plain SimCSE, one epoch", "plain", "", "tab:blue", "o-"),
    Curve("untrained", "untrained", "", "tab:blue", "o:"),
)
DATA_SETS = (("csl", "CSL: titles find abstracts"), ("lcqmc", "LCQMC: questions find paraphrases"))


def draw_throughput(measured: list[dict]) -> plt.Figure:
    """Draw the throughput by batch and length that `run.py shapes --json` measured."""
    rows = [row for row in measured if row["name"] == "shapes"]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    lines: dict[int, list[tuple[int, dict]]] = {}
    for row in rows:
        batch, length = map(int, re.match(r"batch (\d+), (\d+) tokens", row["case"]).groups())
        lines.setdefault(length, []).append((batch, row))
    for colour, (length, points) in zip(plt.cm.viridis([0, 0.3, 0.55, 0.8]), sorted(lines.items())):
        batches = [batch for batch, _ in points]
        axes.plot(batches, [row["ours"] for _, row in points], "o-", color=colour, label=f"{length} tokens")
        axes.plot(batches, [row["reference"] for _, row in points], "o:", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="texts a batch", ylabel="texts/s", xticks=batches,
             xticklabels=batches, title="ERNIE-base: default precision (solid) and fp32 (dotted)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.text(0.5, 0.01, rows[0]["machine"], ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def draw_recall(results: dict[str, dict]) -> plt.Figure:
    """Draw Recall@k of CURVES on both data sets, the mean over the seeds that quality.py measured.

    Args:
        results: what `quality.py --json` wrote: by key `data_set/recipe/seed/digest`, the metrics by suffix of the
            recall.
    """
    figure, panels = plt.subplots(1, len(DATA_SETS), figsize=(10, 4.4), sharey=True)
    places = range(len(KS))
    for axes, (data_set, title) in zip(panels, DATA_SETS):
        for curve in CURVES:
            runs = select_runs(results, data_set, curve.recipe)
            values = [fmean(run[curve.suffix][f"recall@{k}"] for run in runs) for k in KS]
            axes.plot(places, values, curve.style, color=curve.colour, label=curve.label, markersize=4)
        axes.set(title=title, xlabel="k", xticks=places, xticklabels=KS, ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Recall@k, %")
    panels[1].legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    return figure


def select_runs(results: dict[str, dict], data_set: str, recipe: str) -> list[dict]:
    """Return the runs of a recipe, one for each seed.

    Raises:
        ValueError: there are none, or some are of earlier commands of the recipe.
    """
    name = f"{data_set}/{recipe}"
    keys = [key for key in results if key == name or key.startswith(f"{name}/")]
    digests = {key.rpartition("/")[2] for key in keys}
    if len(digests) != 1:
        raise ValueError(f"{name}: expected runs with one digest, got {keys}")
    return [results[key] for key in keys]


CHARTS = {"throughput": draw_throughput, "recall": draw_recall}


def main(kind: str, source: str, target: str) -> None:
    with open(source, encoding="utf-8") as file:
        measured = json.load(file)
    CHARTS[kind](measured).savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in CHARTS:
        sys.exit(f"usage: chart.py {'|'.join(CHARTS)} MEASURED.json CHART.svg")
    main(*sys.argv[1:])
