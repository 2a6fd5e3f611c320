"""recall.py by its command line: its result against exact search, a kept index, single queries."""

import json
import os
import re
import shutil

import model as m
from simcse.index.exact import exact_search
from simcse.text.textfile import read_text_pairs

import numpy as np
import pytest
from conftest import FP32, read_texts, refuse, succeed
from training import embed


@pytest.fixture(scope="module")
def recalled(checkpoint, sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recalled")
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--similar_text_pair_file", sample / "dev.csv", "--recall_num", 50, *FP32, cwd=folder)
    return folder


def test_recall_result_is_exact_search_here(recalled, checkpoint, sample):
    """120 documents, ef 100: the graph finds what the matrix product finds."""
    lines = (recalled / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    got = [line.split("\t") for line in lines]
    queries = [query for query, _ in read_text_pairs(str(sample / "dev.csv"), "--flag")]
    corpus = read_texts(sample / "corpus.csv")
    assert [line[0] for line in got] == [query for query in queries for _ in range(50)]
    rows, cosines = exact_search(embed(checkpoint, queries), embed(checkpoint, corpus), 50)
    np.testing.assert_allclose([float(line[2]) for line in got], cosines.ravel(), atol=1e-5)
    agree = np.mean([line[1] == corpus[row] for line, row in zip(got, rows.ravel())])
    assert agree > 0.98, "neighbours of equal score may change places"


def test_evaluate_after_recall(recalled, sample):
    result = succeed("evaluate.py", "--similar_text_pair", sample / "dev.csv", cwd=recalled)
    figures = {line.split("=")[0]: float(line.split("=")[1]) for line in result.stdout.splitlines()}
    pairs = read_text_pairs(str(sample / "dev.csv"), "--flag")
    lines = (recalled / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    documents = [line.split("\t")[1] for line in lines]
    assert len({query for query, _ in pairs}) == len(pairs)
    for k in (1, 5, 10, 20, 50):
        hits = [target in documents[50 * row : 50 * row + k] for row, (_, target) in enumerate(pairs)]
        assert figures.pop(f"recall@{k}") == pytest.approx(100 * np.mean(hits), abs=1e-3)
    assert not figures and np.mean(hits) > 0.5, "chance would be 50 of 120"


@pytest.mark.parametrize("flags, depth", [
    (["--recall_num", 500], 120), (["--recall_num", 60, "--hnsw_ef", 5, "--hnsw_m", 8], 60),
    (["--hnsw_max_elements", 1000], 10)])
def test_recall_num_beyond_corpus_and_ef(checkpoint, sample, tmp_path, flags, depth):
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint / "model_state.pdparams", "--corpus_file",
            sample / "corpus.csv", "--similar_text_pair", sample / "dev.csv", "--recall_result_dir", tmp_path / "new",
            "--recall_result_file", "r.txt", *flags)
    assert len((tmp_path / "new" / "r.txt").read_text(encoding="utf-8").splitlines()) == 60 * depth
    assert os.listdir(tmp_path / "new") == ["r.txt"]


def test_a_query_on_several_lines_and_a_corpus_of_one(checkpoint, tmp_path):
    (tmp_path / "dev.csv").write_text("问题\t甲\n问题\t乙\n", encoding="utf-8")
    (tmp_path / "corpus.csv").write_text("甲\n", encoding="utf-8")
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", "corpus.csv",
            "--similar_text_pair", "dev.csv", cwd=tmp_path)
    lines = (tmp_path / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["问题", "甲"]] * 2
    assert succeed("evaluate.py", "--similar_text_pair", "dev.csv", cwd=tmp_path).stdout.startswith("recall@1=100.0\n")


def test_an_index_is_kept_used_again_and_refused_for_anything_else(checkpoint, sample, tmp_path):
    def flags(*more):
        return ["--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
                "--similar_text_pair", sample / "dev.csv", "--index_path", tmp_path / "index", *more]

    first = succeed("recall.py", *flags("--recall_result_file", "first.txt"), cwd=tmp_path)
    assert "kept the index" in first.stderr and "encoding" in first.stderr
    assert re.search(r"ANN recall@10 against exact search, 60 queries: (1\.0|0\.9[89])", first.stderr)
    again = succeed("recall.py", *flags("--recall_result_file", "again.txt"), cwd=tmp_path)
    assert "using the index" in again.stderr and "encoding" not in again.stderr
    kept = "ANN recall@10 against exact search, 60 halves of documents: "
    assert kept in first.stderr and kept in again.stderr
    deeper = succeed("recall.py", *flags("--hnsw_ef", 50, "--recall_result_file", "deeper.txt"), cwd=tmp_path)
    assert f"{kept}1.0000 with --hnsw_ef 100; this search has --hnsw_ef 50" in deeper.stderr
    assert "encoding" not in deeper.stderr and re.search("60 queries: .* with --hnsw_ef 50\n", deeper.stderr)
    results = tmp_path / "recall_result_dir"
    assert (results / "first.txt").read_bytes() == (results / "again.txt").read_bytes()

    (tmp_path / "other.csv").write_text("另一个语料库\n" * 120, encoding="utf-8")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = m.paddle.load(str(other / "model_state.pdparams"))
    m.paddle.save({name: tensor * 1.01 for name, tensor in weights.items()}, str(other / "model_state.pdparams"))
    for more, what in ((["--corpus_file", tmp_path / "other.csv"], "another corpus, of which no text is in .*"),
                       (["--params_path", other], "another model"),
                       (["--max_seq_length", 9], "max_seq_length 32, not 9"), (["--hnsw_m", 50], "hnsw_m 32, not 50"),
                       (["--ann_engine", "exact"], "ann_engine hnswlib, not exact"),
                       (["--index_shards", 3], "index_shards 1, not 3"),
                       (["--hnsw_max_elements", 500], "hnsw_max_elements 119, not 500")):
        assert re.search(f"index: was built with {what};", refuse("recall.py", *flags(*more), cwd=tmp_path))
    shard, kept_corpus = tmp_path / "index" / "shard_0.bin", tmp_path / "index" / "corpus.csv"
    whole = shard.read_bytes()
    for damaged in (b"", whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        shard.write_bytes(damaged)
        assert "damaged: shard_0.bin is not what was written" in refuse("recall.py", *flags(), cwd=tmp_path)
    shard.unlink()
    assert "damaged" in refuse("recall.py", *flags(), cwd=tmp_path)
    kept_corpus.write_bytes(kept_corpus.read_bytes()[:-1])
    line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--index_path", tmp_path / "index",
                  "--query", "x")
    assert "damaged: corpus.csv is not what was written" in line


def test_one_query_from_a_kept_index(checkpoint, sample, tmp_path):
    """Without the corpus, and with other settings of the graph than the defaults."""
    model = ["--device", "cpu", "--params_path", checkpoint, "--index_path", tmp_path / "index"]
    succeed("recall.py", *model, "--corpus_file", sample / "corpus.csv", "--similar_text_pair", sample / "dev.csv",
            "--hnsw_m", 16, "--index_shards", 3, cwd=tmp_path)
    lines = (tmp_path / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    query = lines[0].split("\t")[0]

    def same(got, expected):  # a query alone is another batch, of which some processors round another way
        (*texts, cosines), (*expected_texts, expected_cosines) = (
            zip(*(line.split("\t") for line in each)) for each in (got, expected))
        np.testing.assert_allclose(np.float64(cosines), np.float64(expected_cosines), atol=1e-6)
        return texts == expected_texts

    os.mkdir(tmp_path / "elsewhere")
    result = succeed("recall.py", *model, "--query", query, "--top_k", 10, cwd=tmp_path / "elsewhere")
    assert same(result.stdout.splitlines(), lines[:10]) and not os.listdir(tmp_path / "elsewhere")
    twice = succeed("recall.py", *model, "--query", query, "--query", "语义", "--top_k", 2, cwd=tmp_path).stdout
    assert same(twice.splitlines()[:2], lines[:2]) and twice.count("\n") == 4
    line = refuse("recall.py", *model, "--query", "x", "--max_seq_length", 9)
    assert "was built with max_seq_length 32, not 9;" in line


def test_copies_are_given_out_line_by_line_or_once(checkpoint, tmp_path):
    (tmp_path / "corpus.csv").write_text("甲乙\n\n丙丁\n甲乙\n戊己\n甲乙\n", encoding="utf-8")
    model = ["--device", "cpu", "--params_path", checkpoint, "--index_path", "index", "--query", "甲乙", "--format",
             "jsonl"]
    built = succeed("recall.py", *model, "--corpus_file", "corpus.csv", "--top_k", 4, cwd=tmp_path)
    assert "encoding and indexing 3 of 3 documents" in built.stderr and "2 more lines are copies" in built.stderr
    hits = json.loads(built.stdout)["results"]
    assert [(hit["rank"], hit["line"], hit["document"]) for hit in hits[:3]] == [
        (1, 1, "甲乙"), (2, 4, "甲乙"), (3, 6, "甲乙")]
    assert len(hits) == 4 and hits[3]["line"] in (3, 5)
    once = succeed("recall.py", *model, "--distinct", "--top_k", 4, cwd=tmp_path)
    assert sorted(hit["line"] for hit in json.loads(once.stdout)["results"]) == [1, 3, 5]
    assert "the corpus has only 3 distinct documents" in once.stderr
    assert "ANN recall@3 against exact search, 3 halves of documents: 1.0000 with --hnsw_ef 100" in once.stderr


def test_exact_engine(checkpoint, sample, recalled, tmp_path):
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--similar_text_pair", sample / "dev.csv", "--recall_num", 50, "--ann_engine", "exact", *FP32,
            "--index_path", "index", cwd=tmp_path)
    exact, graph = [[line.split("\t") for line in (folder / "recall_result_dir" / "recall_result.txt").read_text(
        encoding="utf-8").splitlines()] for folder in (tmp_path, recalled)]
    np.testing.assert_allclose([float(line[2]) for line in exact], [float(line[2]) for line in graph], atol=1e-5)
    assert sum(len(np.load(path)) for path in (tmp_path / "index").glob("shard_*.bin")) == 119
