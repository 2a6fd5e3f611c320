"""Documents and queries with ids: how they are read, and that they go wherever a document goes."""

import json

from simcse.console import InputError, settings
from simcse.index.documents import Documents
from simcse.text import textfile

import pytest
from conftest import FP32, read_texts, refuse, succeed


def corpus_of(folder, *lines, columns=None):
    (folder / "corpus.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return textfile.Corpus(str(folder / "corpus.csv"), "--corpus_file", columns)


def test_ids_are_found_out_or_forced(tmp_path, capsys):
    corpus = corpus_of(tmp_path, "\ufeffa1\t甲", "", "  7 \t 乙  丙 ", "a1 a2\t丁")
    assert corpus.has_ids and corpus[:] == ["甲", "乙  丙", "丁"] and corpus[1] == "乙  丙"
    assert corpus.ids([2, 0]) == ["a1 a2", "a1"] and list(corpus.all_ids()) == ["a1", "7", "a1 a2"]
    assert [corpus.line_number(row) for row in range(3)] == [1, 3, 4]
    plain = corpus_of(tmp_path, "甲", "乙", "7\t丙")
    assert not plain.has_ids and plain[:] == ["甲", "乙"] and plain.ids([0, 1]) == [None, None]
    assert "corpus.csv:3 (columns: 2 instead of 1)" in capsys.readouterr().err
    assert corpus_of(tmp_path, "甲", "乙\t丙", "丁\t戊", columns=2)[:] == ["丙", "戊"]
    with pytest.raises(InputError, match="2 of 3 lines are malformed"):
        corpus_of(tmp_path, "甲", "1\t乙", "2\t丙", columns=1)


def test_a_second_line_with_an_id_is_left_out_and_named(tmp_path, capsys, monkeypatch):
    corpus = corpus_of(tmp_path, "a\t甲", "b\t乙", "a\t丙", "c\t甲")
    assert corpus[:] == ["甲", "乙", "甲"] and corpus.ids(range(3)) == ["a", "b", "c"]
    said = capsys.readouterr().err
    assert "1 of 4 ids stands on an earlier line too" in said and "corpus.csv:3; skipped" in said
    assert Documents(corpus).read([0]) == [("甲", [(1, "a"), (4, "c")])]
    with pytest.raises(InputError, match=r"3 of 4 ids stand .*; expected one text per line, or an id, a tab and"):
        corpus_of(tmp_path, *(f"商品\t{text}" for text in "甲乙丙丁"))
    monkeypatch.setattr(settings, "strict_data", True)
    with pytest.raises(InputError, match=r"corpus.csv:3 \(--strict_data\)"):
        corpus_of(tmp_path, "a\t甲", "b\t乙", "a\t丙", "c\t甲")


@pytest.mark.parametrize("lines, error", [
    ([f"{number}\t文本 {number}" for number in range(30)], None),
    (['"id","text"', '"a","甲,乙丙"', '"b","丁戊"'],
     "the file has CSV with the columns id, text; expected one text per line, or an id, a tab and a text; convert it: "
     ".*to_tsv.py .*corpus.csv --output_file .*corpus.tsv; "),
    (["文本\t0.5", "文字\t0.25", "文章\t0.75"],
     r"the file has texts with labels or scores in column 2 \(0.5, 0.25, 0.75\); .*--fields 1 "),
    ([f"{number}\t标题 {number}\t文本 {number}" for number in range(30)], "no line has 1 or 2 tab-separated columns")])
def test_what_is_no_corpus_is_refused(tmp_path, lines, error):
    if error:
        with pytest.raises(InputError, match=error):
            corpus_of(tmp_path, *lines)
    else:
        assert corpus_of(tmp_path, *lines).has_ids


@pytest.fixture(scope="module")
def numbered(sample, tmp_path_factory):
    """The sample with ids, and with its first document once more, under another id."""
    folder = tmp_path_factory.mktemp("numbered")
    corpus = read_texts(sample / "corpus.csv")
    ids = {text: f"doc{number}" for number, text in reversed(list(enumerate(corpus)))}
    pairs = textfile.read_text_pairs(str(sample / "dev.csv"), "--flag")
    for name, rows in (("corpus.csv", [*((f"doc{number}", text) for number, text in enumerate(corpus)),
                                       ("copy", corpus[0])]),
                       ("plain.csv", [[text] for text in [*corpus, corpus[0]]]),
                       ("dev.csv", [(query, ids[target]) for query, target in pairs]),
                       ("queries.csv", [(f"q{number}", query) for number, (query, _) in enumerate(pairs)]),
                       ("qrels.tsv", [(f"q{number}", ids[target], "1") for number, (_, target) in enumerate(pairs)])):
        (folder / name).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_embeddings_of_texts_with_ids(checkpoint, tmp_path):
    """Those of the texts, the id beside each in jsonl; a line without one has none, and no embedding."""
    (tmp_path / "plain").write_text("语义 检索\n近似 算法\n", encoding="utf-8")
    (tmp_path / "numbered").write_text("a1\t语义 检索\n没有编号\na2\t近似 算法\n", encoding="utf-8")
    answers = {}
    for name in ("plain", "numbered"):
        result = succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, "--input_file", name,
                         "--format", "jsonl", *FP32, cwd=tmp_path)
        answers[name] = list(map(json.loads, result.stdout.splitlines()))
    assert "; 2 texts with ids\n" in result.stderr and "numbered:2 (columns: 1 instead of 2)" in result.stderr
    (first, second), (numbered, bad, last) = answers["plain"], answers["numbered"]
    assert list(first) == ["text", "embedding"] and list(numbered) == ["text", "id", "embedding"]
    assert bad == {"text": "没有编号", "embedding": None}
    assert [numbered, last] == [{**first, "id": "a1"}, {**second, "id": "a2"}]


def test_ids_go_where_the_document_goes(checkpoint, numbered, sample, tmp_path):
    """The tsv result is that of the same corpus without ids; a kept index has the ids; measures by text, by id and by
    judgement are the same, a target's copies aside."""
    recall = ["recall.py", "--device", "cpu", "--params_path", checkpoint, "--recall_num", 50, *FP32]
    built = [*recall, "--corpus_file", numbered / "corpus.csv", "--index_path", "index"]
    by_text = [*built, "--similar_text_pair", sample / "dev.csv"]
    assert "121 documents with ids for hnswlib" in succeed(*by_text, cwd=tmp_path).stderr
    result = tmp_path / "recall_result_dir" / "recall_result.txt"
    tsv = result.read_bytes()
    succeed(*recall, "--corpus_file", numbered / "plain.csv", "--similar_text_pair", sample / "dev.csv", cwd=tmp_path)
    assert result.read_bytes() == tsv

    line = succeed(*recall, "--index_path", "index", "--query", read_texts(sample / "corpus.csv")[0], "--top_k", 3,
                   "--format", "jsonl", cwd=tmp_path).stdout
    assert [(hit["line"], hit["id"]) for hit in json.loads(line)["results"][:2]] == [(1, "doc0"), (121, "copy")]

    by_id = [*built, "--similar_text_pair", numbered / "dev.csv", "--targets", "id", "--format", "jsonl"]
    said = succeed(*by_id, "--recall_result_file", "ids.jsonl", cwd=tmp_path).stderr
    assert "targets are not" not in said and "using the index in index" in said
    succeed(*recall, "--index_path", "index", "--query_file", numbered / "queries.csv", "--format", "trec",
            "--recall_result_file", "run.trec", cwd=tmp_path)
    first = (tmp_path / "recall_result_dir" / "run.trec").read_text().splitlines()
    assert len(first) == 60 * 50 and first[0].split()[:2] == ["q0", "Q0"] and first[49].split()[3] == "50"

    def figures(*flags):
        printed = succeed("evaluate.py", *flags, cwd=tmp_path).stdout.split()
        return dict(line.split("=") for line in printed)

    measured = figures("--similar_text_pair", numbered / "dev.csv", "--targets", "id", "--recall_result_file",
                       "recall_result_dir/ids.jsonl", "--metrics", "recall,mrr,ndcg")
    judged = figures("--qrels", numbered / "qrels.tsv", "--recall_result_file", "recall_result_dir/run.trec",
                     "--metrics", "success,mrr,ndcg")
    assert [measured[f"recall@{k}"] for k in (1, 5, 10, 20, 50)] == [judged[f"success@{k}"] for k in (1, 5, 10, 20, 50)]
    assert measured["ndcg@10"] == judged["ndcg@10"]
    assert measured["recall@50"] == figures("--similar_text_pair", sample / "dev.csv", "--recall_result_file",
                                            "recall_result_dir/recall_result.txt")["recall@50"]
    assert "--targets id: ./recall_result_dir/recall_result.txt has no ids" in refuse(
        "evaluate.py", "--similar_text_pair", numbered / "dev.csv", "--targets", "id", cwd=tmp_path)


def test_targets_that_are_no_ids_are_named(checkpoint, numbered, sample, tmp_path):
    (tmp_path / "dev.csv").write_text("国企混改\tdoc3\n民企创新\tdoc999\n", encoding="utf-8")
    said = succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file",
                   numbered / "corpus.csv", "--similar_text_pair", "dev.csv", "--targets", "id", cwd=tmp_path).stderr
    assert "--similar_text_pair: 1 of 2 targets is not among the ids of" in said
    assert "counts as missed; dev.csv:2" in said


@pytest.mark.parametrize("flags, message", [
    ((), "one of --similar_text_pair, --query_file and --query is needed"),
    (("--query", "a", "--query_file", "corpus.csv"), "--query_file and --query are mutually exclusive"),
    (("--query", "a", "--format", "trec"), "--format trec needs --query_file or --similar_text_pair"),
    (("--query", "a", "--targets", "id"), "--targets needs --similar_text_pair"),
    (("--query_file", "corpus.csv"), "--query_file needs --index_path, or --corpus_file"),
    (("--query", "a", "--index_path", "b", "--corpus_columns", "2"), "--corpus_columns needs --corpus_file")])
def test_flags_that_do_not_fit(checkpoint, numbered, flags, message):
    assert message in refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, *flags, cwd=numbered)


def test_a_run_of_ids_with_white_space_is_refused(checkpoint, tmp_path):
    (tmp_path / "corpus.csv").write_text("a b\t甲乙\nc\t丙丁\n", encoding="utf-8")
    (tmp_path / "queries.csv").write_text("甲乙\n", encoding="utf-8")
    line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", "corpus.csv",
                  "--query_file", "queries.csv", "--format", "trec", cwd=tmp_path)
    assert "--format trec: an id has white space, which separates its columns: corpus.csv:1; give other ids" in line
