"""A real Milvus server: the index types against exact search, recall.py and the service against a folder's index, a
corpus that changes while others search, and what happens when something is killed, stopped or missing."""

import json
import os
import signal
import subprocess
import sys
import time

from simcse.console import InputError
from simcse.index import milvus_collection
from simcse.index.ann_recall import ann_recall
from simcse.index.exact import exact_search
from simcse.index.milvus import MilvusIndex
from simcse.index.milvus_collection import BUILDING, CHANGING, Record
from simcse.index.milvus_types import INDEX_TYPES
from simcse.index.milvus_update import compare_with_corpus

import numpy as np
import pytest
from conftest import FP32, ROOT, Service, command, launch, refuse, run_script, succeed
from indexes import documents_of, encode_csl, fill_collection, milvus_manifest


@pytest.fixture(scope="module")
def csl(real_data):
    return encode_csl(real_data)


@pytest.fixture
def collection(request):
    """The name of a collection that no other test has."""
    name = request.node.name
    return "".join(character if character.isalnum() else "_" for character in name)


def unit_vectors(count, seed=0, size=16):
    vectors = np.random.default_rng(seed).standard_normal((count, size)).astype("float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(server, collection, documents, vectors, index_type="HNSW", **parameters):
    """A collection on the server, whose recall was measured with its first vectors."""
    to_build = {setting.name for setting in INDEX_TYPES[index_type].build_settings}
    build = {"milvus_index": index_type, **{name: parameters[name] for name in parameters if name in to_build}}
    search = {name: value for name, value in parameters.items() if name not in to_build}
    index = MilvusIndex(server.uri, collection)
    manifest = milvus_manifest(documents, dimension=vectors.shape[1], build_settings=build, search_settings=search)
    update = compare_with_corpus(index, documents, manifest)
    update.start()
    if update.has_to_be_measured():
        update.measure_with(vectors[:100])
    for rows in update.missing_rows:
        update.add(rows, vectors[rows])
    update.finish()
    return index


def test_a_collection_whose_index_somebody_has_dropped_is_kept(tmp_path, milvus_server, collection):
    documents = documents_of(tmp_path, "甲", "乙")
    filled(milvus_server, collection, documents, unit_vectors(2)).close()
    client = milvus_server.connect()
    client.release_collection(collection)
    client.drop_index(collection, "embedding")
    with pytest.raises(InputError, match=f"{collection}: the index of its field embedding, which .* had made, is gone"):
        MilvusIndex(milvus_server.uri, collection)
    assert client.get_collection_stats(collection)["row_count"] == 2
    client.close()


# ---------------------------------------------------------------------------------------------------- the index types
@pytest.mark.parametrize("index_type, rows, goal", [
    ("HNSW", 6092, 0.99), ("IVF_FLAT", 1500, 0.95), ("IVF_SQ8", 1500, 0.95), ("SCANN", 1500, 0.9)])
def test_csl_by_approximate_index_types(csl, index_type, rows, goal, tmp_path, milvus_server, collection):
    """What they find against exact search, and that the measured recall is that; cosines are those of the vectors."""
    documents, vectors, queries = csl
    if rows < len(documents):
        documents, vectors = documents_of(tmp_path, *documents[:rows]), vectors[:rows]
    index = filled(milvus_server, collection, documents, vectors, index_type)
    exact = exact_search(queries, vectors, 50)
    found = index.search(queries, 50)
    assert ann_recall(found.scores, exact.scores) > goal
    np.testing.assert_allclose(found.scores, np.einsum("qd,qkd->qk", queries, vectors[found.rows]), atol=1e-5)
    measured = index.manifest.ann_recall
    nearest = exact_search(vectors[:100], vectors, 10)
    recall = ann_recall(index.search(vectors[:100], 10).scores, nearest.scores)
    assert measured.recall == pytest.approx(recall, abs=0.01)
    assert measured.queries == "100 halves of documents" and measured.deeper_recall >= measured.recall > 0.95
    index.close()


def test_csl_by_flat_is_exact(csl, milvus_server, collection):
    documents, vectors, queries = csl
    index = filled(milvus_server, collection, documents, vectors, "FLAT")
    exact = exact_search(queries, vectors, 50)
    found = index.search(queries, 50)
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-5)
    assert np.mean(found.rows == exact.rows) > 0.99  # the others are of cosines that differ in the last bit
    assert index.manifest.ann_recall is None
    index.close()


def test_product_quantization_gives_true_cosines(tmp_path, milvus_server, collection, capsys):
    """Of few rows, as training takes long; the settings of a collection are kept, a search may have others."""
    vectors = unit_vectors(1500)
    documents = documents_of(tmp_path, *(f"文{number}" for number in range(1500)))
    filled(milvus_server, collection, documents, vectors, "IVF_PQ", nlist=4, m=8, nbits=4, nprobe=2).close()
    index = MilvusIndex(milvus_server.uri, collection)
    index.open({"nprobe": 4})
    assert index.manifest.build_settings == {"milvus_index": "IVF_PQ", "nlist": 4, "m": 8, "nbits": 4}
    assert index.manifest.search_settings == {"nprobe": 2}
    row_of_key = {key: row for row, key in enumerate(documents.keys.tolist())}
    found = index.search(vectors[:20], 10)
    rows = np.vectorize(row_of_key.get)(found.rows)
    np.testing.assert_allclose(found.scores, np.einsum("qd,qkd->qk", vectors[:20], vectors[rows]), atol=1e-5)
    assert "fewer than" not in capsys.readouterr().err
    index.close()
    index = MilvusIndex(milvus_server.uri, collection)
    index.open({"nprobe": 1})
    index.search(vectors[:20], 1400)
    index.search(vectors[:20], 1400)
    line, = [line for line in capsys.readouterr().err.splitlines() if "fewer than" in line]
    assert line == (f"--milvus_collection {collection}: 20 of 20 queries have fewer than 1,400 hits with "
                    "--milvus_index_params nprobe=1; --milvus_index_params nprobe=4 looks further")
    index.close()


def test_an_index_that_the_server_cannot_build_is_not_waited_for_forever(tmp_path, milvus_server, collection,
                                                                         monkeypatch, capsys):
    """The server of the package was built without DISKANN, takes it, and tries for ever: rows are found all the same.
    """
    monkeypatch.setattr(milvus_collection, "PATIENCE", 3)
    vectors = unit_vectors(1100)
    documents = documents_of(tmp_path, *(f"文{number}" for number in range(1100)))
    index = filled(milvus_server, collection, documents, vectors, "DISKANN")
    assert f"--milvus_collection {collection}: the server has indexed 0 of 1,100 rows" in capsys.readouterr().err
    assert index.search(vectors[:9], 1).rows.ravel().tolist() == list(range(9))
    assert index.manifest.ann_recall is None
    index.collection._drop()
    index.close()


@pytest.mark.parametrize("index_type, parameters, message", [
    ("IVF_FLAT", {"nlist": 70000}, r"--milvus_uri http\S+: nlist out of range: \[1, 65536\]"),
    ("IVF_PQ", {"m": 7}, "--milvus_index_params m=7: does not divide the dimension of the vectors, 16")])
def test_parameters_that_are_refused_leave_no_collection(index_type, parameters, message, tmp_path, milvus_server,
                                                         collection):
    documents = documents_of(tmp_path, "甲", "乙")
    with pytest.raises(InputError, match=message):
        filled(milvus_server, collection, documents, unit_vectors(2), index_type, **parameters)
    assert MilvusIndex(milvus_server.uri, collection).manifest is None


def test_an_index_of_others_in_place_of_ours(tmp_path, milvus_server, collection):
    """Its scores might be distances."""
    vectors = unit_vectors(3)
    filled(milvus_server, collection, documents_of(tmp_path, "甲", "乙", "丙"), vectors, "IVF_FLAT", nlist=2).close()
    MilvusIndex(milvus_server.uri, collection).close()
    client = milvus_server.connect()
    client.release_collection(collection)
    client.drop_index(collection, "embedding")
    index = client.prepare_index_params()
    index.add_index("embedding", index_name="embedding", index_type="HNSW", metric_type="L2",
                    params={"M": 8, "efConstruction": 8})
    client.create_index(collection, index)
    with pytest.raises(InputError, match="is HNSW L2 None, and not IVF_FLAT COSINE 2, which recall.py had made"):
        MilvusIndex(milvus_server.uri, collection)
    client.close()


def test_a_collection_that_is_built_again_while_it_is_open(tmp_path, milvus_server, collection):
    """Its vectors may be of another model, or not be there yet."""
    documents, vectors = documents_of(tmp_path, "甲", "乙", "丙"), unit_vectors(3)
    filled(milvus_server, collection, documents, vectors).close()
    index = MilvusIndex(milvus_server.uri, collection)
    index.open({})
    assert index.search(vectors, 1).rows.ravel().tolist() == documents.keys.tolist()
    client = milvus_server.connect()
    client.drop_collection(collection)
    filled(milvus_server, collection, documents, vectors[::-1]).close()
    with pytest.raises(InputError, match="was dropped and built again since it was opened; open it again"):
        index.search(vectors, 1)
    index.close()
    client.close()


# ------------------------------------------------------------------------------------------------------- the commands
@pytest.fixture(scope="module")
def corpus(sample, tmp_path_factory):
    """The sample's corpus with ids, copies and documents of several sentences."""
    texts = (sample / "corpus.csv").read_text(encoding="utf-8").splitlines()
    lines = [*texts[:80], *texts[:9], *("。".join(texts[number : number + 3]) + "。" for number in range(80, 110, 3))]
    path = tmp_path_factory.mktemp("corpus") / "corpus.csv"
    path.write_text("".join(f"d{number}\t{text}\n" for number, text in enumerate(lines)), encoding="utf-8")
    return path


def recall_words(checkpoint, sample, *more):
    return ["recall.py", "--device", "cpu", "--params_path", checkpoint, "--max_seq_length", 16, *FP32,
            "--similar_text_pair", sample / "dev.csv", "--recall_num", 20, "--format", "jsonl", *more]


def hits_in(folder):
    """The hits of each query: line, id, document, passage and score, by score and line."""
    result = (folder / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8")
    found = []
    for line in result.splitlines():
        results = json.loads(line)["results"]
        found.append([(hit["line"], hit.get("id"), hit["document"], hit.get("passage"),
                       hit.get("cosine", hit.get("score"))) for hit in results])
    return found


def same_hits(found, expected):
    """The same hits with nearly the same scores; hits whose scores are nearly the same may change places."""
    assert len(found) == len(expected)
    for hits, expected_hits in zip(found, expected):
        np.testing.assert_allclose([hit[-1] for hit in hits], [hit[-1] for hit in expected_hits], atol=1e-5)
        last = expected_hits[-1][-1] + 2e-5  # of equal scores at the end another one may have been left out
        assert ({hit[:-1] for hit in hits if hit[-1] > last} <= {hit[:-1] for hit in expected_hits}
                and {hit[:-1] for hit in expected_hits if hit[-1] > last} <= {hit[:-1] for hit in hits})


@pytest.mark.parametrize("more", [[], ["--passages", "--hybrid_bm25"]])
def test_recall_on_the_server_and_in_a_folder(checkpoint, sample, corpus, milvus_server, collection, tmp_path, more):
    """Ids, copies, passages and BM25; on two ranks the same; --query without the corpus, and by an alias."""
    words = recall_words(checkpoint, sample, "--corpus_file", corpus, *more)
    on_server = ["--ann_engine", "milvus", "--milvus_uri", milvus_server.uri, "--milvus_collection", collection]
    succeed(*words, "--ann_engine", "exact", cwd=tmp_path)
    expected = hits_in(tmp_path)
    stderr = succeed(*words, *on_server, "--milvus_index", "FLAT", cwd=tmp_path).stderr
    assert "Traceback" not in stderr and "encoding and indexing" in stderr
    same_hits(hits_in(tmp_path), expected)
    if more:
        return
    on_two = [*on_server[:-1], f"{collection}_2"]
    result, logs = launch(*words, *on_two, cwd=tmp_path)
    assert result.returncode == 0, logs
    assert "halves of documents: 1.0000 with --milvus_index_params ef=100" in logs[0]
    same_hits(hits_in(tmp_path), expected)
    client = milvus_server.connect()
    client.create_alias(on_two[-1], f"{collection}_alias")
    query = (sample / "dev.csv").read_text(encoding="utf-8").split("\t")[0]
    asked = ["recall.py", "--device", "cpu", "--params_path", checkpoint, *FP32, "--max_seq_length", 16, "--query",
             query, "--top_k", 3, "--format", "jsonl", *on_two[:-1], f"{collection}_alias", "--milvus_index_params",
             "ef=50"]
    assert MilvusIndex(milvus_server.uri, f"{collection}_alias").collection.name == on_two[-1]
    answer = json.loads(succeed(*asked, cwd=tmp_path).stdout)["results"]
    assert [(hit["id"], hit["document"]) for hit in answer] == [hit[1:3] for hit in expected[0][:3]]
    client.close()


def test_the_service_on_the_server(checkpoint, exported, sample, milvus_server, collection, tmp_path):
    pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
    on_server = ["--milvus_uri", milvus_server.uri, "--milvus_collection", collection]
    succeed(*recall_words(checkpoint, sample, "--corpus_file", sample / "corpus.csv", "--ann_engine", "milvus",
                          *on_server), cwd=tmp_path)
    queries = [line.split("\t")[0] for line in (sample / "dev.csv").read_text(encoding="utf-8").splitlines()[:5]]
    service = Service(tmp_path, "--model_dir", exported, *on_server, "--milvus_index_params", "ef=50")
    try:
        status, _, answer = service.ask("/search", {"queries": queries, "top_k": 20})
        found = [[(hit["document"], hit["cosine"]) for hit in results] for results in answer["results"]]
        expected = [[(hit[2], hit[4]) for hit in hits] for hits in hits_in(tmp_path)[:5]]
        assert status == 200
        same_hits(found, expected)
    finally:
        service.stop()


# --------------------------------------------------------------------------------------------------- a changed corpus
SEARCHES = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np
from simcse.index.hits import hits_of, search
from simcse.index.milvus import MilvusIndex
index = MilvusIndex(sys.argv[2], sys.argv[3])
documents = index.open({})
queries = np.load(sys.argv[4])
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print("ready", flush=True)
count, texts = 0, set()
while not ended.is_set():
    for hits in hits_of(search(index, documents, queries, 3), documents, [3] * len(queries)):
        texts.update(hit.document for hit in hits)
    count += 1
print(count, *sorted(texts))
"""


def test_a_changed_corpus_while_another_process_searches(tmp_path, milvus_server, collection):
    """Only what is new is added, what is gone goes, and answers are of documents of the two states."""
    old_texts = [f"旧{number}" for number in range(1500)]
    new_texts = [*old_texts[100:], *(f"新{number}" for number in range(300))]
    vector_of = dict(zip([*old_texts, *new_texts[1400:]], unit_vectors(1800)))
    old = documents_of(tmp_path, *old_texts)
    filled(milvus_server, collection, old, np.stack([vector_of[text] for text in old_texts])).close()
    np.save(tmp_path / "queries.npy", unit_vectors(20, seed=2))
    words = [sys.executable, "-c", SEARCHES, ROOT, milvus_server.uri, collection, tmp_path / "queries.npy"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as searching:
        assert searching.stdout.readline() == "ready\n"
        new = documents_of(tmp_path, *new_texts)
        index = MilvusIndex(milvus_server.uri, collection)
        update = compare_with_corpus(index, new, milvus_manifest(new, dimension=16, **settings_of(index)))
        update.start()
        assert sorted(np.concatenate(update.missing_rows)) == list(range(1400, 1700))
        for rows in update.missing_rows:
            update.add(rows, np.stack([vector_of[text] for text in np.array(new_texts)[rows]]))
        update.finish()
        count, *texts = searching.communicate(timeout=60)[0].split()
    assert searching.returncode == 0 and int(count) > 3
    assert set(texts) <= set(vector_of)
    found = index.search(np.stack([vector_of[text] for text in new_texts]), 1)
    assert found.rows.ravel().tolist() == list(range(1700)) and index.collection.count() == 1700
    index.close()


def settings_of(index):
    """The settings of an existing collection."""
    return {"build_settings": index.manifest.build_settings, "search_settings": index.manifest.search_settings}


# ------------------------------------------------------------------------------------------------------------- faults
@pytest.fixture(scope="module")
def unbroken(checkpoint, sample, milvus_server, tmp_path_factory):
    """The hits of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    succeed(*words_of_build(checkpoint, sample, milvus_server, "unbroken"), cwd=folder)
    return hits_in(folder)


def words_of_build(checkpoint, sample, server, collection):
    """A build that takes some seconds, since each text is a batch."""
    return recall_words(checkpoint, sample, "--corpus_file", sample / "corpus.csv", "--batch_size", 1, "--ann_engine",
                        "milvus", "--milvus_uri", server.uri, "--milvus_collection", collection)


def wait_for_line(process, words):
    """Read stderr up to the line that has some words."""
    for line in process.stderr:
        if words in line:
            return
    pytest.fail(f"the process has ended before it said {words!r}")


def test_a_run_that_is_killed(checkpoint, sample, milvus_server, collection, unbroken, tmp_path):
    """After the first piece of a build, and after the third of the next: the same command ends with the same hits."""
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom simcse.index import milvus_update\n"
        "pieces = int(os.environ['PIECES'])\ndef kill(self, rows, vectors):\n    global pieces\n"
        "    real(self, rows, vectors)\n    pieces -= 1\n    if pieces == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "real, milvus_update.PIECE = milvus_update.CollectionUpdate._store, 16\n"
        "milvus_update.CollectionUpdate._store = kill\n"
        f"runpy.run_path({str(ROOT / 'recall.py')!r}, run_name='__main__')", encoding="utf-8")
    words = words_of_build(checkpoint, sample, milvus_server, collection)
    for pieces in ("1", "3"):
        killed = subprocess.run(command(script, *words[1:]), cwd=tmp_path, env={**os.environ, "PIECES": pieces})
        assert killed.returncode == -signal.SIGKILL
        assert MilvusIndex(milvus_server.uri, collection).record.state == BUILDING
    stderr = succeed(*words, cwd=tmp_path).stderr
    assert "encoding and indexing 120 of" not in stderr  # some were there
    same_hits(hits_in(tmp_path), unbroken)


def test_a_rank_that_is_killed(checkpoint, sample, milvus_server, collection, unbroken, tmp_path):
    """The run ends with an error, and the same command afterwards with the hits of an unbroken run."""
    script = tmp_path / "killed.py"
    script.write_text(
        f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom simcse.index import milvus_update\n"
        "def kill(self, rows, vectors):\n    if os.environ['PADDLE_TRAINER_ID'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    real(self, rows, vectors)\n"
        "real, milvus_update.PIECE = milvus_update.CollectionUpdate._store, 16\n"
        "milvus_update.CollectionUpdate._store = kill\n"
        f"runpy.run_path({str(ROOT / 'recall.py')!r}, run_name='__main__')", encoding="utf-8")
    words = words_of_build(checkpoint, sample, milvus_server, collection)
    result, _ = launch(script, *words[1:], cwd=tmp_path)
    assert result.returncode != 0
    succeed(*words, cwd=tmp_path)
    same_hits(hits_in(tmp_path), unbroken)


def test_a_server_that_stops_for_a_while_is_waited_for(checkpoint, sample, milvus_server, collection, unbroken,
                                                       tmp_path):
    words = words_of_build(checkpoint, sample, milvus_server, collection)
    with subprocess.Popen(command(*words), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for_line(process, "encoding and indexing")
        milvus_server.signal(signal.SIGSTOP)
        time.sleep(5)
        is_waiting = process.poll() is None
        milvus_server.signal(signal.SIGCONT)
        assert process.communicate(timeout=120)[0] is None
    assert is_waiting and process.returncode == 0
    same_hits(hits_in(tmp_path), unbroken)


def test_refusals(checkpoint, sample, milvus_server, collection, tmp_path):
    """A wrong token, none, a port that nobody listens on, TLS that the server has not, a collection of others."""
    words = words_of_build(checkpoint, sample, milvus_server, collection)
    uri = milvus_server.uri
    client = milvus_server.connect()
    client.create_collection(collection, dimension=8)
    assert f"--milvus_collection {collection}: exists, but was not made by recall.py" in refuse(*words, cwd=tmp_path)
    client.close()
    for token, problem in (("root:wrong", "auth check failure, please check username and password are correct"),
                           ("", "missing authorization in header")):
        line = refuse(*words, cwd=tmp_path, env={"MILVUS_TOKEN": token})
        assert f"error: --milvus_uri {uri}: {problem}; MILVUS_TOKEN in the environment is the token" in line
    for other in ("http://127.0.0.1:9", uri.replace("http", "https")):
        words[words.index("--milvus_uri") + 1] = other
        result = run_script(*words, cwd=tmp_path)
        error = result.stderr.splitlines()[-1]
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 3, result.stderr  # and two of before
        assert error.startswith(f"recall.py: error: --milvus_uri {other}: failed to connect to all addresses; last ")


def test_fields_of_others_under_our_record(tmp_path, milvus_server, collection):
    """Somebody may have made the collection again, with our record."""
    filled(milvus_server, collection, documents_of(tmp_path, "甲"), unit_vectors(1)).close()
    client = milvus_server.connect()
    properties = client.describe_collection(collection)["properties"]
    client.create_collection(f"{collection}_copy", dimension=16, properties={"simcse": properties["simcse"]})
    with pytest.raises(InputError, match="_copy: its fields are not those that recall.py makes: document is lacking;"):
        MilvusIndex(milvus_server.uri, f"{collection}_copy")
    client.close()


def test_a_server_that_is_killed_and_started_again(checkpoint, sample, milvus_server, collection, unbroken, tmp_path):
    """In the middle of a build: one line, exit code 2, and the same command ends it when there is a server again; what
    the collection says of itself is then as it was before the restart."""
    whole = fill_collection(documents_of(tmp_path, "甲"), unit_vectors(1), f"{collection}_whole", milvus_server.uri)
    assert whole.manifest is not None
    whole.collection.write_record(Record(whole.manifest, CHANGING))
    words = words_of_build(checkpoint, sample, milvus_server, collection)
    with subprocess.Popen(command(*words), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for_line(process, "encoding and indexing")
        milvus_server.kill()
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith(f"recall.py: error: --milvus_uri {milvus_server.uri}: ")
    milvus_server.start()
    words = words_of_build(checkpoint, sample, milvus_server, collection)
    for _ in range(3):  # until it has recovered
        again = subprocess.run(command(*words), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        if again.returncode == 0:
            break
        assert again.stderr.splitlines()[-1].endswith("after a crash the server answers so for some time: run again in "
                                                      "a minute")
    same_hits(hits_in(tmp_path), unbroken)
    assert MilvusIndex(milvus_server.uri, f"{collection}_whole").record.state == CHANGING
