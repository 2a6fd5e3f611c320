"""Hard negatives: scripts/mine_negatives.py against filters computed again from the recall result."""

import argparse
import re

from scripts.mine_negatives import Miner, bigrams, overlap, read_pairs
from simcse.text.textfile import read_rows, read_text_pairs

import pytest
from conftest import FP32, read_texts, refuse, succeed
from training import embed


def test_overlap_is_jaccard_of_letter_pairs():
    assert bigrams("语义，索引 A") == {"语义", "义索", "索引", "引a"} and bigrams("好。") == {"好"}
    assert overlap(bigrams("语义索引"), bigrams("语义 索引！")) == 1
    assert overlap(bigrams("abcd"), bigrams("bcde")) == 2 / 4
    assert overlap(bigrams("。"), bigrams("语义")) == 0


def mine(positives, documents, cosines, per_pair=9, max_score=0.9, max_overlap=0.8):
    """What one query "q" of cosine 0.5 with all positives gets from documents of these cosines; and the miner."""
    miner = Miner(per_pair, max_score, max_overlap)
    candidates = {}
    for document, cosine in zip(documents, cosines):
        candidates.setdefault(document, cosine)
    lines = list(miner.mine("q", dict.fromkeys(positives, 0.5), candidates))
    return [line.rstrip("\n").split("\t") for line in lines], miner


def test_each_filter(capfd):
    """Known texts, the same but for a full stop, a cosine on the limit and above, a text that is there twice."""
    documents = ["正确的文本", "另一个", "正确的文本。", "太近了的", "刚刚好的", "刚刚好的", "远一些的"]
    triples, miner = mine(documents[:2], documents, [0.9, 0.8, 0.4, 0.46, 0.45, 0.45, 0.2])
    assert triples == [["q", positive, negative] for positive in documents[:2] for negative in documents[4::2]]
    miner.report()
    line = capfd.readouterr().err
    assert "negatives for 2 pairs: 2 with 2;" in line and "4 as the query or a positive" in line
    assert "2 by --negative_max_score" in line and "2 by --negative_max_overlap" in line
    assert [each[2] for each in mine(documents[:1], documents, [0.1] * 7, max_overlap=1)[0]] == [
        "另一个", "正确的文本。", "太近了的", "刚刚好的", "远一些的"]
    assert [each[2] for each in mine(documents[:2], documents[4:], [0.1] * 3, per_pair=1)[0]] == ["刚刚好的"] * 2
    triples, miner = mine(documents[:1], documents[:1], [0.1])
    assert triples == [] and miner.mined == {0: 1}


FILES = ["--similar_text_pair", "dev.csv", "--positive_scores", "cosines.txt", "--recall_result_file",
         "recall_result_dir/recall_result.txt"]
MAX_SCORE = 0.97  # of a hardly trained network, whose cosines are all high


def mine_after_recall(folder, checkpoint, corpus, depth, *flags):
    """recall.py, predict.py and mine_negatives.py for dev.csv in a folder; what the last of them said."""
    model = ["--device", "cpu", "--params_path", checkpoint, *FP32]
    succeed("recall.py", *model, "--corpus_file", corpus, "--similar_text_pair", "dev.csv", "--top_k", depth,
            "--ann_engine", "exact", cwd=folder)
    scores = succeed("predict.py", *model, "--text_pair_file", "dev.csv", cwd=folder).stdout
    (folder / "cosines.txt").write_text(scores, encoding="utf-8")
    return succeed("scripts/mine_negatives.py", *FILES, "--output_file", "out/triples.csv", *flags, cwd=folder).stderr


@pytest.fixture(scope="module")
def mined(checkpoint, sample, tmp_path_factory):
    """Two queries have two targets, and one stands there twice; the whole corpus is recalled."""
    folder = tmp_path_factory.mktemp("mined")
    lines = (sample / "dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    targets = [line.split("\t")[1] for line in lines]
    more = [lines[0], *(f"{lines[row].split(chr(9))[0]}\t{targets[row + 20]}" for row in (3, 4))]
    (folder / "dev.csv").write_text("".join(lines + more), encoding="utf-8")
    return folder, mine_after_recall(folder, checkpoint, sample / "corpus.csv", 120, "--negatives_per_pair", 3,
                                     "--negative_depth", 5, 40, "--negative_max_score", MAX_SCORE,
                                     "--negative_max_overlap", 0.3)


def test_triples_are_what_the_filters_let_through(mined, checkpoint):
    """By cosines of the dynamic graph and the ranks of the result: no positive, in the window, the nearest first."""
    folder, log = mined
    pairs = list(dict.fromkeys(read_text_pairs(str(folder / "dev.csv"), "--flag")))
    positives = {query: [target for other, target in pairs if other == query] for query, _ in pairs}
    ranking = {}
    for row in read_rows(str(folder / "recall_result_dir" / "recall_result.txt"), 3, "--flag"):
        query, document, cosine = row.fields
        ranking.setdefault(query, {}).setdefault(document, float(cosine))
    triples = [tuple(row.fields) for row in read_rows(str(folder / "out" / "triples.csv"), 3, "--flag")]
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


def test_targets_by_id_are_the_same(mined, checkpoint, sample, tmp_path):
    """The same cosines and the same triples as by text; a target whose id the corpus lacks has none, and no cosine."""
    folder, _ = mined
    ids = {text: f"d{number}" for number, text in enumerate(read_texts(sample / "corpus.csv"))}
    (tmp_path / "corpus.csv").write_text("".join(f"{id}\t{text}\n" for text, id in ids.items()), encoding="utf-8")
    pairs = [f"{query}\t{ids[target]}\n" for query, target in read_text_pairs(str(folder / "dev.csv"), "--flag")]
    (tmp_path / "dev.csv").write_text("".join(pairs) + "查询\td999\n", encoding="utf-8")
    by_id = ["--targets", "id", "--corpus_file", "corpus.csv"]
    scores = succeed("predict.py", "--device", "cpu", "--params_path", checkpoint, *FP32, "--text_pair_file", "dev.csv",
                     *by_id, cwd=tmp_path)
    assert scores.stdout == (folder / "cosines.txt").read_text() + "nan\n"
    assert "dev.csv:64 (no document has the id d999)" in scores.stderr
    (tmp_path / "cosines.txt").write_text(scores.stdout)
    succeed("scripts/mine_negatives.py", *FILES[:4], *by_id, "--recall_result_file", folder / FILES[5], "--output_file",
            "triples.csv", "--negatives_per_pair", 3, "--negative_depth", 5, 40, "--negative_max_score", MAX_SCORE,
            "--negative_max_overlap", 0.3, cwd=tmp_path)
    assert (tmp_path / "triples.csv").read_bytes() == (folder / "out" / "triples.csv").read_bytes()
    assert "--targets id and --corpus_file go together" in refuse(
        "scripts/mine_negatives.py", *FILES, "--output_file", "x", "--targets", "id", cwd=folder)


def test_real_questions(checkpoint, real_data, tmp_path):
    """Questions with several paraphrases, many near-duplicates among the documents; the defaults."""
    lcqmc = real_data / "lcqmc" / "recall"
    lines = (lcqmc / "dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)[:400]
    (tmp_path / "dev.csv").write_text("".join(lines), encoding="utf-8")
    log = mine_after_recall(tmp_path, checkpoint, lcqmc / "corpus.csv", 50)
    positives = {}
    for query, positive in read_text_pairs(str(tmp_path / "dev.csv"), "--flag"):
        positives.setdefault(query, set()).add(positive)
    triples = [row.fields for row in read_rows(str(tmp_path / "out" / "triples.csv"), 3, "--flag")]
    for query, positive, negative in triples:
        assert positive in positives[query] and negative not in positives[query] | {query}
        assert all(overlap(bigrams(negative), bigrams(text)) <= 0.8 for text in (query, *positives[query]))
    assert len(triples) > 100, log


@pytest.fixture
def files(tmp_path):
    """Two pairs of one query, whose two blocks of two documents recall.py wrote one after the other."""
    (tmp_path / "recall_result_dir").mkdir()
    (tmp_path / "dev.csv").write_text("q\ta\nq\tb\n")
    (tmp_path / "cosines.txt").write_text("0.9\n0.8\n")
    (tmp_path / "recall_result_dir" / "recall_result.txt").write_text("q\tx\t0.5\nq\ty\t0.4\n" * 2)
    return tmp_path


def test_a_query_that_stands_there_twice_has_its_ranks_once(files):
    result = succeed("scripts/mine_negatives.py", *FILES, "--output_file", "t", "--negative_depth", 2, 3,
                     "--negatives_per_pair", 2, cwd=files)
    assert (files / "t").read_text() == "q\ta\ty\nq\tb\ty\n"
    assert "--negative_depth 2 3: recall_result_dir/recall_result.txt has at most 2 documents a query" in result.stderr


def test_scores_stand_beside_the_lines_of_the_file(files):
    """predict.py prints nan for a blank and for a malformed line; their places are not taken by others' scores."""
    (files / "dev.csv").write_text("q\ta\n\nq\nr\tb\nq\tc\n")
    (files / "cosines.txt").write_text("0.9\nnan\nnan\n0.8\n0.7\n")
    args = argparse.Namespace(similar_text_pair=str(files / "dev.csv"), positive_scores=str(files / "cosines.txt"),
                              strict_data=False, corpus_file=None)
    assert read_pairs(args) == {"q": {"a": 0.9, "c": 0.7}, "r": {"b": 0.8}}


@pytest.mark.parametrize("flags, message", [
    (["--output_file", "t", "--negative_depth", 9, 3], "--negative_depth 9 3: the first rank is larger than the last"),
    (["--output_file", "t", "--negative_depth", 0, 3], "expected an integer >= 1, got '0'"),
    (["--output_file", "t", "--negatives_per_pair", 42], "--negative_depth 10 50 has only 41 ranks"),
    (["--output_file", "t", "--negative_max_score", 2], "expected a number in [0, 1], got '2'"),
    (["--output_file", "."], "--output_file .: is a folder"),
    (["--output_file", "t"], "--negative_depth 10 50: recall_result_dir/recall_result.txt has at most 2 documents a "
                             "query; recall.py --recall_num 50 gives more"),
    (["--output_file", "t", "--positive_scores", "dev.csv"], "dev.csv: 2 of 2 lines are malformed"),
    (["--output_file", "t", "--positive_scores", "one"], "--positive_scores one: 1 line for 2 lines of dev.csv"),
    (["--output_file", "t", "--positive_scores", "words"], "--positive_scores words:2: 'x' is not a number"),
    (["--output_file", "t", "--positive_scores", "nan"], "--positive_scores nan:2: 'nan' is not a number")])
def test_what_is_refused(files, flags, message):
    (files / "one").write_text("1\n")
    (files / "words").write_text("1\nx\n")
    (files / "nan").write_text("1\nnan\n")
    line = refuse("scripts/mine_negatives.py", *FILES, *flags, cwd=files)
    assert line.startswith("mine_negatives.py: error: ") and message in line
    assert not (files / "t").exists()
