"""scripts/from_beir.py, and what evaluate.py makes of judgements and runs; its measures are in test_metrics."""

import argparse
import codecs
import json

from simcse.console import InputError
from simcse.measures import rank_documents, read_judgements, read_run

import from_beir
import pytest
from conftest import refuse, succeed

DOCUMENTS = [{"_id": "d1", "title": "标题", "text": "甲\n乙"}, {"_id": "d2", "title": "", "text": "丙\t丁"},
             {"_id": "3", "text": "戊"}, {"_id": "空", "title": "", "text": " "}]
QUERIES = [{"_id": "q1", "text": "甲 乙"}, {"_id": "q2", "text": "丙"}, {"_id": "q3", "text": "没有判断"}]
HEADER = "query-id\tcorpus-id\tscore\n"


def write_folder(folder, documents=DOCUMENTS, **splits):
    (folder / "qrels").mkdir()
    for name, objects in (("corpus", documents), ("queries", QUERIES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects), encoding="utf-8")
    for split, lines in splits.items():
        (folder / "qrels" / f"{split}.tsv").write_text(HEADER + lines, encoding="utf-8")


def test_a_folder_becomes_this_layout(tmp_path):
    write_folder(tmp_path, test="q1\td1\t2\nq1\td2\t0\nq2\td2\t1\nq2\td9\t1\n", train="q2\t3\t1\nq2\td9\t1\n")
    said = succeed("scripts/from_beir.py", ".", cwd=tmp_path).stderr
    expected = {"corpus.csv": "d1\t标题 甲 乙\nd2\t丙 丁\n3\t戊\n", "queries.csv": "q1\t甲 乙\nq2\t丙\n",
                "qrels.tsv": "q1\td1\t2\nq1\td2\t0\nq2\td2\t1\nq2\td9\t1\n", "dev.csv": "甲 乙\td1\n丙\td2\n",
                "train_unsupervised.csv": "标题 甲 乙\n丙 丁\n戊\n", "train.csv": "丙\t戊\n"}
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "recall").iterdir()} == expected
    assert "1 of 4 texts is empty; left out: " in said and "corpus.jsonl:4" in said
    assert "1 of 4 judgements is of queries or documents not in queries.jsonl or corpus.jsonl; they stay in" in said
    assert "1 of 2 judgements is of queries or documents not in queries.jsonl or corpus.jsonl; left out of" in said


def test_training_pairs_of_an_earlier_set_are_removed(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("甲\t乙\n", encoding="utf-8")
    args = argparse.Namespace(folder="set", output_dir=str(tmp_path))
    from_beir.write_training_pairs(args, [("丙", "戊")])
    assert (tmp_path / "train.csv").read_text(encoding="utf-8") == "丙\t戊\n"
    assert "removed" not in capsys.readouterr().err
    for _ in range(2):
        from_beir.write_training_pairs(args, [])
        assert not (tmp_path / "train.csv").exists()
    assert capsys.readouterr().err == (f"no {tmp_path}/train.csv was written, so that of an earlier data set was "
                                       "removed\n")


def test_of_several_lines_with_an_id_the_first_counts(tmp_path):
    """As in recall.py; a BOM before the first line is no part of it."""
    again = [*DOCUMENTS[:2], {"_id": "d1", "text": "later"}, {"_id": "d2", "text": "later"}]
    write_folder(tmp_path, documents=again, test="q1\td1\t1\n")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(codecs.BOM_UTF8 + corpus.read_bytes())
    said = succeed("scripts/from_beir.py", ".", cwd=tmp_path).stderr
    assert (tmp_path / "recall" / "corpus.csv").read_text(encoding="utf-8") == "d1\t标题 甲 乙\nd2\t丙 丁\n"
    assert "2 of 4 ids repeat an earlier id; left out: " in said and "jsonl:3, " in said


def test_documents_that_are_queries(tmp_path):
    """BEIR leaves out a query's own id, which the flag does; without the flag it is said."""
    (tmp_path / "qrels").write_text("a 0 b 1\n")
    (tmp_path / "run").write_text("a Q0 a 1 0.9 t\na Q0 b 2 0.8 t\n")
    flags = ["--qrels", "qrels", "--recall_result_file", "run"]
    plain = succeed("evaluate.py", *flags, cwd=tmp_path)
    assert plain.stdout.startswith("recall@1=0.0\n")
    assert "run: 1 query of 1 with a document of the query's own id" in plain.stderr
    without = succeed("evaluate.py", *flags, "--ignore_identical_ids", cwd=tmp_path)
    assert without.stdout.startswith("recall@1=100.0\n") and "left out the document" in without.stderr
    assert "needs --qrels" in refuse("evaluate.py", "--ignore_identical_ids", "--similar_text_pair", "run",
                                          "--recall_result_file", "run", cwd=tmp_path)


@pytest.mark.parametrize("break_it, message", [
    (lambda folder: (folder / "corpus.jsonl").unlink(), "argument folder: . has no corpus.jsonl"),
    (lambda folder: (folder / "qrels" / "test.tsv").unlink(), "qrels/test.tsv: no such file; --split names another"),
    (lambda folder: (folder / "queries.jsonl").write_text('{"_id": "q1"}\n'), "jsonl:1: expected a JSON object"),
    (lambda folder: (folder / "queries.jsonl").write_text('{"_id": "q 1", "text": "a"}\n'), "the id 'q 1' is"),
    (lambda folder: (folder / "corpus.jsonl").write_bytes("甲".encode("gbk")), "corpus.jsonl: "),
    (lambda folder: (folder / "qrels" / "test.tsv").write_text(HEADER + "q1\td1\t0\n"),
     "test.tsv: no existing document is judged relevant"),
    (lambda folder: (folder / "qrels" / "test.tsv").write_text("q1\n"), "test.tsv:1: expected")])
def test_what_is_no_such_folder(tmp_path, break_it, message):
    write_folder(tmp_path, test="q1\td1\t1\n")
    break_it(tmp_path)
    assert message in refuse("scripts/from_beir.py", ".", cwd=tmp_path)
    assert not (tmp_path / "recall" / "corpus.csv").exists()


def test_judgements_of_trec_and_beir(tmp_path):
    path = tmp_path / "qrels"
    for content in ("q 0 a 1\nq 0 b -1\n\nr 0 a 0\n", HEADER + "q\ta\t1\nq\tb\t-1\nr\ta\t0\n"):
        path.write_text(content)
        assert read_judgements(str(path), "--qrels") == {"q": {"a": 1, "b": -1}, "r": {"a": 0}}
    for content, message in (("q 0 a 1\nq 0 a 2\n", "qrels:2: document a of query q has another grade on an earlier"),
                             ("q a 1\nq a\n", "qrels:2: expected query id, 0, document id and an integer"),
                             ("q a x\n", "qrels:1: expected"), (HEADER, "no judgement in the file")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_judgements(str(path), "--qrels")


def test_runs(tmp_path):
    path = tmp_path / "run"
    path.write_text("q Q0 a 1 0.5 tag\nq Q0 b 2 0.50000000001 tag\nq Q0 c 3 0.9 tag\n")
    scores = read_run(str(path), "--flag")["q"]
    assert rank_documents(scores, "ndcg") == ["c", "b", "a"] == rank_documents(scores, "mrr")
    assert rank_documents({"a": 1, "b": 1}, "mrr") == ["a", "b"]
    assert rank_documents({"a": 1, "b": 1}, "recall") == ["b", "a"]
    for content, message in (("q Q0 a 1 0.5 t\nq Q0 a 2 0.4 t\n", "run:2: query q has document a twice"),
                             ("查询\t文本\t0.5\n", "run:1: expected query id, Q0, .* as recall.py --format trec"),
                             ("q Q0 a 1 nan t\n", "run:1: expected"), ("\n", "the file is empty")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_run(str(path), "--flag")


def test_evaluate_by_judgements(tmp_path):
    """Of three judged queries one has half of its relevant documents, one nothing, one no line in the run."""
    (tmp_path / "qrels").write_text("q 0 a 1\nq 0 b 2\nr 0 a 1\ns 0 a 1\n")
    (tmp_path / "run").write_text("q Q0 x 1 0.9 t\nq Q0 a 2 0.8 t\nr Q0 x 1 0.9 t\nu Q0 x 1 0.9 t\n")
    flags = ["--qrels", "qrels", "--recall_result_file", "run", "--metrics", "recall,success,mrr"]
    result = succeed("evaluate.py", *flags, cwd=tmp_path)
    assert result.stdout.split() == [
        "recall@1=0.0", "recall@5=16.667", "recall@10=16.667", "recall@20=16.667", "recall@50=16.667", "success@1=0.0",
        "success@5=33.333", "success@10=33.333", "success@20=33.333", "success@50=33.333", "mrr@10=16.667"]
    assert "run lacks 1 query, counted as missed: s" in result.stderr
    assert "run has 1 query that qrels does not judge" in result.stderr
    assert (tmp_path / "result.tsv").read_text() == "0.0\t16.667\t16.667\t16.667\t16.667\n"
    cut = succeed("evaluate.py", *flags, "--recall_num", 1, cwd=tmp_path).stdout
    assert "mrr@10=0.0" in cut and "success@50=0.0" in cut
    assert "--qrels takes the place of --similar_text_pair" in refuse("evaluate.py", *flags, "--show_errors", 1,
                                                                      cwd=tmp_path)
    (tmp_path / "qrels").write_text("q 0 a 0\n")
    assert "no document is judged to be relevant" in refuse("evaluate.py", *flags, cwd=tmp_path)
