"""A collection of a real Milvus Lite that follows its corpus: what is encoded, that the result is as if built from
nothing, and that it can be broken off anywhere."""

import json
import shutil
import signal
import subprocess
import zlib
from pathlib import Path

from ann_util import Kept
from simcse.console import InputError
from simcse.index.documents import Entries
from simcse.index.milvus import MilvusIndex
from simcse.text.textfile import Corpus

import numpy as np
import pytest
from conftest import FP32, ROOT, command, read_texts, succeed

pymilvus = pytest.importorskip("pymilvus", reason="pymilvus is not installed (requirements-milvus.txt)")
NEW = {"dim": 8, "index_type": "FLAT", "metric": "COSINE"}
BEFORE = ["甲", "乙", "", "丙", "甲", *[""] * 9, "丁", "戊"]  # line by line: copies, and blank lines for whole pieces
AFTER = ["新一", "丁", "乙", "新二", "", "丙", "乙", "新三"]  # 甲 and 戊 are gone, and the order is another


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MilvusIndex, "_PIECE", 2)
        patch.setattr(MilvusIndex, "_PAGE", 2)
        yield


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def entries_of(lines):
    with open("corpus.csv", "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return Entries(Corpus("corpus.csv", "--corpus_file"))


def vector(text):
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8).astype("float32")


def run(lines, collection="texts", **wanted):
    """What recall.py does with a corpus, with vectors that depend on the text alone: those that were encoded."""
    entries, encoded = entries_of(lines), []
    wanted = {"corpus": "\n".join(lines), "corpus_columns": entries.corpus.columns, **wanted}
    index = MilvusIndex("x.db", collection, wanted, entries, {**NEW, **wanted})
    try:
        kept = Kept("texts", entries, index.known, index.before, index.pieces, index.stored) if index.follows else None

        def encode():
            for rows in kept.lacking if kept else index.pieces:
                texts = [entries[int(row)] for row in rows]
                encoded.extend(texts)
                yield np.array([vector(text) for text in texts])

        index.fill(kept.blocks(encode()) if kept else encode())
        index.finish()
        nearest, _ = index.search(np.array([vector(entries[0])]), len(entries))
        assert nearest[0, 0] == 0  # rows are those of the corpus now
    finally:
        index.close()
    return encoded


def contents(collection="texts"):
    """All that is in a collection, asked for without its corpus, by key."""
    index = MilvusIndex("x.db", collection, {})
    rows = index._client.query(collection, filter="id >= 0", output_fields=["*"])
    names, fingerprint = index._client.list_collections(), index.fingerprint
    assert index.search(np.ones((1, 8), "float32"), len(rows))[0].min() > 0
    index.close()
    return fingerprint, {row["id"]: row for row in rows}, names


def same(one, other):
    """Whether two collections have the same fingerprint and rows, embeddings bit by bit."""
    return one[:2] == other[:2]


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory):
    """A folder whose x.db has "texts" of BEFORE and "new" of AFTER; what is in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("filled"))
        assert run(BEFORE) == ["甲", "乙", "丙", "丁", "戊"] and run(BEFORE) == []
        assert run(AFTER, "new") == ["新一", "丁", "乙", "新二", "丙", "新三"]
        return Path("x.db").resolve(), contents(), contents("new")


@pytest.fixture
def filled(filled_once, tmp_path):
    """A copy of it in this test's folder; what is in the collections."""
    path, old, new = filled_once
    shutil.copytree(path, tmp_path / "x.db")
    return old, new


def test_as_built_from_nothing(filled, capsys):
    old, new = filled
    assert run(AFTER) == ["新一", "新二", "新三"]
    assert "7 documents: 3 new, 2 gone, encoded 3" in capsys.readouterr().err
    assert same(contents(), new) and contents()[2] == ["new", "texts"]
    assert run(BEFORE) == ["甲", "戊"] and same(contents(), old)


def test_ids_follow(capsys):
    run(["甲", "乙", "甲"])
    assert run(["a\t乙", "b\t甲", "c\t乙"]) == []
    assert "3 documents: 0 new, 0 gone, encoded 0" in capsys.readouterr().err
    index = MilvusIndex("x.db", "texts", {})
    assert index.take([1, 2], 9) == [("乙", [(1, "a"), (None, "c")]), ("甲", [(2, "b")])]
    with pytest.raises(InputError, match="another took its place meanwhile"):
        index.take([1, 3], 9)
    index.close()


@pytest.mark.parametrize("call, number", [("create_collection", 1), ("upsert", 2), ("upsert", 3), ("flush", 1),
                                          ("rename_collection", 1), ("rename_collection", 2), ("drop_collection", 1)])
def test_broken_off_the_collection_is_whole(filled, call, number, monkeypatch):
    """At each of what changes something: the old one answers, or the new one, and the same command ends it."""
    (old, new), calls, real = filled, [], getattr(pymilvus.MilvusClient, call)

    def broken(*args, **options):
        calls.append(call)
        if len(calls) == number:
            raise pymilvus.MilvusException(message="broken off")
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pymilvus.MilvusClient, call, broken)
        with pytest.raises(InputError, match="broken off"):
            run(AFTER)
        patch.setattr(MilvusIndex, "_restore", lambda self: None)  # there is nothing that a search has to mend
        assert same(contents(), new if call == "drop_collection" else old)
    encoded = run(AFTER)
    assert len(encoded) == {("create_collection", 1): 3, ("upsert", 2): 2, ("upsert", 3): 1}.get((call, number), 0)
    if call == "drop_collection":  # the next change takes that away
        assert same(contents(), new) and run(BEFORE) == ["甲", "戊"] and run(AFTER) == ["新一", "新二", "新三"]
    assert same(contents(), new) and contents()[2] == ["new", "texts"]


def test_what_is_broken_off_does_not_serve_another_corpus(monkeypatch):
    """Nor does a first build that was: what it has is taken over, and the rest is encoded."""
    real = MilvusIndex._upsert

    def broken_after_the_first_piece(self, rows, embeddings):
        if rows.start:
            raise InputError("broken off")
        real(self, rows, embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(MilvusIndex, "_upsert", broken_after_the_first_piece)
        for lines in (BEFORE, AFTER):
            with pytest.raises(InputError, match="broken off"):
                run(lines)
    assert run(["乙", "别的", "丙"]) == ["别的", "丙"]
    run(["乙", "别的", "丙"], "new")
    assert same(contents(), contents("new")) and contents()[2] == ["new", "texts"]


def test_settings_and_aliases(filled):
    old, new = filled
    with pytest.raises(InputError, match="was built with dim 8, not 9; name another collection"):
        run(AFTER, dim=9)
    with pytest.raises(InputError, match="another corpus, of which no text is in corpus.csv; name another"):
        run(["没有"])
    index = MilvusIndex("x.db", "texts", {})
    index._client.create_alias("texts", "other")
    index.close()
    with pytest.raises(InputError, match="--milvus_collection other: is an alias of texts; "):
        run(AFTER, "other")
    assert same(contents(), old) and contents()[2] == ["new", "texts"]
    run(AFTER)
    assert same(contents("other"), new)


def test_other_collections_of_like_names_stay(filled):
    for name in "texts_next", "texts_before", "texts_gone":
        run(["另一个"], name)
    run(AFTER)
    assert contents()[2] == ["new", "texts", "texts_before", "texts_gone", "texts_next"]
    assert contents("texts_next")[1][1]["text"] == "另一个"


def test_killed_between_its_two_renames(checkpoint, sample, tmp_path):
    """The commands: the old collection answers, the same command ends it, and the result is that of a new one."""
    before = read_texts(sample / "corpus.csv")
    after = ["全新的文本", *before[3:60], "另一条", *before[60:]]
    for name, texts in ("before.csv", before), ("after.csv", after):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    flags = ["--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", *FP32, "--batch_size", 1]
    recall = [*flags, "--similar_text_pair", sample / "dev.csv"]
    succeed("recall.py", *recall, "--corpus_file", "before.csv", cwd=tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport simcse, pymilvus\n"
        "real = pymilvus.MilvusClient.rename_collection\n"
        "def rename(self, old, new):\n"
        "    real(self, old, new) if '_before_' in new else os.kill(os.getpid(), signal.SIGKILL)\n"
        "pymilvus.MilvusClient.rename_collection = rename\n"
        f"runpy.run_path({str(ROOT / 'recall.py')!r}, run_name='__main__')", encoding="utf-8")
    words = [*recall, "--corpus_file", "after.csv"]
    killed = subprocess.run(command(script, *words), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr
    assert "119 documents: 2 new, 3 gone, encoded 2" in killed.stderr
    answer = succeed("recall.py", *flags, "--query", before[0], "--format", "jsonl", "--top_k", 1, cwd=tmp_path).stdout
    assert json.loads(answer)["results"][0]["document"] == before[0] not in after
    assert "119 documents: 2 new, 3 gone" in succeed("recall.py", *words, cwd=tmp_path).stderr
    result = (tmp_path / "recall_result_dir" / "recall_result.txt").read_bytes()
    succeed("recall.py", *words, "--milvus_uri", "new.db", cwd=tmp_path)
    assert (tmp_path / "recall_result_dir" / "recall_result.txt").read_bytes() == result
