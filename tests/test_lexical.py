"""BM25 and its fusion with embeddings against their formulas, and recall.py --hybrid_bm25."""

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, command, refuse, succeed

from console import InputError
from data import distinct, read_text_pairs, read_texts
from lexical import Bm25, fuse, words

CORPUS = ["语义索引与语义检索", "向量检索的近似算法", "。。。", "BM25 检索 模型", "中文分词与语义",
          "语义 语义 语义 bm25", "检索 模型 BM25"]


def bm25(query, corpus):
    """The scores of all documents, float64 [N], by the formula."""
    counts = [Counter(words(text)) for text in corpus]
    mean = sum(map(Counter.total, counts)) / len(corpus)
    scores = np.zeros(len(corpus))
    for word in words(query):
        df = sum(word in each for each in counts)
        idf = math.log(1 + (len(corpus) - df + 0.5) / (df + 0.5))
        scores += [idf * each[word] / (each[word] + 1.5 * (0.25 + 0.75 * each.total() / mean)) for each in counts]
    return scores


def rrf(rankings, weights=(1, 1)):
    """Of every document its score and its rank in the first ranking, as a sorted list (-score, rank, document)."""
    documents = dict.fromkeys(document for ranking in rankings for document in ranking)
    return sorted((-sum(weight / (61 + ranking.index(document)) for weight, ranking in zip(weights, rankings)
                        if document in ranking),
                   rankings[0].index(document) if document in rankings[0] else math.inf, document)
                  for document in documents)


def test_words_are_lower_case_letters_and_digits():
    assert words("，BM25 Model！\u3000语义索引…… ") == ["bm25", "model", "语义", "索引"]
    assert words("。 ！") == []


def test_bm25_is_the_formula():
    """Repeated words, words that are nowhere, equal scores, fewer documents than asked for, and none."""
    queries = ["语义检索", "语义语义bm25", "BM25模型", "不在", "？"]
    rows, scores = Bm25(CORPUS).search(queries, 6)
    assert rows.dtype == np.int64 and scores.dtype == np.float32 and rows.shape == scores.shape == (5, 6)
    for query, row, score in zip(queries, rows.tolist(), scores):
        expected = bm25(query, CORPUS)
        found = [document for document in np.argsort(-expected, kind="stable").tolist() if expected[document] > 0][:6]
        assert row == found + [-1] * (6 - len(found))
        np.testing.assert_allclose(score[: len(found)], expected[found], rtol=1e-5)
        assert (score[len(found):] == -np.inf).all()
    assert rows[2, :2].tolist() == [3, 6] and scores[2, 0] == scores[2, 1], "of equal scores the lower row first"
    assert Bm25(CORPUS).search(queries, 1)[0].tolist() == rows[:, :1].tolist()


def test_kept_and_read_again(tmp_path, capsys):
    queries, folder = ["语义检索", "BM25模型", "不在", "？"], tmp_path / "bm25"
    built = Bm25(CORPUS, str(folder)).search(queries, 6)
    assert "BM25 over 7 documents" in capsys.readouterr().err
    kept = Bm25(CORPUS, str(folder)).search(queries, 6)
    assert capsys.readouterr().err == f"using BM25 in {folder}\n"
    for one, other in zip(built, kept):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match="damaged: of 7 documents instead of 6"):
        Bm25(CORPUS[1:], str(folder))
    (folder / "vocab.index.json").write_text("{")
    with pytest.raises(InputError, match="bm25: damaged: .*; remove this folder"):
        Bm25(CORPUS, str(folder))
    (folder / "data.csc.index.npy").unlink()
    with pytest.raises(InputError, match="damaged"):
        Bm25(CORPUS, str(folder))
    Bm25(CORPUS, str(folder / "vocab.index.json" / "below a file"))
    assert "BM25 is not kept in " in capsys.readouterr().err
    Bm25(["。"], str(tmp_path / "no words"))
    assert not (tmp_path / "no words").exists()


def test_no_log_lines_but_the_projects_own():
    """Where another library, as that of Milvus does, has set up logging of everything."""
    code = ("import logging; logging.basicConfig(level=0); from lexical import Bm25; "
            "Bm25(['语义', '索引']).search(['语义', '。'], 1)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["BM25 over 2 documents, 2 words"]


def test_a_corpus_without_words():
    rows, _ = Bm25(["。", "！"]).search(["语义", "。"], 3)
    assert (rows == -1).all()


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_fusion_is_the_formula(weight):
    random = np.random.default_rng(0)
    dense, lexical = (np.array([random.permutation(40)[:count] for _ in range(30)]) for count in (20, 15))
    lexical[::3, 9:] = -1
    rows, scores = fuse((dense, None), (lexical, None), 12, weight)
    for near, matching, row, score in zip(dense.tolist(), lexical.tolist(), rows.tolist(), scores):
        expected = rrf([near, [each for each in matching if each >= 0]], (1, weight))[:12]
        assert row == [document for *_, document in expected]
        np.testing.assert_allclose(score, [-negated for negated, *_ in expected], rtol=1e-12)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_fusion_by_score_is_the_formula(weight):
    """The cosine plus BM25's share of its highest; in a ranking cut off at 20 the others have its last score."""
    random = np.random.default_rng(0)
    cosines, scores = random.uniform(-1, 1, (30, 40)), random.uniform(0.1, 9, (30, 40))
    scores[::3, 5:] = 0  # no word of the query in most documents
    scores[-1] = 0
    orders = [np.argsort(-each, axis=1, kind="stable")[:, :20] for each in (cosines, scores)]
    found = [(order, np.take_along_axis(each, order, 1)) for order, each in zip(orders, (cosines, scores))]
    found[1] = tuple(np.where(found[1][1] > 0, side, none) for side, none in zip(found[1], (-1, -np.inf)))
    rows, fused = fuse(*found, 12, weight, "score")
    for number, (row, score) in enumerate(zip(rows.tolist(), fused)):
        known = np.maximum(cosines[number], np.sort(cosines[number])[-20])
        matched = np.maximum(scores[number], np.sort(scores[number])[-20]) / max(1e-9, scores[number].max())
        points = known + weight * matched
        union = [each for each in range(40) if each in orders[0][number] or each in found[1][0][number]]
        assert row == sorted(union, key=lambda each: -points[each])[:12]
        np.testing.assert_allclose(score, points[row], rtol=1e-12)


def test_fusion_of_too_little_and_of_equal_scores():
    rows, scores = fuse((np.array([[7]]), None), (np.array([[3, -1]]), None), 3)
    assert rows.tolist() == [[7, 3, -1]] and scores[0, 0] == scores[0, 1] == 1 / 61 and scores[0, 2] == -math.inf


# ------------------------------------------------------------------------------------------------------- recall.py
def recall(checkpoint, folder, corpus, *flags):
    return succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", corpus, *flags,
                   cwd=folder)


def read_result(path):
    """Of every query its documents and their scores, best first."""
    found = {}
    for query, document, score in (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()):
        found.setdefault(query, []).append((document, float(score)))
    return found


@pytest.mark.parametrize("engine", ["exact", "hnswlib"])
def test_recall_writes_the_fused_ranking(checkpoint, sample, tmp_path, engine):
    """Against the rankings of 100 that recall.py writes and that `Bm25` gives; --query says the same."""
    corpus = read_texts(str(sample / "corpus.csv"), "--flag")
    flags = ["--similar_text_pair", sample / "dev.csv", "--ann_engine", engine, "--index_path", "index"]
    recall(checkpoint, tmp_path, sample / "corpus.csv", *flags, "--top_k", 100, "--recall_result_file", "dense.txt")
    result = recall(checkpoint, tmp_path, sample / "corpus.csv", *flags, "--hybrid_bm25", "--bm25_weight", 0.7)
    assert "BM25 over 120 documents" in result.stderr and "jieba" not in result.stderr
    dense, fused = (read_result(tmp_path / "recall_result_dir" / name) for name in ("dense.txt", "recall_result.txt"))
    assert list(dense) == list(fused) and len(corpus) == len(set(corpus))
    matching = Bm25(corpus).search(list(dense), 100)[0].tolist()
    for (query, near), rows in zip(dense.items(), matching):
        expected = rrf([[document for document, _ in near], [corpus[row] for row in rows if row >= 0]], (1, 0.7))[:10]
        assert [document for document, _ in fused[query]] == [document for *_, document in expected]
        np.testing.assert_allclose([score for _, score in fused[query]], [-negated for negated, *_ in expected])

    query, best = next(iter(fused.items()))
    asked = ["--device", "cpu", "--params_path", checkpoint, "--index_path", "index", "--hybrid_bm25", "--bm25_weight",
             0.7, "--format", "jsonl", "--top_k", 10]
    answer = json.loads(succeed("recall.py", *asked, "--query", query, cwd=tmp_path).stdout)
    assert [(each["document"], each["score"]) for each in answer["results"]] == best
    assert set(answer["results"][0]) == {"rank", "document", "score"}
    again = succeed("recall.py", *asked, "--query", query, cwd=tmp_path).stderr
    assert "using BM25 in index/bm25" in again and "BM25 over" not in again


def test_queries_of_stdin(checkpoint, kept_index, tmp_path):
    flags = ["--device", "cpu", "--params_path", checkpoint, "--index_path", kept_index, "--max_seq_length", 32,
             "--precision", "fp32", "--hybrid_bm25", "--query"]
    piped = subprocess.run(command("recall.py", *flags), capture_output=True, cwd=tmp_path,
                           input="语义\n检索\n".encode())
    assert piped.returncode == 0, piped.stderr.decode()
    assert piped.stdout.decode() == succeed("recall.py", *flags, "语义", "--query", "检索", cwd=tmp_path).stdout
    assert piped.stdout.count(b"\n") == 20


def test_words_help_a_hardly_trained_network_on_real_text(checkpoint, real_data, tmp_path):
    csl = real_data / "csl" / "recall"
    pairs = read_text_pairs(str(csl / "dev.csv"), "--flag")
    flags = ["--similar_text_pair", csl / "dev.csv", "--top_k", 50, "--index_path", "index"]
    recall_at = {}
    for name, more in (("dense", []), ("rrf", ["--hybrid_bm25"]), ("score", ["--hybrid_bm25", "--fusion", "score"])):
        recall(checkpoint, tmp_path, csl / "corpus.csv", *flags, *more)
        found = read_result(tmp_path / "recall_result_dir" / "recall_result.txt")
        tops = [([document for document, _ in found[query]], target) for query, target in pairs]
        recall_at[name] = [100 * np.mean([target in top[:k] for top, target in tops]) for k in (1, 10, 50)]
    assert (np.array(recall_at["rrf"]) > recall_at["dense"]).all(), recall_at
    assert (np.array(recall_at["score"]) > recall_at["dense"]).all(), recall_at
    assert len(distinct(query for query, _ in pairs)) == len(pairs)


@pytest.mark.parametrize("flags, message", [
    (["--similar_text_pair", "file", "--corpus_file", "file", "--bm25_weight", 2], "--bm25_weight needs --hybrid_bm25"),
    (["--query", "x", "--corpus_file", "file", "--fusion", "score"], "--fusion needs --hybrid_bm25"),
    (["--similar_text_pair", "file", "--corpus_file", "file", "--hybrid_bm25", "--bm25_weight", 0],
     "argument --bm25_weight: '0' is not a number above 0"),
    (["--query", "x", "--ann_engine", "milvus", "--hybrid_bm25"],
     "--hybrid_bm25 with --ann_engine milvus needs --corpus_file")])
def test_what_is_refused(tmp_path, flags, message):
    (tmp_path / "file").write_text("a\tb\n")
    line = refuse("recall.py", "--params_path", "file", *flags, cwd=tmp_path)
    assert line.startswith("recall.py: error: ") and message in line


def test_without_bm25s_it_is_one_line_before_any_work(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['bm25s'] = None\n")
    (tmp_path / "corpus").write_text("a\n")
    line = refuse("recall.py", "--params_path", "corpus", "--corpus_file", "corpus", "--query", "x", "--hybrid_bm25",
                  cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert "bm25s is not installed" in line
