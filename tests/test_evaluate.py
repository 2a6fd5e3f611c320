"""evaluate.py on hand-made results whose recall can be counted on the fingers."""

import pytest
from conftest import refuse, run_script, succeed


def evaluate(tmp_path, pairs, results, *args):
    (tmp_path / "dev.csv").write_text("".join(f"{q}\t{t}\n" for q, t in pairs), encoding="utf-8")
    (tmp_path / "result.txt").write_text("".join(f"{q}\t{d}\t0.5\n" for q, d in results), encoding="utf-8")
    result = succeed("evaluate.py", "--similar_text_pair", "dev.csv", "--recall_result_file", "result.txt", *args,
                     cwd=tmp_path)
    figures = dict(line.split("=") for line in result.stdout.splitlines())
    assert list(figures) == [f"recall@{k}" for k in (1, 5, 10, 20, 50)]
    return [float(value) for value in figures.values()], result.stderr


def block(query, target, rank, depth=50):
    """`depth` result lines of a query with the target at `rank`, from 1; not at all for 0."""
    return [(query, target if place == rank else f"doc {place}") for place in range(1, depth + 1)]


def test_figures_format_and_result_row(tmp_path):
    pairs = [("a", "A"), ("b", "B"), ("c", "C")]
    figures, _ = evaluate(tmp_path, pairs, block("a", "A", 1) + block("b", "B", 7) + block("c", "C", 0))
    assert figures == [33.333, 33.333, 66.667, 66.667, 66.667]
    assert (tmp_path / "result.tsv").read_text() == "33.333\t33.333\t66.667\t66.667\t66.667\n"
    evaluate(tmp_path, pairs, block("a", "A", 1))
    assert len((tmp_path / "result.tsv").read_text().splitlines()) == 2


def test_the_last_query_counts(tmp_path):
    figures, _ = evaluate(tmp_path, [("a", "A"), ("b", "B")], block("a", "A", 0) + block("b", "B", 1))
    assert figures == [50.0] * 5


def test_any_of_several_targets_is_one_hit(tmp_path):
    pairs = [("a", "A1"), ("a", "A2"), ("a", "A3")]
    results = [("a", "A2"), ("a", "A1"), ("a", "A3")] + block("a", "", 0, 47)
    assert evaluate(tmp_path, pairs, results)[0] == [100.0] * 5
    assert evaluate(tmp_path, pairs, results * 3)[0] == [100.0] * 5, "a query that stands in the file several times"


def test_a_document_recalled_twice_is_one_hit(tmp_path):
    assert evaluate(tmp_path, [("a", "A")], [("a", "A")] * 50)[0] == [100.0] * 5


def test_missing_query_is_a_reported_miss(tmp_path):
    figures, report = evaluate(tmp_path, [("a", "A"), ("b", "B")], block("a", "A", 1))
    assert figures == [50.0] * 5
    assert "1 queries have no line in result.txt and count as missed: b" in report


def test_ranks_past_recall_num_do_not_count(tmp_path):
    figures, report = evaluate(tmp_path, [("a", "A")], block("a", "A", 12), "--recall_num", "10")
    assert figures == [0.0] * 5
    assert "only 10 documents" in report


def test_a_query_equal_to_its_document_counts(tmp_path):
    assert evaluate(tmp_path, [("a", "a")], block("a", "a", 1))[0] == [100.0] * 5


def test_a_million_lines(tmp_path):
    """Counts, not seconds; the process may not take the file into memory."""
    queries = 20000
    results = [line for i in range(queries) for line in block(f"query {i}", f"target {i}", i % 100 + 1)]
    figures, _ = evaluate(tmp_path, [(f"query {i}", f"target {i}") for i in range(queries)], results)
    assert figures == [1.0, 5.0, 10.0, 20.0, 50.0]


@pytest.mark.parametrize("name, content, message", [
    ("dev.csv", "", "holds no text"), ("result.txt", "", "holds no text"),
    ("result.txt", "a\tA\n", "malformed"), ("dev.csv", "a b\n", "malformed")])
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / "dev.csv").write_text("a\tA\n")
    (tmp_path / "result.txt").write_text("a\tA\t0.5\n")
    (tmp_path / name).write_text(content)
    line = refuse("evaluate.py", "--similar_text_pair", "dev.csv", "--recall_result_file", "result.txt", cwd=tmp_path)
    assert name in line and message in line and line.startswith("evaluate.py: error: --")


def test_needs_neither_paddle_nor_paddlenlp(tmp_path):
    (tmp_path / "dev.csv").write_text("a\tA\n")
    (tmp_path / "result.txt").write_text("a\tA\t0.5\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('paddle', 'paddlenlp', 'hnswlib'):\n    sys.modules[name] = None\n")
    result = run_script("evaluate.py", "--similar_text_pair", "dev.csv", "--recall_result_file", "result.txt",
                        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0 and "recall@1=100.0" in result.stdout
