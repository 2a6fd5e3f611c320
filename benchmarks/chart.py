"""Draw charts of the documentation from what benchmarks have measured.

    python benchmarks/run.py shapes --json shapes.json
    python benchmarks/chart.py throughput shapes.json docs/throughput.svg
    python benchmarks/chart.py recall benchmarks/quality.json docs/recall.svg
"""

import json
import re
import sys
from statistics import fmean

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

KS = (1, 5, 10, 20, 50)
# A line of the chart of Recall@k: its name, the recipe of quality.py, the suffix of its recall, colour and dashes.
WAYS = (
    ("trained on pairs, fused with BM25", "first_avg, pairs of documents", " + BM25", "tab:red", "o-"),
    ("BM25", "BM25", "", "tab:gray", "o--"),
    ("trained on pairs from documents", "first_avg, pairs of documents", "", "tab:orange", "o-"),
    ("whitened, not trained", "first_avg, whitened on corpus.csv", "", "tab:green", "o-"),
    ("plain SimCSE, one epoch", "plain", "", "tab:blue", "o-"),
    ("untrained", "untrained", "", "tab:blue", "o:"),
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
    """Draw Recall@k of WAYS on both data sets, the mean over the seeds that quality.py measured.

    Args:
        results: what `quality.py --json` wrote: metrics by suffix of the recall, by data set, recipe, seed and digest.
    """
    figure, panels = plt.subplots(1, len(DATA_SETS), figsize=(10, 4.4), sharey=True)
    places = range(len(KS))
    for axes, (data_set, title) in zip(panels, DATA_SETS):
        for name, recipe, suffix, colour, style in WAYS:
            beginning = f"{data_set}/{recipe}"
            runs = [run for key, run in results.items() if key == beginning or key.startswith(f"{beginning}/")]
            values = [fmean(run[suffix][f"recall@{k}"] for run in runs) for k in KS]
            axes.plot(places, values, style, color=colour, label=name, markersize=4)
        axes.set(title=title, xlabel="k", xticks=places, xticklabels=KS, ylim=(0, 102))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Recall@k, %")
    panels[1].legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    return figure


CHARTS = {"throughput": draw_throughput, "recall": draw_recall}


def main(kind: str, source: str, target: str) -> None:
    with open(source, encoding="utf-8") as file:
        measured = json.load(file)
    CHARTS[kind](measured).savefig(target)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in CHARTS:
        sys.exit(f"usage: chart.py {'|'.join(CHARTS)} MEASURED.json CHART.svg")
    main(*sys.argv[1:])
