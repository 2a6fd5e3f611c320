"""A collection of a real Milvus Lite that follows its corpus in place: what is encoded, that the result is as if built
from nothing, that searches in between answer, and that it can be broken off anywhere."""

import json
import shutil
import signal
import subprocess
import zlib
from pathlib import Path

from simcse.console import InputError
from simcse.index import milvus_collection, milvus_update
from simcse.index.documents import Documents
from simcse.index.hits import hits_of, search
from simcse.index.milvus import MilvusIndex
from simcse.index.milvus_update import CollectionUpdate, compare_with_corpus
from simcse.index.protocols import Document, Line
from simcse.text import keys
from simcse.text.keys import text_keys
from simcse.text.passages import Passages
from simcse.text.textfile import Corpus

import numpy as np
import pytest
from conftest import FP32, ROOT, command, read_texts, refuse, succeed
from indexes import milvus_manifest

pymilvus = pytest.importorskip("pymilvus", reason="pymilvus is not installed (requirements-milvus.txt)")
BEFORE = ["甲", "乙", "", "丙", "甲", *[""] * 9, "丁", "戊"]  # line by line, with copies and blank lines
AFTER = ["新一", "丁", "乙", "新二", "", "丙", "乙", "新三"]  # 甲 and 戊 are gone, and the order is another


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(milvus_update, "PIECE", 2)
        patch.setattr(milvus_collection, "MAX_KEYS_PER_REQUEST", 2)
        yield


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def documents_of(lines):
    with open("corpus.csv", "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return Documents(Corpus("corpus.csv", "--corpus_file"))


def in_sentences(lines):
    """The documents, each sentence of which is a passage."""
    documents = documents_of(lines)
    starts, offsets = [0], []
    for text in documents:
        ends = [place + 1 for place, character in enumerate(text) if character == "。"]
        offsets += [0, *ends[:-1]]
        starts.append(len(offsets))
    documents.passages = Passages(documents, np.array(starts), np.array(offsets))
    return documents


def vector(text):
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8).astype("float32")


def run(lines, collection="texts", documents_of=documents_of, before_piece=lambda: None):
    """What recall.py does with a corpus, with vectors that depend on the text alone; returns what was encoded."""
    documents = documents_of(lines)
    encoded = []
    index = MilvusIndex("x.db", collection)
    try:
        manifest = milvus_manifest(documents, corpus="\n".join(lines), corpus_columns=documents.corpus.columns)
        update = compare_with_corpus(index, documents, manifest)
        if update is not None:
            update.start()
            for rows in update.missing_rows:
                before_piece()
                texts = [documents.row_texts[int(row)] for row in rows]
                encoded.extend(texts)
                update.add(rows, np.array([vector(text) for text in texts]))
            update.finish()
        texts = list(documents.row_texts)
        nearest = index.search(np.array([vector(text) for text in texts]), documents.row_count).rows[:, 0]
        assert [texts[row] for row in nearest] == texts
    finally:
        index.close()
    return encoded


def contents(collection="texts"):
    """All that is in a collection, asked for without its corpus: the record, the rows by key, all collections."""
    index = MilvusIndex("x.db", collection)
    index.open({})
    client = index.collection._client
    rows = client.query(collection, filter="id >= 0", output_fields=["*"])
    names = sorted(client.list_collections())
    assert index.search(np.ones((1, 8), "float32"), len(rows)).rows.min() > 0
    index.close()
    return index.record, {row["id"]: row for row in rows}, names


def same(one, other):
    """Whether two collections have the same record and rows, embeddings bit by bit."""
    return one[:2] == other[:2]


def lines_of(text, collection="texts"):
    """What a collection has of a document, without the corpus."""
    index = MilvusIndex("x.db", collection)
    document, = index.open({}).read(text_keys([text]))
    index.close()
    return document


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


def break_at(patch, call, number):
    """Have a call of MilvusClient fail the n-th time."""
    calls = []
    real = getattr(pymilvus.MilvusClient, call)

    def broken(*args, **options):
        calls.append(call)
        if len(calls) == number:
            raise pymilvus.MilvusException(message="broken off")
        return real(*args, **options)

    patch.setattr(pymilvus.MilvusClient, call, broken)


def test_as_built_from_nothing(filled, capsys):
    """In place: no other collection is made, and those of other corpora stay as they are."""
    old, new = filled
    assert run(AFTER) == ["新一", "新二", "新三"]
    assert "6 documents: 3 new, 2 gone" in capsys.readouterr().err
    assert same(contents(), new) and contents()[2] == ["new", "texts"]
    assert run(BEFORE) == ["甲", "戊"] and same(contents(), old)


def test_searches_in_between_answer(filled):
    """Each text of before is there until all of the new ones are."""
    seen = []

    def search_by_another():
        index = MilvusIndex("x.db", "texts")
        documents = index.open({})
        queries = np.array([vector(text) for text in BEFORE if text])
        found = index.search(queries, len(documents)).rows[:, 0].tolist()
        assert [document.text for document in documents.read(found)] == [text for text in BEFORE if text]
        seen.append(index.record.state)

    assert run(AFTER, before_piece=search_by_another) == ["新一", "新二", "新三"]
    assert seen == [milvus_collection.CHANGING] * 2


def test_ids_follow(capsys):
    """Of texts that stay; their embeddings are kept."""
    run(["甲", "乙", "甲"])
    vectors = {key: row["embedding"] for key, row in contents()[1].items()}
    assert run(["a\t乙", "b\t甲", "c\t乙"]) == []
    assert "2 documents: 0 new, 0 gone" in capsys.readouterr().err
    assert lines_of("乙") == Document("乙", [Line(None, "a"), Line(None, "c")])
    assert lines_of("甲") == Document("甲", [Line(None, "b")])
    assert run(["a2\t乙", "b\t甲", "c\t乙"]) == [] and lines_of("乙").lines == [Line(None, "a2"), Line(None, "c")]
    assert {key: row["embedding"] for key, row in contents()[1].items()} == vectors


def test_a_row_that_is_gone_meanwhile():
    """Between a search and the reading of its hits: it is in no hit; where its vector is needed, an error."""
    run(["甲", "乙"])
    index = MilvusIndex("x.db", "texts")
    documents = index.open({})
    ranking = search(index, documents, vector("甲")[None], 2)
    index.collection.delete(text_keys(["甲"]).tolist())
    assert [hit.document for hit in hits_of(ranking, documents, [2])[0]] == ["乙"]
    with pytest.raises(InputError, match="--milvus_collection texts: another process has changed it"):
        index.vectors(text_keys(["乙", "甲"]))
    index.close()


def test_passages_follow(capsys):
    """Those of a document that stays are not encoded again; another document may have equal ones."""
    before = ["甲。乙。", "丙。丁。戊。", "己。"]
    after = ["新。乙。", "己。", "丙。丁。戊。", "己。庚。"]
    assert len(run(before, documents_of=in_sentences)) == 6
    assert run(after, documents_of=in_sentences) == ["新。", "乙。", "己。", "庚。"]
    assert "4 documents: 2 new, 1 gone" in capsys.readouterr().err
    run(after, "new", documents_of=in_sentences)
    assert same(contents(), contents("new"))
    index = MilvusIndex("x.db", "texts")
    documents = index.open({})
    hits = hits_of(search(index, documents, vector("丁。")[None], 2), documents, [1])
    assert [(hit.document, hit.passage) for hit in hits[0]] == [("丙。丁。戊。", "丁。")]
    index.close()


@pytest.mark.parametrize("call, number", [("alter_collection_properties", 1), ("upsert", 1), ("upsert", 2),
                                          ("upsert", 3), ("delete", 1), ("flush", 1),
                                          ("alter_collection_properties", 2)])
def test_broken_off_the_same_command_ends_it(filled, call, number, monkeypatch):
    """At each of what changes something: all texts of before are there until the deletion, which is the last but one.
    """
    (old, new) = filled
    with monkeypatch.context() as patch:
        break_at(patch, call, number)
        with pytest.raises(InputError, match="broken off"):
            run(AFTER)
    record, rows, _ = contents()
    assert record.manifest == old[0].manifest
    if (call, number) not in (("flush", 1), ("alter_collection_properties", 2)):
        assert set(rows) >= set(old[1])
    encoded = run(AFTER)
    if call == "upsert":  # of two pieces, and of the outdated rows
        assert encoded == {1: ["新一", "新二", "新三"], 2: ["新三"], 3: []}[number]
    assert same(contents(), new) and contents()[2] == ["new", "texts"]


@pytest.mark.parametrize("number", [1, 2])
def test_broken_off_a_changed_corpus_may_go_back(filled, number, monkeypatch):
    """The record of the corpus before does not mean that the collection has that alone."""
    with monkeypatch.context() as patch:
        break_at(patch, "upsert", number + 1)
        with pytest.raises(InputError, match="broken off"):
            run(AFTER)
    assert run(BEFORE) == [] and same(contents(), filled[0])


@pytest.mark.parametrize("call", ["create_collection", "create_index", "load_collection", "upsert", "flush"])
def test_a_first_build_that_is_broken_off(call, monkeypatch):
    """It answers no search without its corpus, goes on with it, and may go on with another one."""
    with monkeypatch.context() as patch:
        break_at(patch, call, 2 if call == "upsert" else 1)
        with pytest.raises(InputError, match="broken off"):
            run(BEFORE)
    with pytest.raises(InputError, match="no such collection" if call.startswith("create") else "not all documents"):
        contents()
    encoded = run(BEFORE)
    assert encoded == {"upsert": ["丙", "丁", "戊"], "flush": []}.get(call, ["甲", "乙", "丙", "丁", "戊"])
    run(BEFORE, "new")
    assert same(contents(), contents("new"))


def test_what_is_broken_off_serves_another_corpus(monkeypatch):
    with monkeypatch.context() as patch:
        break_at(patch, "upsert", 3)
        with pytest.raises(InputError, match="broken off"):
            run(BEFORE)
    assert run(["乙", "别的", "丙"]) == ["别的"]
    run(["乙", "别的", "丙"], "new")
    assert same(contents(), contents("new")) and contents()[2] == ["new", "texts"]


def test_rows_that_somebody_has_deleted_are_encoded_again(filled):
    index = MilvusIndex("x.db", "texts")
    index.collection.delete(text_keys(["丙"]).tolist())
    index.close()
    assert run(BEFORE) == ["丙"] and same(contents(), filled[0])


def test_another_corpus_and_an_alias(filled):
    old, new = filled
    with pytest.raises(InputError, match="another corpus, of which no text is in corpus.csv; name another"):
        run(["没有"])
    assert same(contents(), old)
    index = MilvusIndex("x.db", "texts")
    index.collection._client.create_alias("texts", "other")
    index.close()
    assert same(contents("other"), old)
    assert run(AFTER, "other") == ["新一", "新二", "新三"]
    assert same(contents(), new) and contents()[2] == ["new", "texts"]


def test_different_texts_of_one_key_are_noticed(monkeypatch):
    monkeypatch.setattr(keys, "KEY_MASK", 0)
    with pytest.raises(InputError, match=r"corpus.csv:3: has the same 64-bit key as another text, corpus.csv:1;"):
        run(["甲", "甲", "乙"])
    assert not Path("x.db").exists()


# ------------------------------------------------------------------------------------------------------- the commands
def hits_in(folder):
    """The query, document and cosine of each hit in the result."""
    result = (folder / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8")
    return [line.split("\t") for line in result.splitlines()]


def test_killed_before_its_end(checkpoint, sample, tmp_path):
    """The commands: the collection answers with what it had, the same command ends it, and the result is that of a new
    one."""
    before = read_texts(sample / "corpus.csv")
    after = ["全新的文本啊", *before[3:60], "另一条文本啊", *before[60:]]
    for name, texts in (("before.csv", before), ("after.csv", after)):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    flags = ["--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", *FP32, "--batch_size", 1]
    recall = [*flags, "--similar_text_pair", sample / "dev.csv"]
    succeed("recall.py", *recall, "--corpus_file", "before.csv", cwd=tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport simcse, pymilvus\n"
        "def kill(self, *args, **options):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pymilvus.MilvusClient.delete = kill\n"
        f"runpy.run_path({str(ROOT / 'recall.py')!r}, run_name='__main__')", encoding="utf-8")
    words = [*recall, "--corpus_file", "after.csv"]
    killed = subprocess.run(command(script, *words), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr
    assert "119 documents: 2 new, 3 gone" in killed.stderr
    answer = succeed("recall.py", *flags, "--query", before[0], "--format", "jsonl", "--top_k", 1, cwd=tmp_path).stdout
    assert json.loads(answer)["results"][0]["document"] == before[0] not in after
    assert "119 documents: 0 new, 3 gone" in succeed("recall.py", *words, cwd=tmp_path).stderr
    hits = hits_in(tmp_path)
    succeed("recall.py", *words, "--milvus_uri", "new.db", cwd=tmp_path)
    new_hits = hits_in(tmp_path)
    assert [hit[:2] for hit in hits] == [hit[:2] for hit in new_hits]
    # How Milvus Lite lays out its rows changes the last bit of a cosine.
    np.testing.assert_allclose([float(hit[2]) for hit in hits], [float(hit[2]) for hit in new_hits], atol=1e-6)
    assert "was built with max_seq_length 32, not 9; name another collection" in refuse(
        "recall.py", *words, "--max_seq_length", 9, cwd=tmp_path)


def test_ids_of_an_interrupted_run_do_not_stay(monkeypatch):
    """A run with ids is broken off, and the corpus goes back to the one without."""
    run(["甲", "乙"])
    expected = contents()[1]
    with monkeypatch.context() as patch:
        break_at(patch, "alter_collection_properties", 3)  # after the two that mark it as changing
        with pytest.raises(InputError, match="broken off"):
            run(["a\t甲", "b\t乙", "c\t丙"])
    assert {row[milvus_collection.IDS] for row in contents()[1].values()} == {"a", "b", "c"}
    run(["甲", "乙"])
    assert contents()[1] == expected


@pytest.mark.parametrize("method_name, change", [
    ("__init__", {"state": milvus_collection.CHANGING}),
    ("wait_for_pieces", {"run_id": "another"}),
    ("wait_for_pieces", {"run_id": "another", "state": milvus_collection.COMPLETE}),
    ("_store", {"run_id": "another", "state": milvus_collection.COMPLETE}),
    ("_wait_until_indexed", {"run_id": "another"})])
def test_two_runs_at_the_same_time_notice_each_other(method_name, change, monkeypatch):
    """Another one writes the record after the comparison, while rows are added, or while this one waits for the index:
    no run says that it is complete, nor lets another one say so that may have rows of this one.
    """
    run(["甲", "乙"])
    before = contents()[1]
    method = getattr(CollectionUpdate, method_name)

    def change_record(self, *arguments):
        result = method(self, *arguments)
        collection = self._index.collection
        collection.write_record(collection.read_record()._replace(**change))
        return result

    monkeypatch.setattr(CollectionUpdate, method_name, change_record)
    with pytest.raises(InputError, match="texts: another process has changed it meanwhile; run again when that has"):
        run(["甲", "丙"])
    after = contents()[1]
    if method_name in ("__init__", "wait_for_pieces"):
        assert after == before
    elif method_name == "_store":
        assert before.items() <= after.items()
    if method_name != "wait_for_pieces":
        assert MilvusIndex("x.db", "texts").record.state == milvus_collection.CHANGING


def test_ranks_share_rows_out_by_their_numbers(monkeypatch):
    """Each rank reads the rows from the server by itself, in an order that Milvus does not promise."""
    monkeypatch.setattr(milvus_update, "RANKS", 3)
    rows = np.arange(5, 50)
    pieces = []
    for rank in range(3):
        monkeypatch.setattr(milvus_update, "RANK", rank)
        pieces += milvus_update._pieces_of_rank(np.random.default_rng(rank).permutation(rows))
    assert sorted(np.concatenate(pieces)) == rows.tolist() and max(map(len, pieces)) == 2


def test_rows_that_another_run_has_added_meanwhile(monkeypatch):
    """It has ended with an error, for instance, and its record was replaced by ours."""
    run(["甲", "乙"])
    row = {**next(iter(contents()[1].values())), "id": 7, "document": 7, "embedding": vector("丁")}
    flush = milvus_collection.Collection.flush

    def add_another(self):
        self.upsert([row])
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(milvus_collection.Collection, "flush", add_another)
        with pytest.raises(InputError, match="texts: has 3 rows instead of 2; another process has"):
            run(["甲", "丙"])
    assert run(["甲", "丙"]) == [] and len(contents()[1]) == 2
