"""evaluate.py on hand-made results whose recall can be counted on the fingers."""

import re
import xml.etree.ElementTree as xml

from evaluate import format_table, name_results

import numpy as np
import pytest
from conftest import refuse, run_script, succeed

FILES = ["--similar_text_pair", "dev.csv", "--recall_result_file", "result.txt"]


def evaluate(tmp_path, pairs, results, *args):
    (tmp_path / "dev.csv").write_text("".join(f"{q}\t{t}\n" for q, t in pairs), encoding="utf-8")
    (tmp_path / "result.txt").write_text("".join(f"{q}\t{d}\t0.5\n" for q, d in results), encoding="utf-8")
    result = succeed("evaluate.py", *FILES, *args, cwd=tmp_path)
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
    assert "result.txt lacks 1 query, counted as missed: b" in report


def test_ranks_past_recall_num_do_not_count(tmp_path):
    figures, report = evaluate(tmp_path, [("a", "A")], block("a", "A", 12), "--recall_num", "10")
    assert figures == [0.0] * 5
    assert "at most 10 documents" in report


def test_a_query_equal_to_its_document_counts(tmp_path):
    assert evaluate(tmp_path, [("a", "a")], block("a", "a", 1))[0] == [100.0] * 5


def test_a_million_lines(tmp_path):
    """Counts, not seconds; the process may not take the file into memory."""
    queries = 20000
    results = [line for i in range(queries) for line in block(f"query {i}", f"target {i}", i % 100 + 1)]
    figures, _ = evaluate(tmp_path, [(f"query {i}", f"target {i}") for i in range(queries)], results)
    assert figures == [1.0, 5.0, 10.0, 20.0, 50.0]


@pytest.mark.parametrize("name, content, message", [
    ("dev.csv", "", "the file is empty"), ("result.txt", "", "the file is empty"),
    ("result.txt", "a\tA\n", "malformed"), ("dev.csv", "a b\n", "columns: 1 instead of 2"),
    ("result.txt", '{"query": "a", "results": [{"rank": 1, "cosine": 0.5}]}\n',
     "result.txt:1: no line of recall.py --format jsonl"),
    ("result.txt", '{"query": "a", "results": [{"document": ["A"]}]}\n', "result.txt:1: no line of recall.py"),
    ("result.txt", '{"query": "a", "results": ' + "[" * 100_000, "result.txt:1: no line of recall.py")],
    ids=lambda value: value[:40])
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / "dev.csv").write_text("a\tA\n")
    (tmp_path / "result.txt").write_text("a\tA\t0.5\n")
    (tmp_path / name).write_text(content)
    line = refuse("evaluate.py", *FILES, cwd=tmp_path)
    assert name in line and message in line and line.startswith("evaluate.py: error: --")


def test_needs_neither_paddle_nor_paddlenlp(tmp_path):
    (tmp_path / "dev.csv").write_text("a\tA\n")
    (tmp_path / "result.txt").write_text("a\tA\t0.5\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('paddle', 'paddlenlp', 'hnswlib'):\n    sys.modules[name] = None\n")
    result = run_script("evaluate.py", *FILES, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0 and "recall@1=100.0" in result.stdout


# --------------------------------------------------------------------- several results, more measures, what was missed
QUERIES = 24


@pytest.fixture
def results(tmp_path):
    """before/recall.txt and 之后/recall.txt of 24 queries with one target each: its ranks, from 1, 0 for none."""
    random = np.random.default_rng(0)
    pairs = "".join(f"query {i}\ttarget {i}\n" for i in range(QUERIES))
    (tmp_path / "dev.csv").write_text(pairs)
    ranks = {}
    for name, most in (("before", 40), ("之后", 8)):
        ranks[name] = random.integers(0, most, QUERIES).tolist()
        (tmp_path / name).mkdir()
        lines = [line for i, rank in enumerate(ranks[name]) for line in block(f"query {i}", f"target {i}", rank)]
        text = "".join(f"{query}\t{document}\t0.5\n" for query, document in lines)
        (tmp_path / name / "recall.txt").write_text(text)
    return ["--similar_text_pair", "dev.csv", "--recall_result_file", *(f"{name}/recall.txt" for name in ranks)], ranks


def expected(ranks):
    """The figures of queries with one target, written out."""
    ranks = np.array([rank or np.inf for rank in ranks])
    return {**{f"recall@{k}": ranks <= k for k in (1, 5, 10, 20, 50)}, "mrr": 1 / ranks,
            "ndcg@10": np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)}


def test_several_files_and_all_metrics(tmp_path, results):
    flags, ranks = results
    printed = succeed("evaluate.py", *flags, "--metrics", "recall, ndcg,mrr,recall", cwd=tmp_path).stdout
    for (name, ranks_of_one), text in zip(ranks.items(), printed.split("\n\n")):
        title, *lines = text.splitlines()
        assert title == f"{name}/recall.txt"
        figures = {measure: float(value) for measure, value in (line.split("=") for line in lines)}
        assert list(figures) == [*(f"recall@{k}" for k in (1, 5, 10, 20, 50)), "ndcg@10", "mrr"]
        for measure, values in expected(ranks_of_one).items():
            assert figures[measure] == pytest.approx(100 * np.mean(values), abs=1e-3)
    rows = [[float(value) for value in line.split("\t")] for line in
            (tmp_path / "result.tsv").read_text().splitlines()]
    assert rows == [[round(100 * np.mean(expected(each)[f"recall@{k}"]), 3) for k in (1, 5, 10, 20, 50)]
                    for each in ranks.values()]


def test_metrics_without_recall_still_write_the_row(tmp_path, results):
    assert succeed("evaluate.py", *results[0][:-1], "--metrics", "mrr", cwd=tmp_path).stdout.startswith("mrr=")
    assert len((tmp_path / "result.tsv").read_text().split("\t")) == 5


def test_one_result_has_no_title(tmp_path, results):
    assert succeed("evaluate.py", *results[0][:-1], cwd=tmp_path).stdout.startswith("recall@1=")


ROW = re.compile(r"(\S+) +([\d.]+) +([\d.]+) +([-+][\d.]+) +([-+][\d.]+) \.\. +([-+][\d.]+)( \*)?")


def test_compare_against_drawing_query_by_query(tmp_path, results):
    flags, ranks = results
    table, note = succeed("evaluate.py", *flags, "--compare", "--metrics", "recall,mrr,ndcg",
                          cwd=tmp_path).stdout.split("\n\n")
    head, *lines = table.splitlines()
    assert re.split("  +", head.strip()) == ["before", "之后", "之后 - before", "95 % interval"]
    assert "paired bootstrap" in note and note.startswith("24 queries") and "\t" not in table
    before, after = map(expected, ranks.values())
    rows = {row[1]: row for row in map(ROW.fullmatch, lines)}
    assert list(rows) == list(before)
    draws = np.random.default_rng(5).integers(QUERIES, size=(10_000, QUERIES))
    stars = set()
    for measure, row in rows.items():
        first, second, difference, low, high = map(float, row.groups()[1:6])
        each = 100 * (after[measure] - before[measure].astype(float))
        assert first == pytest.approx(100 * before[measure].mean(), abs=1e-3)
        assert second == pytest.approx(100 * after[measure].mean(), abs=1e-3)
        assert difference == pytest.approx(each.mean(), abs=1e-3)
        means = each[draws].mean(axis=1)
        step = 100 / QUERIES if "recall" in measure else 0  # means of hits are whole numbers over the queries
        assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=step + 0.12 * means.std() + 1e-3)
        assert low <= difference <= high and (row[7] is not None) == (low > 0 or high < 0)
        stars.add(row[7])
    assert stars == {" *", None}, "the sample shows both"
    assert len((tmp_path / "result.tsv").read_text().splitlines()) == 2


def test_compare_a_file_with_itself_and_another(tmp_path, results):
    flags = [*results[0][:-1], "before/recall.txt", "之后/recall.txt"]
    first, *rows = succeed("evaluate.py", *flags, "--compare", cwd=tmp_path).stdout.split("\n\n")[0].splitlines()
    assert re.split("  +", first.strip())[:4] == ["before", "before (2)", "之后", "before (2) - before"]
    assert all(re.search(r" \+0\.000 +\+0\.000 \.\. +\+0\.000   ", row) for row in rows) and len(rows) == 5


@pytest.mark.parametrize("paths, names", [
    (["quickstart/before/recall_result.txt", "./quickstart/after/recall_result.txt"], ["before", "after"]),
    (["x/recall.txt"], ["recall.txt"]), (["a.txt", "b.txt"], ["a.txt", "b.txt"]),
    (["a/x/r.txt", "a/y/r.txt", "a/y/s.txt"], ["x/r.txt", "y/r.txt", "y/s.txt"]),
    (["r.txt", "old/r.txt"], ["r.txt", "old/r.txt"]), (["r.txt", "r.txt"], ["r.txt", "r.txt (2)"]),
    (["/t/1/ck/r.txt", "/t/2/ck/r.txt"], ["1", "2"])])
def test_labels(paths, names):
    assert name_results(paths) == names


def test_columns_of_chinese_are_twice_as_wide():
    assert format_table([["", "训练后", "b"], ["mrr", "1", "22"]]) == "     训练后   b\nmrr       1  22"


def test_plot_svg_names_files_and_shows_the_figures(tmp_path, results):
    flags, ranks = results
    assert "wrote all.svg" in succeed("evaluate.py", *flags, "--plot", "all.svg", cwd=tmp_path).stderr
    texts = [each.text for each in xml.parse(tmp_path / "all.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"before", "之后", "1", "5", "50", "100", "Recall@k of 24 queries"} <= set(texts)
    for each in ranks.values():
        for k in (1, 5, 10, 20, 50):
            assert f"{100 * np.mean(expected(each)[f'recall@{k}']):.1f}" in texts


@pytest.mark.parametrize("name, start", [("one.png", b"\x89PNG\r\n\x1a\n"), ("one.PDF", b"%PDF-")])
def test_plot_kinds_and_nothing_but_the_picture(tmp_path, results, name, start):
    result = succeed("evaluate.py", *results[0], "--plot", name, "--quiet", cwd=tmp_path)
    assert (tmp_path / name).read_bytes().startswith(start) and not result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["before", "之后", "dev.csv", "result.tsv", name])


def test_plot_of_many_files_and_odd_names(tmp_path, results):
    """More files than colours; a label that matplotlib would leave out, and one that it would read as TeX."""
    text = (tmp_path / "before" / "recall.txt").read_text()
    names = ["_hidden.txt", "$x^2.txt", "a$b$.txt", *(f"{i}.txt" for i in range(8))]
    for name in names:
        (tmp_path / name).write_text(text)
    succeed("evaluate.py", *results[0][:3], *names, "--plot", "many.svg", cwd=tmp_path)
    texts = [each.text for each in xml.parse(tmp_path / "many.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert set(names) <= set(texts)


def test_plot_without_a_chinese_font_or_without_matplotlib(tmp_path, results):
    (tmp_path / "sitecustomize.py").write_text(
        "from matplotlib.font_manager import fontManager as fonts\n"
        "fonts.ttflist = [font for font in fonts.ttflist if font.name == 'DejaVu Sans']\n")
    result = succeed("evaluate.py", *results[0], "--plot", "a.png", "--quiet", cwd=tmp_path,
                     env={"PYTHONPATH": str(tmp_path)})
    assert not result.stderr and (tmp_path / "a.png").stat().st_size > 5000
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    assert "--plot: matplotlib is not installed" in refuse(
        "evaluate.py", *results[0], "--plot", "a.png", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    succeed("evaluate.py", *results[0], "--compare", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("flags, message", [
    (["--compare"], "--compare needs at least two files after --recall_result_file"),
    (["result.txt", "--show_errors", 3], "--show_errors takes one --recall_result_file"),
    (["nowhere.txt"], "argument --recall_result_file: nowhere.txt: no such file"),
    (["--metrics", "recall,mmr"], "argument --metrics: 'mmr' is not one of recall, mrr, ndcg"),
    (["--metrics", ""], "argument --metrics: '' is not one of"),
    (["--show_errors", 0], "argument --show_errors: expected an integer >= 1, got '0'"),
    (["--plot", "a.jpg"], "argument --plot: a.jpg: the name has to end in .png, .svg, .pdf"),
    (["--plot", "no/a.png"], "argument --plot: no: no such folder")])
def test_refused(tmp_path, flags, message):
    for name in FILES[1::2]:
        (tmp_path / name).write_text("a\tA\t0.5\n" if name == "result.txt" else "a\tA\n")
    assert message in refuse("evaluate.py", *FILES, *flags, cwd=tmp_path)
    assert not (tmp_path / "result.tsv").exists()


def test_show_errors_worst_first(tmp_path):
    """Right at once, rank 2 of one of two targets, past --recall_num, nowhere, and without a line."""
    (tmp_path / "dev.csv").write_text("".join(
        f"{query}\t{target}\n" for query, target in
        [("good", "G"), ("second", "S"), ("second", "S2"), ("deep", "D"), ("none", "N"), ("absent", "A")]))
    lines = block("good", "G", 1, 5) + block("second", "S", 2, 5) + block("deep", "D", 5, 5) + block("none", "", 0, 5)
    (tmp_path / "result.txt").write_text("".join(
        f"{query}\t{document}\t0.{9 - place % 5}\n" for place, (query, document) in enumerate(lines)))
    result = succeed("evaluate.py", *FILES, "--recall_num", 3, "--show_errors", 20, cwd=tmp_path)
    figures, head, *entries = result.stdout.rstrip("\n").split("\n\n")
    assert figures.splitlines()[0] == "recall@1=20.0" and figures.splitlines()[1] == "recall@5=40.0"
    assert head == "4 of 5 queries have another document than a target first:"
    documents = [f"recalled  doc {rank} (rank {rank}, score 0.{10 - rank})" for rank in (1, 2, 3)]
    assert [entry.splitlines() for entry in entries] == [
        ["query     none", "target    N (not in the file)", *documents],
        ["query     absent", "target    A (not in the file)"],
        ["query     deep", "target    D (rank 5)", *documents],
        ["query     second", "target    S (rank 2)", "target    S2 (not in the file)", documents[0]]]
    two = succeed("evaluate.py", *FILES, "--show_errors", 2, cwd=tmp_path).stdout
    assert "first; the worst 2:" in two and two.count("query  ") == 2


def test_show_errors_without_any(tmp_path):
    (tmp_path / "dev.csv").write_text("a\tA\n")
    (tmp_path / "result.txt").write_text("a\tA\t0.5\n")
    assert succeed("evaluate.py", *FILES, "--show_errors", 5, cwd=tmp_path).stdout.endswith(
        "\n\n0 of 1 query have another document than a target first\n")
    (tmp_path / "result.txt").write_text("a\tB\t0.9\na\tA\t0.5\na\tB\t0.9\na\tA\t0.5\n")
    assert "target    A (rank 2)\nrecalled  B (rank 1, score 0.9)\n" in succeed(
        "evaluate.py", *FILES, "--show_errors", 5, cwd=tmp_path).stdout, "the query stands there twice"


def test_what_makes_figures_other_than_they_seem_is_said_in_any_case(tmp_path):
    _, report = evaluate(tmp_path, [("a", "A"), ("b", "B")], block("a", "A", 1, 5) + block("c", "C", 1), "--quiet")
    assert "counted as missed: b" in report and "50 lines of result.txt with a query that is not in dev.csv" in report
    assert "at most 5 documents per query" in report


@pytest.mark.parametrize("lines", [1, 2, 5])
def test_the_depth_is_that_of_one_run_of_a_query(tmp_path, lines):
    """A query on several lines stands in the result as often; copies of a document are documents."""
    pairs = [("a", f"A{line}") for line in range(lines)] + [("b", "B")]
    once = [("a", "A0")] * 3 + block("a", "", 0, 7)
    _, report = evaluate(tmp_path, pairs, once * lines + block("b", "B", 1, 10))
    assert "at most 10 documents per query" in report
    _, report = evaluate(tmp_path, pairs, (once + block("a", "", 0, 40)) * lines + block("b", "B", 1))
    assert "per query" not in report


def test_the_depth_where_all_documents_are_alike(tmp_path):
    """One document a query, or copies of one, for a query of two lines."""
    pairs = [("a", "A"), ("a", "B"), ("b", "B")]
    for documents in (1, 3):
        _, report = evaluate(tmp_path, pairs, [("a", "A")] * documents * 2 + [("b", "B")] * documents)
        assert f"at most {documents} document{'s' if documents > 1 else ''} per query" in report
