"""Hard negatives: recall.py --mine_negatives against filters computed again from its result."""

import re

import numpy as np
import pytest
from conftest import FP32, refuse, succeed
from test_pipeline import embed

from data import read_rows, read_text_pairs
from mining import Miner, bigrams, overlap


def test_overlap_is_jaccard_of_letter_pairs():
    assert bigrams("语义，索引 A") == {"语义", "义索", "索引", "引a"} and bigrams("好。") == {"好"}
    assert overlap(bigrams("语义索引"), bigrams("语义 索引！")) == 1
    assert overlap(bigrams("abcd"), bigrams("bcde")) == 2 / 4
    assert overlap(bigrams("。"), bigrams("语义")) == 0


def mine(pairs, documents, cosines, depth=(1, 9), per_pair=9, max_score=0.9, max_overlap=0.8):
    """What one query "q" of cosine 0.5 with all positives gets from documents of these cosines; and the miner."""
    miner = Miner(pairs, depth, per_pair, max_score, max_overlap)
    found = np.array([[*range(len(documents)), -1]]), np.array([[*cosines, -np.inf]])
    lines = list(miner.mine(["q"], np.eye(1, 2), found, documents, lambda texts: np.full((len(texts), 2), 0.5)))
    return [line.rstrip("\n").split("\t") for line in lines], miner


def test_each_filter(capfd):
    """Known texts, the same but for a full stop, a cosine on the limit and above, a text that is there twice."""
    documents = ["正确的文本", "另一个", "正确的文本。", "太近了的", "刚刚好的", "刚刚好的", "远一些的"]
    pairs = [("q", "正确的文本"), ("q", "另一个"), ("q", "正确的文本")]
    triples, miner = mine(pairs, documents, [0.9, 0.8, 0.4, 0.46, 0.45, 0.45, 0.2])
    assert triples == [["q", positive, negative] for positive in documents[:2] for negative in documents[4::2]]
    miner.report()
    line = capfd.readouterr().err
    assert "negatives for 2 pairs: 2 with 2;" in line and "4 as the query or a positive" in line
    assert "2 by --negative_max_score" in line and "2 by --negative_max_overlap" in line
    assert [each[2] for each in mine(pairs[:1], documents, [0.1] * 7, max_overlap=1)[0]] == [
        "另一个", "正确的文本。", "太近了的", "刚刚好的", "远一些的"]
    assert [each[2] for each in mine(pairs, documents, [0.1] * 7, depth=(5, 8), per_pair=1)[0]] == ["刚刚好的"] * 2
    triples, miner = mine(pairs[:1], documents[:1], [0.1])
    assert triples == [] and miner.mined == {0: 1}
    assert not list(miner.mine(["q"], np.eye(1, 2), None, documents, None)), "a query once"


MAX_SCORE = 0.97  # of a hardly trained network, whose cosines are all high


@pytest.fixture(scope="module")
def mined(checkpoint, sample, tmp_path_factory):
    """Two queries have two targets, and one stands there twice; the whole corpus is recalled."""
    folder = tmp_path_factory.mktemp("mined")
    lines = (sample / "dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    targets = [line.split("\t")[1] for line in lines]
    more = [lines[0], *(f"{lines[row].split(chr(9))[0]}\t{targets[row + 20]}" for row in (3, 4))]
    (folder / "dev.csv").write_text("".join(lines + more), encoding="utf-8")
    result = succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file",
                     sample / "corpus.csv", "--similar_text_pair", "dev.csv", "--top_k", 120, "--ann_engine", "exact",
                     "--mine_negatives", "out/triples.csv", "--negatives_per_pair", 3, "--negative_depth", 5, 40,
                     "--negative_max_score", MAX_SCORE, "--negative_max_overlap", 0.3, *FP32, cwd=folder)
    return folder, result.stderr


def test_triples_are_what_the_filters_let_through(mined, checkpoint):
    """By cosines of the dynamic graph and the ranks of the result: no positive, in the window, the nearest first."""
    folder, log = mined
    pairs = list(dict.fromkeys(read_text_pairs(str(folder / "dev.csv"), "--flag")))
    positives = {query: [target for other, target in pairs if other == query] for query, _ in pairs}
    ranking = {}
    for query, document, cosine in read_rows(str(folder / "recall_result_dir" / "recall_result.txt"), 3, "--flag"):
        ranking.setdefault(query, {}).setdefault(document, float(cosine))
    triples = [tuple(row) for row in read_rows(str(folder / "out" / "triples.csv"), 3, "--flag")]
    embeddings = [embed(checkpoint, list(side)) for side in zip(*pairs)]

    def letters(text):
        text = re.sub(r"[\W_]", "", text.lower())
        return {text[at : at + 2] for at in range(len(text) - 1)}

    expected, looked = {}, 0
    for (query, positive), cosine in zip(pairs, (embeddings[0] * embeddings[1]).sum(axis=1)):
        passing = []
        for document, score in list(ranking[query].items())[4:40]:
            near = [len(letters(document) & letters(text)) / len(letters(document) | letters(text))
                    for text in (query, *positives[query])]
            if document not in positives[query] and score <= MAX_SCORE * cosine and max(near) <= 0.3:
                passing.append(document)
        expected[query, positive] = passing[:3]
        looked += len(passing) < 36
    assert looked, "no filter had anything to do"
    by_query = {}
    for query, positive, negative in triples:
        assert negative not in positives[query] and negative != query
        by_query.setdefault((query, positive), []).append(negative)
    assert triples == [(*pair, negative) for query in positives for positive in positives[query]
                       for pair in [(query, positive)] for negative in expected[pair]]
    assert by_query == {pair: negatives for pair, negatives in expected.items() if negatives}
    counts = re.search(r"negatives for 62 pairs: (.*);", log)[1]
    counted = {int(b): int(a) for a, b in re.findall(r"(\d+) with (\d)", counts)}
    assert counted == {n: sum(len(each) == n for each in expected.values()) for n in counted} and len(counted) > 1


def test_the_result_is_the_same_without_mining(mined, checkpoint, sample, tmp_path):
    folder, _ = mined
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--similar_text_pair", folder / "dev.csv", "--top_k", 120, "--ann_engine", "exact", *FP32, cwd=tmp_path)
    both = [(each / "recall_result_dir" / "recall_result.txt").read_bytes() for each in (folder, tmp_path)]
    assert both[0] == both[1]


def test_defaults_beside_a_shallow_result(checkpoint, sample, tmp_path):
    result = succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file",
                     sample / "corpus.csv", "--similar_text_pair", sample / "dev.csv", "--mine_negatives", "t.csv",
                     "--top_k", 3, cwd=tmp_path)
    assert "wrote t.csv" in result.stderr and "wrote recall_result_dir" in result.stderr
    lines = (tmp_path / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    triples = [line.split("\t") for line in (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 60 * 3 and 0 < len(triples) <= 60
    assert not {(query, negative) for query, _, negative in triples} & {tuple(line.split("\t")[:2]) for line in lines}


def test_real_questions(checkpoint, real_data, tmp_path):
    """Questions with several paraphrases, many near-duplicates among the documents."""
    lcqmc = real_data / "lcqmc" / "recall"
    lines = (lcqmc / "dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)[:400]
    (tmp_path / "dev.csv").write_text("".join(lines), encoding="utf-8")
    result = succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file",
                     lcqmc / "corpus.csv", "--similar_text_pair", "dev.csv", "--mine_negatives", "t.csv", cwd=tmp_path)
    positives = {}
    for query, positive in read_text_pairs(str(tmp_path / "dev.csv"), "--flag"):
        positives.setdefault(query, set()).add(positive)
    triples = list(read_rows(str(tmp_path / "t.csv"), 3, "--flag"))
    for query, positive, negative in triples:
        assert positive in positives[query] and negative not in positives[query] | {query}
        assert all(overlap(bigrams(negative), bigrams(text)) <= 0.8 for text in (query, *positives[query]))
    assert len(triples) > 100, result.stderr


@pytest.mark.parametrize("flags, message", [
    (["--negative_depth", 1, 5], "--negative_depth needs --mine_negatives"),
    (["--negative_max_overlap", 0], "--negative_max_overlap needs --mine_negatives"),
    (["--negative_max_score", 0], "--negative_max_score needs --mine_negatives"),
    (["--negatives_per_pair", 2], "--negatives_per_pair needs --mine_negatives"),
    (["--mine_negatives", "t", "--hybrid_bm25"], "--mine_negatives goes by cosines: not with --hybrid_bm25"),
    (["--mine_negatives", "t", "--negative_depth", 9, 3], "--negative_depth 9 3: the first rank is behind the last"),
    (["--mine_negatives", "t", "--negative_depth", 0, 3], "'0' is not a whole number from 1 up"),
    (["--mine_negatives", "t", "--negatives_per_pair", 42], "--negative_depth 10 50 has only 41 ranks"),
    (["--mine_negatives", "t", "--negative_max_score", 2], "'2' is not a number from 0 to 1"),
    (["--mine_negatives", "."], "argument --mine_negatives: .: is a directory"),
    (["--mine_negatives", "recall_result_dir/recall_result.txt"], "the result goes there"),
    (["--mine_negatives", "t"], "--negative_depth 10 50: the corpus has only 1 documents")])
def test_what_is_refused(tmp_path, flags, message):
    (tmp_path / "pairs").write_text("a\tb\n")
    (tmp_path / "corpus").write_text("a\n")
    line = refuse("recall.py", "--params_path", "corpus", "--corpus_file", "corpus", "--similar_text_pair", "pairs",
                  *flags, cwd=tmp_path)
    assert line.startswith("recall.py: error: ") and message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "pairs"]


def test_queries_alone_are_refused(tmp_path):
    (tmp_path / "corpus").write_text("a\n")
    line = refuse("recall.py", "--params_path", "corpus", "--corpus_file", "corpus", "--query", "x",
                  "--mine_negatives", "t", cwd=tmp_path)
    assert "--mine_negatives needs --similar_text_pair" in line
