"""The documentation's figures of Recall@k are those that benchmarks/quality.json holds."""

import json
import re
from collections import defaultdict
from statistics import fmean, stdev

import pytest
from conftest import ROOT

WHITENED = "first_avg, whitened on corpus.csv"
PAIRS = "first_avg, pairs of documents"
METRICS = ("recall@1", "recall@5", "recall@10", "recall@20", "recall@50", "mrr")
# The sections whose tables quality.py has measured, and how many recalls they have.
SECTIONS = (("zh/better-recall.md", "每一步值多少", 19), ("en/better-recall.md", "What each step is worth", 19),
            ("zh/better-recall.md", "与 BM25 融合", 3), ("en/better-recall.md", "Fusion with BM25", 3),
            ("zh/index.md", "长文档", 8), ("en/index.md", "Long documents", 8),
            ("zh/deployment.md", "int8", 6), ("en/deployment.md", "int8", 6),
            ("zh/experiments.md", "向量维数", 8), ("en/experiments.md", "Sizes of embeddings", 8))


def cell(values):
    """Return a mean as the pages write it, with the standard deviation where there are several runs."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


@pytest.fixture(scope="module")
def measured():
    """The cells of each recall: those of METRICS, by data set, recipe and suffix."""
    runs = defaultdict(list)
    results = json.loads((ROOT / "benchmarks" / "quality.json").read_text(encoding="utf-8"))
    for key, recalls in results.items():
        data_set, recipe, *_ = key.split("/")
        for suffix, metrics in recalls.items():
            runs[data_set, recipe + suffix].append(metrics)
    return {name: [cell([run[metric] for run in several]) for metric in METRICS] for name, several in runs.items()}


def section(page, heading):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize("page, heading, recalls", SECTIONS)
def test_tables_have_the_figures_that_were_measured(measured, page, heading, recalls):
    lines = [line for line in section(page, heading).splitlines() if line.startswith("| ")]
    rows = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
    known = {tuple(cells) for cells in measured.values()}
    known |= {cells[:-1] for cells in known}  # tables without MRR
    known_pairs = {f"{cells[0]} / {cells[2]}" for cells in measured.values()}
    found = 0
    for row in rows:
        figures = [entry for entry in row if re.fullmatch(r"\d+\.\d( ± \d+\.\d)?", entry)]
        pairs = [entry for entry in row if re.fullmatch(r"\d+\.\d / \d+\.\d", entry)]
        if figures:
            assert tuple(figures) in known, row
        assert set(pairs) <= known_pairs, row
        found += bool(figures) + len(pairs)
    assert found == recalls


@pytest.mark.parametrize("page, heading", [("README.md", "选哪种做法"), ("README_en.md", "Which way to take")])
def test_the_readmes_name_recall_at_1_of_each_way(measured, page, heading):
    text = (ROOT / page).read_text(encoding="utf-8")
    part = re.search(rf"^### {heading}\n.*?(?=^### )", text, re.MULTILINE | re.DOTALL)[0]
    ways = [[("csl", "untrained"), ("csl", "plain"), ("lcqmc", "untrained"), ("lcqmc", "plain")],
            [("csl", WHITENED), ("lcqmc", WHITENED)],
            [("csl", PAIRS), ("lcqmc", PAIRS)],
            [("csl", f"{PAIRS} + BM25"), ("lcqmc", f"{PAIRS} + BM25"), ("csl", "BM25"), ("lcqmc", "BM25")]]
    bullets = re.findall(r"^\* .*(?:\n  .*)*", part, re.MULTILINE)
    assert len(bullets) == len(ways)
    for bullet, runs in zip(bullets, ways):
        expected = [measured[run][0].split()[0] for run in runs]
        assert re.findall(r"(?<!\d)\d\d\.\d(?!\d)", bullet) == expected, bullet
