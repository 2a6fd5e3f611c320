"""Draw the throughput by batch and length that `run.py shapes --json` measured.

    python benchmarks/run.py shapes --json shapes.json && python benchmarks/chart.py shapes.json throughput.svg
"""

import json
import re
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def main(source: str, target: str) -> None:
    with open(source, encoding="utf-8") as file:
        rows = [row for row in json.load(file) if row["name"] == "shapes"]
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
    figure.savefig(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: chart.py BENCHMARKS.json CHART.svg")
    main(*sys.argv[1:])
