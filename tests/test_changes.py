"""An index that follows its corpus: what is encoded again, and that the result is as if built from nothing."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import FP32, ROOT, contents, read_texts, refuse, succeed, succeed_on


def write(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


@pytest.fixture
def changed(sample, tmp_path):
    """The sample's corpus in two states: with copies, lines gone, new ones at the beginning and in between.

    New ones have a multiple of LENGTH_MULTIPLE tokens, [CLS] and [SEP] included: the longest text of a window is not
    padded further, and on some processors the last bits of an embedding depend on the padding.
    """
    before = read_texts(sample / "corpus.csv")
    after = ["全新的文本啊", *before[3:60], "另一条也是新的文本啊", *before[60:], before[10], "末尾的文本啊"]
    write(tmp_path / "before.csv", [*before, before[0]])
    write(tmp_path / "after.csv", after)
    return tmp_path


def recall(checkpoint, sample, *flags):
    """Texts are encoded one by one, so that an embedding does not depend on what is beside it in a batch."""
    return ["recall.py", "--device", "cpu", "--params_path", checkpoint, "--similar_text_pair", sample / "dev.csv",
            *FP32, "--batch_size", 1, *flags]


@pytest.mark.parametrize("engine, ranks", [("hnswlib", 1), ("exact", 1), ("hnswlib", 2)])
def test_the_result_is_that_of_an_index_built_from_nothing(checkpoint, sample, changed, engine, ranks):
    flags = recall(checkpoint, sample, "--ann_engine", engine)
    succeed(*flags, "--corpus_file", "before.csv", "--index_path", "kept", cwd=changed)
    (changed / "kept" / "bm25").mkdir()  # of the corpus of before
    (changed / "kept" / "notes.txt").write_text("the user's own")
    said = succeed_on(ranks, *flags, "--corpus_file", "after.csv", "--index_path", "kept", cwd=changed)
    assert "121 documents: 3 new, 3 gone, encoded 3" in said
    assert "BM25 of the corpus before is gone; --hybrid_bm25 builds it again" in said
    result = (changed / "recall_result_dir" / "recall_result.txt").read_bytes()
    succeed(*flags, "--corpus_file", "after.csv", "--index_path", "new", cwd=changed)
    assert (changed / "recall_result_dir" / "recall_result.txt").read_bytes() == result
    kept = contents(changed / "kept")
    assert kept.pop("notes.txt") and kept == contents(changed / "new") and not (changed / "kept" / "bm25").exists()


def test_what_is_refused_and_what_is_nothing_new(checkpoint, sample, changed):
    flags = recall(checkpoint, sample, "--index_path", "kept")
    succeed(*flags, "--corpus_file", "before.csv", cwd=changed)
    before = contents(changed / "kept")
    assert "was built with max_seq_length 32, not 9" in refuse(
        *flags, "--corpus_file", "after.csv", "--max_seq_length", 9, cwd=changed)
    write(changed / "other.csv", ["没有一条", "是以前的"])
    assert "was built with another corpus, of which no text is in other.csv" in refuse(
        *flags, "--corpus_file", "other.csv", cwd=changed)
    assert contents(changed / "kept") == before
    write(changed / "numbered.csv", [f"d{row}\t{text}" for row, text in enumerate(read_texts(changed / "before.csv"))])
    said = succeed(*flags, "--corpus_file", "numbered.csv", cwd=changed).stderr
    assert "121 documents: 0 new, 0 gone, encoded 0" in said
    assert "d0" in succeed(*flags[:5], "--index_path", "kept", "--query", "甲", "--format", "jsonl", "--top_k", 121,
                           cwd=changed).stdout
    (changed / "kept" / "shard_1.bin").write_bytes(b"damaged")
    assert "shard_1.bin is not what was written" in refuse(*flags, "--corpus_file", "after.csv", cwd=changed)


def test_killed_while_it_follows_the_old_index_stays(checkpoint, sample, changed):
    flags = recall(checkpoint, sample, "--index_path", "kept")
    succeed(*flags, "--corpus_file", "before.csv", cwd=changed)
    before = contents(changed / "kept")
    code = ("import os, runpy, signal, sys, ann_util; sys.argv = sys.argv[1:]; "
            "ann_util.Documents.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    words = [sys.executable, "-c", code, *(str(ROOT / word) if word == "recall.py" else str(word) for word in flags)]
    killed = subprocess.run([*words, "--corpus_file", "after.csv"], cwd=changed, capture_output=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert contents(changed / "kept") == before
    said = succeed(*flags, "--corpus_file", "after.csv", cwd=changed).stderr
    assert "3 new, 3 gone" in said
    assert [path.name for path in changed.iterdir() if "kept" in path.name] == ["kept"]
