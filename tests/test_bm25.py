"""BM25 and its fusion with embeddings against their formulas, and recall.py --hybrid_bm25."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

from ann_util import save_index
from simcse import files
from simcse.console import InputError
from simcse.index.bm25 import Bm25, fuse, query_words, words
from simcse.index.hits import Ranking
from simcse.index.protocols import SearchResult
from simcse.index.shards import ShardedIndex
from simcse.text.textfile import distinct, read_text_pairs

import numpy as np
import pytest
from conftest import ROOT, command, read_texts, refuse, succeed
from indexes import documents_of, fill, for_engines, manifest_of

CORPUS = ["语义索引与语义检索", "向量检索的近似算法", "。。。", "BM25 检索 模型", "中文分词与语义",
          "语义 语义 语义 bm25", "检索 模型 BM25"]


def bm25(query, corpus):
    """The scores of all documents, float64 [N], by the formula."""
    counts = [Counter(words(text)) for text in corpus]
    mean = sum(map(Counter.total, counts)) / len(corpus)
    scores = np.zeros(len(corpus))
    for word in query_words(query):
        df = sum(word in each for each in counts)
        idf = math.log(1 + (len(corpus) - df + 0.5) / (df + 0.5))
        scores += [idf * each[word] / (each[word] + 1.5 * (0.25 + 0.75 * each.total() / mean)) for each in counts]
    return scores


@pytest.mark.parametrize("one, other", [
    ("iphone 14", "iPhone14手机壳"), ("rtx 4090", "RTX4090显卡"), ("covid 19", "COVID-19"),
    ("A1234B", "零件号A-1234-B"), ("wifi_6", "WiFi6路由器"), ("b 12", "维生素B12缺乏")])
def test_letters_and_digits_are_found_written_in_one_or_apart(one, other):
    bm25 = Bm25(["向量 9 召回 x", other, "语义"])
    assert bm25.search([one], 1).rows.tolist() == [[1]]
    bm25 = Bm25(["向量 9 召回 x", one, "语义"])
    assert bm25.search([other], 1).rows.tolist() == [[1]]


def test_the_form_that_is_written_in_one_is_a_word_of_a_query_that_has_it_apart():
    assert words("iPhone14 ab 3.14") == ["iphone14", "iphone", "14", "ab", "3.14"]
    assert query_words("a-1234-b 与 iphone 14") == ["a", "1234", "b", "与", "iphone", "14", "a1234", "1234b", "a1234b",
                                                   "iphone14"]
    assert query_words("语义 检索 3.14 a b") == words("语义 检索 3.14 a b")


def test_words_are_lower_case_letters_and_digits():
    assert words("，BM25 Model！\u3000语义索引…… ") == ["bm25", "bm", "25", "model", "语义", "索引"]
    assert words("。 ！") == []


def test_width_and_case_are_folded():
    """Full-width letters and digits, ligatures, and letters whose lower case is not all that folding does."""
    for one, other in (("ＢＭ２５　ＭＯＤＥＬ", "bm25 model"), ("ﬁle", "FILE"), ("Straße", "STRASSE"),
                       ("ﾃﾞｰﾀ", "データ")):
        assert words(one) == words(other) != []
    assert Bm25(["型号Ａ１", "型号b2"]).search(["a1"], 1)[0].tolist() == [[0]]


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
    with pytest.raises(InputError, match="damaged: of another corpus; remove this folder"):
        Bm25(CORPUS[::-1], str(folder), "its digest")
    (folder / "corpus.json").unlink()
    with pytest.raises(InputError, match="damaged: of another corpus; remove this folder"):
        Bm25(CORPUS, str(folder), "its digest")
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


def test_it_appears_with_its_index(tmp_path, monkeypatch):
    """In one step, and in one step it takes the place of that of another corpus; the index' files are listed without.
    """
    path, exchanged = tmp_path / "index", []
    exchange = files.exchange

    def watched(one, other):
        exchanged.append(Bm25(["语义"], os.path.join(one, "bm25"), manifest.corpus))
        exchange(one, other)

    monkeypatch.setattr(files, "exchange", watched)
    for texts in (CORPUS, ["语义"]):
        documents = documents_of(tmp_path, *texts)
        manifest = manifest_of("exact", len(documents), 4, 1)
        manifest.corpus = files.file_digest(documents.corpus.path)
        index = ShardedIndex(manifest)
        fill(index, np.ones((len(documents), 4), "float32"))
        save_index(str(path), index, documents, hybrid=True)
        kept = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        assert (path / "bm25").is_dir() and sorted(kept["files"]) == [
            "documents.npy", "keys.npy", "row_map.npy", "shard_0.bin", "vector_keys.npy"]
    assert len(exchanged) == 1


def test_no_log_lines_but_the_projects_own():
    """Where another library, as that of Milvus does, has set up logging of everything."""
    code = ("import logging; logging.basicConfig(level=0); from simcse.index.bm25 import Bm25; "
            "Bm25(['语义', '索引']).search(['语义', '。'], 1)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["BM25 over 2 documents, 2 words"]


def test_a_corpus_without_words():
    rows, _ = Bm25(["。", "！"]).search(["语义", "。"], 3)
    assert (rows == -1).all()


def fused(cosines, scores, k):
    """Of every document that is in a ranking its points, by rank: the cosine and BM25's share of its highest; a ranking
    that lacks a document counts with its last score. Rankings are {document: score}, best first."""
    highest = max(scores.values(), default=1)
    sides = [cosines, {document: score / highest for document, score in scores.items()}]
    last = [list(cosines.values())[-1], 0 if len(scores) < k else list(sides[1].values())[-1]]
    points = {document: sum(side.get(document, lowest) for side, lowest in zip(sides, last))
              for document in dict.fromkeys([*cosines, *scores])}
    return sorted(points.items(), key=lambda each: -each[1])


def test_fusion_is_the_formula():
    """In a ranking cut off at 20 the others have its last score; some have fewer, whose others have 0."""
    random = np.random.default_rng(0)
    cosines, scores = random.uniform(-1, 1, (30, 40)), random.uniform(0.1, 9, (30, 40))
    scores[::3, 5:] = 0  # no word of the query in most documents
    scores[-1] = 0
    orders = [np.argsort(-each, axis=1, kind="stable")[:, :20] for each in (cosines, scores)]
    found = [(order, np.take_along_axis(each, order, 1)) for order, each in zip(orders, (cosines, scores))]
    found[1] = tuple(np.where(found[1][1] > 0, side, none) for side, none in zip(found[1], (-1, -np.inf)))
    dense = Ranking(*found[0], found[0][0] + 1000)
    rows, points, found_by = fuse(dense, SearchResult(*found[1]), 12)
    for number, (row, each) in enumerate(zip(rows.tolist(), points)):
        assert found_by[number].tolist() == [
            document + 1000 if document in dense.documents[number] else -1 for document in row]
        cosine_of, score_of = ({document: score for document, score in zip(side[0][number].tolist(), side[1][number])
                                if document >= 0} for side in found)
        expected = fused(cosine_of, score_of, 20)[:12]
        assert row == [document for document, _ in expected]
        np.testing.assert_allclose(each, [score for _, score in expected], rtol=1e-12)


def test_fusion_of_too_little_and_of_equal_scores():
    dense = Ranking(np.array([[7]]), np.array([[0.5]]), np.array([[7]]))
    rows, scores, _ = fuse(dense, SearchResult(np.array([[3, -1]]), np.array([[2.0, -np.inf]])), 3)
    assert rows.tolist() == [[3, 7, -1]] and scores[0].tolist() == [1.5, 0.5, -math.inf]
    dense = Ranking(np.array([[7, 3]]), np.array([[0.5, 0.5]]), np.array([[7, 3]]))
    rows, scores, _ = fuse(dense, SearchResult(np.array([[-1]]), np.array([[-np.inf]])), 2)
    assert rows.tolist() == [[7, 3]] and scores[0, 0] == scores[0, 1] == 0.5, "equal ones in the order of `dense`"


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


@pytest.mark.parametrize("engine", for_engines())
def test_recall_writes_the_fused_ranking(checkpoint, sample, tmp_path, engine):
    """Against the rankings of 100 that recall.py writes and that `Bm25` gives; --query says the same."""
    corpus = read_texts(sample / "corpus.csv")
    flags = ["--similar_text_pair", sample / "dev.csv", "--ann_engine", engine, "--index_path", "index"]
    recall(checkpoint, tmp_path, sample / "corpus.csv", *flags, "--top_k", 100, "--recall_result_file", "dense.txt")
    result = recall(checkpoint, tmp_path, sample / "corpus.csv", *flags, "--hybrid_bm25")
    assert "BM25 over 120 documents" in result.stderr and "jieba" not in result.stderr
    dense, hybrid = (read_result(tmp_path / "recall_result_dir" / name) for name in ("dense.txt", "recall_result.txt"))
    assert list(dense) == list(hybrid) and len(corpus) == len(set(corpus))
    for (query, near), rows, scores in zip(dense.items(), *Bm25(corpus).search(list(dense), 100)):
        matching = {corpus[row]: float(score) for row, score in zip(rows.tolist(), scores) if row >= 0}
        expected = fused(dict(near), matching, 100)[:10]
        assert [document for document, _ in hybrid[query]] == [document for document, _ in expected]
        np.testing.assert_allclose([score for _, score in hybrid[query]], [score for _, score in expected], rtol=1e-6)

    query, best = next(iter(hybrid.items()))
    asked = ["--device", "cpu", "--params_path", checkpoint, "--index_path", "index", "--hybrid_bm25",
             "--format", "jsonl", "--top_k", 10]
    answer = json.loads(succeed("recall.py", *asked, "--query", query, cwd=tmp_path).stdout)
    assert [each["document"] for each in answer["results"]] == [document for document, _ in best]
    np.testing.assert_allclose([each["score"] for each in answer["results"]], [score for _, score in best], rtol=1e-5)
    assert set(answer["results"][0]) == {"rank", "line", "document", "score"}
    again = succeed("recall.py", *asked, "--query", query, cwd=tmp_path).stderr
    assert "using BM25 in index/bm25" in again and "BM25 over" not in again


def test_queries_of_stdin(checkpoint, kept_index, tmp_path):
    shutil.copytree(kept_index, tmp_path / "index")  # BM25 is kept in it, which a service of the original would follow
    flags = ["--device", "cpu", "--params_path", checkpoint, "--index_path", "index", "--max_seq_length", 32,
             "--precision", "fp32", "--hybrid_bm25", "--query"]
    piped = subprocess.run(command("recall.py", *flags), capture_output=True, cwd=tmp_path,
                           input="语义\n检索\n".encode())
    assert piped.returncode == 0, piped.stderr.decode()
    assert piped.stdout.decode() == succeed("recall.py", *flags, "语义", "--query", "检索", cwd=tmp_path).stdout
    assert piped.stdout.count(b"\n") == 20


def test_words_help_a_hardly_trained_network_on_real_text(checkpoint, real_data, tmp_path):
    """On a fifth of CSL."""
    csl = real_data / "csl" / "recall"
    corpus = read_texts(csl / "corpus.csv")[::5]
    targets = set(corpus)
    pairs = [pair for pair in read_text_pairs(str(csl / "dev.csv"), "--flag") if pair[1] in targets]
    (tmp_path / "corpus.csv").write_text("".join(f"{text}\n" for text in corpus), encoding="utf-8")
    (tmp_path / "dev.csv").write_text("".join(f"{query}\t{target}\n" for query, target in pairs), encoding="utf-8")
    flags = ["--similar_text_pair", "dev.csv", "--top_k", 50, "--index_path", "index"]
    recall_at = {}
    for name, more in (("dense", []), ("hybrid", ["--hybrid_bm25"])):
        recall(checkpoint, tmp_path, "corpus.csv", *flags, *more)
        found = read_result(tmp_path / "recall_result_dir" / "recall_result.txt")
        tops = [([document for document, _ in found[query]], target) for query, target in pairs]
        recall_at[name] = [100 * np.mean([target in top[:k] for top, target in tops]) for k in (1, 10, 50)]
    assert (np.array(recall_at["hybrid"]) > recall_at["dense"]).all(), recall_at
    assert len(distinct(query for query, _ in pairs)) == len(pairs)


def test_milvus_has_no_words_without_the_corpus(tmp_path):
    (tmp_path / "file").write_text("a\tb\n")
    line = refuse("recall.py", "--params_path", "file", "--query", "x", "--ann_engine", "milvus", "--hybrid_bm25",
                  cwd=tmp_path)
    assert line.startswith("recall.py: error: --hybrid_bm25 with --ann_engine milvus needs --corpus_file")


def test_without_bm25s_it_is_one_line_before_any_work(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['bm25s'] = None\n")
    (tmp_path / "corpus").write_text("a\n")
    line = refuse("recall.py", "--params_path", "corpus", "--corpus_file", "corpus", "--query", "x", "--hybrid_bm25",
                  cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert "bm25s is not installed" in line
