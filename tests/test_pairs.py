"""Training pairs made from documents: simcse/training/pairs.py, scripts/make_pairs.py and the workers they use."""

import argparse
import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import data
from scripts import make_pairs as script
from simcse import workers
from simcse.console import InputError
from simcse.index.documents import Documents
from simcse.signals import SIGNALS
from simcse.text.textfile import Corpus, TextFile
from simcse.text.word_file import WordFile, encode
from simcse.text.wordpiece import load_tokenizer
from simcse.text.words import split_words
from simcse.training import pairs as p

import numpy as np
import pytest
from conftest import ENCODER, ROOT, read_texts, refuse, succeed

DOCUMENT = ("语义索引把每条文本变成一个向量，再为所有的向量建立近似检索的索引。"
            "用户输入一句话，系统就找出意思最接近的那些文本！它不要求字面相同，所以同义的说法也能召回。训练只需要没有标注的文本。")
SHORT = "联通流量不够用怎么办？"
PLAIN = p.Statistics(2, p.count_documents([split_words(DOCUMENT), split_words(SHORT)]))


def document_of(text):
    return p.Document(text, split_words(text))


def random(seed=0):
    return np.random.default_rng(seed)


def texts_of(text, spans):
    return [text[span.begin : span.end] for span in spans]


# --------------------------------------------------------------------------------------------------------------- cloze
@pytest.mark.parametrize("text, clauses", [
    ("一，二。三！", ["一", "二", "三"]),
    ("他说：“好。”然后走了", ["他说：“好", "然后走了"]),
    ("能量为214.22 kJ,共10,000次.结果2.5倍", ["能量为214.22 kJ", "共10,000次", "结果2.5倍"]),
    ("AuCl3.研究 v1.2. Then, it ends.", ["AuCl3", "研究 v1.2", "Then", "it ends"]),
    ("保持0．65％．完", ["保持0．65％", "完"]),
    ("，。", []), ("", [])])
def test_clauses(text, clauses):
    spans = p.clauses_of(text)
    assert texts_of(text, spans) == clauses
    assert all(one.next == other.begin for one, other in itertools.pairwise(spans))


def test_sentences_have_their_commas():
    assert texts_of(DOCUMENT, p.sentences_of(DOCUMENT)) == [
        "语义索引把每条文本变成一个向量，再为所有的向量建立近似检索的索引",
        "用户输入一句话，系统就找出意思最接近的那些文本",
        "它不要求字面相同，所以同义的说法也能召回",
        "训练只需要没有标注的文本"]


def test_a_cloze_query_is_a_part_of_the_document_which_mostly_lacks_it():
    left_out = 0
    runs = 400
    for seed in range(runs):
        (pair,) = p.cloze_pairs(document_of(DOCUMENT), 1, random(seed), PLAIN)
        begin = DOCUMENT.index(pair.query)
        before, after = DOCUMENT[:begin], DOCUMENT[begin + len(pair.query) :]
        if pair.document != DOCUMENT:
            left_out += 1
            assert pair.document in (before + after[1:], before + after)  # without the mark that ends the query
    assert abs(left_out - 0.9 * runs) < 4 * math.sqrt(0.9 * 0.1 * runs)


def test_cloze_queries_are_different_and_no_more_than_half_of_the_document():
    pairs = p.cloze_pairs(document_of(DOCUMENT), 100, random(), PLAIN)
    queries = [pair.query for pair in pairs]
    assert len(set(queries)) == len(queries) == 9
    assert all(p.MIN_UNITS <= p.count_units(query) <= p.count_units(DOCUMENT) / 2 for query in queries)
    assert "用户输入一句话" not in queries, "shorter than MIN_UNITS"
    assert p.cloze_pairs(document_of(SHORT), 5, random(), PLAIN) == []


def test_what_a_document_has_twice_is_no_cloze_query():
    """Left out at one place it would stand at the other."""
    text = "这是同样的一个句子。这里还有另外的一个句子。这是同样的一个句子，后面还有一个分句在这里。"
    assert list(p.cloze_queries(text)) == [
        "这里还有另外的一个句子", "这是同样的一个句子，后面还有一个分句在这里", "后面还有一个分句在这里"]


def test_words_of_other_scripts_count_as_a_chinese_character_does():
    assert p.count_units("用BM25检索, it's 2 words_") == 3 + 1 + 2 + 1 + 1
    text = "However, it maps both a query and a document, as words do not. It is slow, and needs a lot more."
    assert list(p.cloze_queries(text)) == ["It is slow, and needs a lot more", "it maps both a query and a document"]


def test_cloze_queries_have_the_lengths_of_given_ones():
    lengths = sorted(len(query) for query in p.cloze_queries(DOCUMENT))
    for wanted, nearest in ((1, lengths[0]), (99, lengths[-1]), (lengths[4], lengths[4])):
        statistics = p.Statistics(1, Counter(), np.array([wanted]))
        (pair,) = p.cloze_pairs(document_of(DOCUMENT), 1, random(), statistics)
        assert len(pair.query) == nearest
    statistics = p.Statistics(1, Counter(), np.array([1, 1, 1, 99]))
    document = document_of(DOCUMENT)
    drawn = Counter(len(p.cloze_pairs(document, 1, random(seed), statistics)[0].query) for seed in range(400))
    assert set(drawn) == {lengths[0], lengths[-1]}
    assert abs(drawn[lengths[-1]] - 100) < 4 * math.sqrt(400 * 3 / 16)


# --------------------------------------------------------------------------------------------------------------- words
def test_queries_of_words_have_words_of_the_document_in_their_order():
    pairs = p.word_pairs(document_of(DOCUMENT), 50, random(), PLAIN)
    all_words = list(dict.fromkeys(split_words(DOCUMENT)))
    counts = Counter()
    for query, document in pairs:
        assert document == DOCUMENT
        places = [all_words.index(word) for word in query.split(" ")]
        assert places == sorted(set(places))
        counts[len(places)] += 1
    assert len(pairs) == len(set(pairs)) == 50 and set(counts) == {2, 3, 4, 5, 6}


def test_a_query_lacks_a_word_of_the_document():
    statistics = p.Statistics(9, Counter(["一", "二", "三"]))
    assert p.word_pairs(document_of("一。二"), 5, random(), statistics) == []
    assert p.word_pairs(document_of("。！"), 5, random(), statistics) == []
    queries = {pair.query for pair in p.word_pairs(document_of("一。二 三、二"), 9, random(), statistics)}
    assert queries == {"一 二", "一 三", "二 三"}


def test_words_are_drawn_in_the_order_of_successive_draws():
    """The first two of three words, in their order, against the product of two probabilities."""
    weights = np.array([0.5, 2.0, 1.5])
    draws = 4000
    drawn = Counter(map(tuple, p.draw_words(weights, draws, 2, random()).tolist()))
    for first, second in itertools.permutations(range(3), 2):
        expected = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        assert abs(drawn[first, second] - draws * expected) < 4 * math.sqrt(draws * expected * (1 - expected))


def test_words_are_drawn_by_tf_idf():
    """Against the probabilities of drawing two of three words one after the other."""
    frequency = Counter({"alpha": 1, "beta": 60, "gamma": 90})
    statistics = p.Statistics(99, frequency)
    weight = {"alpha": math.log(100), "beta": 2 * math.log(100 / 60), "gamma": math.log(100 / 90)}
    total = sum(weight.values())
    runs = 1000
    document = document_of("Alpha beta gamma beta")
    drawn = Counter(p.word_pairs(document, 1, random(seed), statistics)[0].query for seed in range(runs))
    for one, other in itertools.combinations(weight, 2):
        first, second = weight[one] / total, weight[other] / total
        expected = first * second / (1 - first) + second * first / (1 - second)
        deviation = math.sqrt(runs * expected * (1 - expected))
        assert abs(drawn[f"{one} {other}"] - runs * expected) < 4 * deviation, (one, other)
    assert drawn["beta gamma"] < drawn["alpha gamma"] < drawn["alpha beta"]


def test_a_word_of_all_documents_can_be_drawn():
    statistics = p.Statistics(5, Counter({"一": 5, "二": 5, "三": 5}))
    assert len(p.word_pairs(document_of("一 二 三"), 3, random(), statistics)) == 3


def test_queries_of_words_have_the_lengths_of_given_ones():
    text = " ".join("abcdefghij")
    frequency = Counter(text.split())
    for length, count in ((1, 2), (4, 4), (99, 6)):
        statistics = p.Statistics(1, frequency, np.array([length]))
        assert {len(pair.query.split()) for pair in p.word_pairs(document_of(text), 9, random(), statistics)} == {count}


def test_documents_are_counted_once_for_each_word():
    words = map(split_words, ["语义 语义", "语义 检索", "ＡＢ", "ab。"])
    assert p.count_documents(words) == {"语义": 2, "检索": 1, "ab": 2}


# --------------------------------------------------------------------------------------------------------------- kinds
def test_kinds_share_the_pairs_and_make_up_for_each_other():
    made = p.make_document_pairs(document_of(DOCUMENT), ["cloze", "words"], 10, random(), PLAIN)
    assert {kind: len(pairs) for kind, pairs in made.items()} == {"cloze": 5, "words": 5}
    made = p.make_document_pairs(document_of(DOCUMENT), ["cloze", "words"], 40, random(), PLAIN)
    assert {kind: len(pairs) for kind, pairs in made.items()} == {"cloze": 9, "words": 31}
    made = p.make_document_pairs(document_of(SHORT), ["cloze", "words"], 4, random(), PLAIN)
    assert made["cloze"] == [] and len(made["words"]) == 4
    document = document_of(DOCUMENT)
    kinds = Counter()
    for seed in range(400):
        kinds.update(p.make_document_pairs(document, p.KINDS, 1, random(seed), PLAIN).keys())
    assert kinds.total() == 400 and abs(kinds["cloze"] - 200) < 4 * math.sqrt(400 / 4)


def test_words_are_kept_by_blocks():
    with tempfile.TemporaryFile() as file:
        words = WordFile(file)
        blocks = [[["语义", "a\"\n"], []], [["索引"]]]
        for block in blocks:
            words.append(encode(block))
        words.flush()
        assert [words.read(1), words.read(0)] == [blocks[1], blocks[0]]


def test_workers_do_not_write_the_words_again(sample, tmp_path, monkeypatch):
    """What is left in the buffer when they are forked would be written by each of them."""
    class CompleteWordFile(WordFile):
        def read(self, block):
            assert os.fstat(self._file.fileno()).st_size == self._begins[-1]
            return super().read(block)

    monkeypatch.setattr(script, "WordFile", CompleteWordFile)
    monkeypatch.setattr(script, "BLOCK_DOCUMENTS", 7)
    make(arguments(sample / "corpus.csv", tmp_path / "pairs.csv", workers=2))


@pytest.mark.parametrize("text, expected", [
    (DOCUMENT, True), (SHORT, True), ("语义 检索 编码", True), ("语义 检索", False), ("。", False)])
def test_whether_a_text_gives_pairs(text, expected):
    assert p.can_make_pairs(text) is expected


# -------------------------------------------------------------------------------------------------------------- script
@pytest.fixture
def corpus(tmp_path):
    """Six lines: a document with ids twice, a short one, a blank line, one of no words; and what is read of them."""
    lines = [f"a\t{DOCUMENT}", f"b\t{SHORT}", "", f"c\t{DOCUMENT}", "d\t。。。", "e\t语义"]
    path = tmp_path / "corpus.csv"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def arguments(corpus, output, **changed):
    defaults = {"corpus_file": str(corpus), "output_file": str(output), "query_file": None, "pairs_per_document": 4,
                "kinds": list(p.KINDS), "seed": 1000, "workers": 1}
    return argparse.Namespace(**{**defaults, **changed})


def make(args):
    """What the script does with its flags; the report."""
    documents = Documents(Corpus(args.corpus_file, "--corpus_file"))
    return script.describe(args, documents, script.make_corpus_pairs(args, documents))


def test_the_report_says_what_was_made_of_which_documents(corpus, tmp_path):
    report = make(arguments(corpus, tmp_path / "pairs.csv"))
    assert report == (
        f"wrote {tmp_path}/pairs.csv: 8 pairs of 2 documents, 2 cloze, 6 words; "
        f"3 documents gave no cloze pairs ({corpus}:2, {corpus}:5, {corpus}:6); "
        f"2 documents gave no words pairs ({corpus}:5, {corpus}:6); "
        f"2 documents without any pair ({corpus}:5, {corpus}:6); "
        f"1 copy of an earlier document ({corpus}:4); 1 line blank or skipped ({corpus}:3)")
    rows = TextFile(str(tmp_path / "pairs.csv"), "--flag", 2)
    assert [row[1] == SHORT for row in rows] == 4 * [False] + 4 * [True]


def test_the_folder_of_the_output_is_made(corpus, tmp_path):
    """Or the error names the flag, as where a file is in its place."""
    make(arguments(corpus, tmp_path / "new" / "pairs.csv"))
    assert (tmp_path / "new" / "pairs.csv").stat().st_size
    with pytest.raises(InputError, match="--output_file /proc/none/pairs.csv"):
        make(arguments(corpus, "/proc/none/pairs.csv"))


def test_the_same_seed_gives_the_same_file_in_every_process(sample, tmp_path, monkeypatch):
    """By another process alone, with other hashes of texts; and by two workers of this one, in small blocks."""
    flags = ["--corpus_file", sample / "corpus.csv", "--query_file", sample / "train_unsupervised.csv", "--workers", 1]
    succeed("scripts/make_pairs.py", *flags, "--output_file", "one", "--seed", 5, cwd=tmp_path)
    monkeypatch.setattr(script, "BLOCK_DOCUMENTS", 7)
    args = arguments(sample / "corpus.csv", tmp_path / "two", query_file=str(sample / "train_unsupervised.csv"),
                     pairs_per_document=10, seed=5, workers=2)
    make(args)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    args.seed = 6
    make(args)
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_pairs_do_not_depend_on_other_documents_but_for_their_words(corpus, tmp_path):
    """Cloze pairs count no words: a longer corpus begins with the same pairs."""
    make(arguments(corpus, tmp_path / "short", kinds=["cloze"]))
    with open(corpus, "a", encoding="utf-8") as file:
        file.write(f"f\t{DOCUMENT[9:]}\n")
    make(arguments(corpus, tmp_path / "long", kinds=["cloze"]))
    short, long = (tmp_path / "short").read_text(), (tmp_path / "long").read_text()
    assert long.startswith(short) and long != short


def test_training_takes_the_pairs(sample, tmp_path):
    make(arguments(sample / "corpus.csv", tmp_path / "pairs.csv"))
    texts = TextFile(str(tmp_path / "pairs.csv"), "--train_set_file", (1, 2, 3))
    assert texts.columns == 2
    assert len(texts) == len((tmp_path / "pairs.csv").read_text(encoding="utf-8").splitlines())
    args = argparse.Namespace(max_seq_length=32, keep_duplicate_negatives=False, crop_rate=0.0, seed=1)
    batch = data.make_batch(texts, load_tokenizer(str(ENCODER)), args, range(0, 40, 3), epoch=0)
    assert batch.size == 14 and batch.hard_negative is None


def test_lengths_of_a_query_file_leave_out_blanks(tmp_path):
    (tmp_path / "queries.csv").write_text("1\t语义 索引\n2\tiphone 14\n", encoding="utf-8")
    args = argparse.Namespace(query_file=str(tmp_path / "queries.csv"))
    assert script.read_query_lengths(args).tolist() == [4, 8]


def test_a_corpus_that_gives_no_pair_is_refused(tmp_path):
    (tmp_path / "corpus.csv").write_text(f"{SHORT}\n", encoding="utf-8")
    message = "--corpus_file .*: its texts are too short for --kinds cloze; not one gives a pair"
    with pytest.raises(InputError, match=message):
        make(arguments(tmp_path / "corpus.csv", tmp_path / "pairs.csv", kinds=["cloze"]))
    assert not (tmp_path / "pairs.csv").exists()


def test_flags():
    assert script.kind_list("words, cloze,words") == ["cloze", "words"]
    line = refuse("scripts/make_pairs.py", "--corpus_file", __file__, "--output_file", "x", "--kinds", "cloze,span")
    assert line.startswith("make_pairs.py: error: argument --kinds: "
                           "expected a comma-separated list of cloze, words; got 'span'")


def test_copies_and_lines_that_are_no_rows(tmp_path):
    (tmp_path / "corpus.csv").write_text("一\n\n二\n一\n \n二\n三\n", encoding="utf-8")
    corpus = Corpus(str(tmp_path / "corpus.csv"), "--flag")
    assert [corpus.place(row)[-2:] for row in Documents(corpus).copies()] == [":4", ":6"]
    assert corpus.blank_or_skipped().tolist() == [2, 5]
    assert read_texts(tmp_path / "corpus.csv") == list(corpus)
    (tmp_path / "plain.csv").write_text("一\n二", encoding="utf-8")
    assert not len(Corpus(str(tmp_path / "plain.csv"), "--flag").blank_or_skipped())


# ------------------------------------------------------------------------------------------------------------- workers
def test_results_come_in_order_and_are_not_computed_far_ahead():
    taken = []

    def items():
        for item in range(50):
            taken.append(item)
            yield item

    def compute(item):
        time.sleep(0.002 * (item % 3))
        return item, os.getpid()

    results = workers.map_in_order(compute, items(), 2)
    assert next(results)[0] == 0 and len(taken) == 2 * workers.AHEAD
    rest = list(results)
    assert [number for number, _ in rest] == list(range(1, 50))
    processes = {process for _, process in rest}
    assert len(processes) == 2 and os.getpid() not in processes
    assert list(workers.map_in_order(lambda item: os.getpid(), [1], 1)) == [os.getpid()]


def test_a_worker_that_is_killed_is_an_error_in_one_line():
    def compute(item):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(InputError, match="--workers 2: one of them has been killed; if memory ran out"):
        list(workers.map_in_order(compute, range(9), 2))


def test_an_error_of_a_worker_is_the_callers():
    def compute(item):
        raise InputError(f"file:{item}: wrong")

    with pytest.raises(InputError, match="file:3: wrong"):
        list(workers.map_in_order(compute, [3, 4], 2))


def test_signals_wait_while_workers_are_forked(monkeypatch):
    """Python loses the exception of a handler that runs during a fork; workers take signals again."""
    blocked = []

    class Executor(ProcessPoolExecutor):
        def submit(self, *arguments):
            blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
            return super().submit(*arguments)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Executor)
    of_workers = list(workers.map_in_order(lambda item: signal.pthread_sigmask(signal.SIG_BLOCK, []), [1, 2], 2))
    assert all(signals.issuperset(SIGNALS) for signals in blocked) and len(blocked) == 2
    assert not any(signals.intersection(SIGNALS) for signals in of_workers)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []).intersection(SIGNALS)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends them")
def test_workers_end_with_a_parent_that_is_killed():
    code = ("import os, time\nfrom simcse.workers import map_in_order\n"
            "def compute(item):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(60)\n"
            "list(map_in_order(compute, range(2), 2))")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        processes = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
        assert parent.stdout.read() == b"", "the pipe is closed when the last of them has ended"
    assert len(set(processes)) == 2
