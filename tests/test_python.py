"""What a notebook uses: the encoder of a checkpoint, and an index that recall.py has kept."""

import dataclasses
import json
import shutil

from ann_util import Index
from model import Encoder
from simcse.console import InputError
from simcse.encoder import encoder as simcse_encoder
from simcse.encoder.weights import read_weights, write_weights
from simcse.index.manifest import Manifest

import numpy as np
import pandas as pd
import pytest
from conftest import ENCODER, FP32, contents, succeed

TEXTS = ["语义检索", "信息抽取", "糖尿病的治疗和护理"]


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder.load(checkpoint, precision="fp32")


@pytest.fixture
def index(kept_index):
    with Index.open(kept_index) as index:
        yield index


@pytest.fixture(scope="module")
def queries(sample):
    lines = (sample / "dev.csv").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(line.split("\t")[0] for line in lines))


def recall(*flags, folder):
    """The objects that recall.py prints as JSON lines, or writes to a file."""
    result = succeed("recall.py", "--device", "cpu", "--format", "jsonl", *FP32, *flags, cwd=folder)
    written = folder / "recall_result_dir" / "recall_result.txt"
    text = written.read_text(encoding="utf-8") if written.exists() else result.stdout
    return [json.loads(line) for line in text.splitlines()]


# -------------------------------------------------------------------------------------------------------- the encoder
def test_a_column_of_a_data_frame_is_encoded_as_a_list_is(encoder, capsys):
    frame = pd.DataFrame({"text": ["none", *TEXTS, "长" * 40]}).iloc[1:]  # rows are numbered from 1
    embeddings = encoder.encode(frame["text"])
    assert embeddings.dtype == np.float32 and embeddings.shape == (4, 128)
    assert capsys.readouterr().err.endswith(f"to encode more of them: '{'长' * 20}'\n")
    np.testing.assert_array_equal(encoder.encode(frame["text"].tolist()), embeddings)
    np.testing.assert_array_equal(encoder.encode(frame["text"].to_numpy()), embeddings)
    assert encoder.encode([]).shape == (0, 128)
    frame.loc[2] = None
    with pytest.raises(InputError, match=r"^texts\[1\]: expected a text, got (None|nan); remove it$"):
        encoder.encode(frame["text"])


def test_one_text_is_not_a_list_of_characters(encoder, index):
    text = "语义检索"
    for call in (lambda: encoder.encode(text), lambda: encoder.similarity(text, TEXTS),
                 lambda: index.search(encoder, text)):
        with pytest.raises(InputError, match="expected a list of texts, got str"):
            call()


@pytest.mark.parametrize("texts", [pd.DataFrame({"a": ["语义"], "b": ["检索"]}), np.array("语义"), {"语义": 1}, None])
def test_what_is_no_list_of_texts(encoder, texts):
    with pytest.raises(InputError, match="^texts: expected a list of texts"):
        encoder.encode(texts)


def test_what_is_no_text(encoder):
    for text in (None, float("nan"), 5, "\ud800"):
        for texts in (["语义", text], ("语义", text)):
            with pytest.raises(InputError, match=r"^texts\[1\]: (expected a text|not valid Unicode)"):
                encoder.encode(texts)
    with pytest.raises(InputError, match="input_type: 1 of them for 2 texts"):
        encoder.encode(["语义", "检索"], input_type=["query"])
    with pytest.raises(ValueError, match="the vectors contain NaN or Inf"):
        encoder.similarity(np.full((1, encoder.embedding_size), np.nan), ["语义"])
    halves = (5000 * encoder.encode(["语义"])).astype("float16")
    np.testing.assert_allclose(encoder.similarity(halves, ["语义"]), [[1]], atol=1e-3)


def test_similarity_is_that_of_texts_and_of_vectors(encoder):
    first = encoder.encode(TEXTS)
    second = encoder.encode(["治疗糖尿病", "😀"], warn=False)
    cosines = encoder.similarity(TEXTS, ["治疗糖尿病", "😀"])
    assert cosines.dtype == np.float32 and cosines.shape == (3, 2)
    np.testing.assert_allclose(cosines, first @ second.T, atol=1e-6)
    assert (cosines[:, 1] == 0).all(), "an unknown text"
    np.testing.assert_allclose(encoder.similarity(first, second), cosines, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity(TEXTS, 3 * second.astype("float64")), cosines, atol=1e-6)
    of_themselves = encoder.similarity(first, first)
    assert of_themselves.max() <= 1 and np.diag(of_themselves).min() > 0.99999
    assert encoder.similarity([], TEXTS).shape == (0, 3)


@pytest.mark.parametrize("vectors", [np.ones((2, 4), "float32"), np.ones(128, "float32")])
def test_similarity_refuses_vectors_of_another_shape(encoder, vectors):
    with pytest.raises(ValueError, match=r"vectors of shape \(.*\), where those of the encoder are \[vectors, 128\]"):
        encoder.similarity(vectors, TEXTS)


def test_a_checkpoint_that_is_trained_again_is_loaded_again(checkpoint, tmp_path):
    """In the same process, as a notebook does; the encoder of the earlier weights says that they are."""
    folder = shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.graph"))
    path = str(folder / "model_state.pdparams")
    before = Encoder.load(folder, precision="fp32")
    before_digest = Encoder.load(folder, precision="fp32").model_digest
    write_weights(path, {name: array * 1.1 for name, array in read_weights(path, "--flag").items()})
    after = Encoder.load(folder, precision="fp32")
    assert after.model_digest != before_digest
    assert np.abs(after.encode(TEXTS) - before.encode(TEXTS)).max() > 1e-3
    with pytest.raises(InputError, match="^--params_path .*: has changed since it was loaded; load it again$"):
        before.model_digest  # noqa: B018


# ---------------------------------------------------------------------------------------------------------- the index
def test_an_index_finds_what_recall_finds(encoder, index, queries, checkpoint, kept_index, sample, tmp_path):
    expected = recall("--params_path", checkpoint, "--index_path", kept_index, "--corpus_file", sample / "corpus.csv",
                      "--similar_text_pair", sample / "dev.csv", "--recall_num", 7, folder=tmp_path)
    found = index.search(encoder, queries, top_k=7)
    assert [line["query"] for line in expected] == queries
    for hits, line in zip(found, expected, strict=True):
        assert [(hit.line, hit.document, hit.score) for hit in hits] == [
            (result["line"], result["document"], result["cosine"]) for result in line["results"]]
        assert all(hit.id is None and hit.passage is None for hit in hits)


def test_documents_with_ids_and_passages(encoder, checkpoint, tmp_path):
    """As recall.py gives them; a text that stands on two lines is two hits, or one."""
    sentence = "糖尿病的治疗和护理。" * 3
    corpus = [("d1", f"{sentence}信息抽取的方法。"), ("d2", "海岸带的经济开发"), ("d3", f"{sentence}信息抽取的方法。")]
    (tmp_path / "corpus.csv").write_text("".join(f"{id}\t{text}\n" for id, text in corpus), encoding="utf-8")
    common = ["--params_path", checkpoint, "--corpus_file", "corpus.csv", "--index_path", "index", "--passages",
              "--query", "信息抽取", "--top_k", 5]
    expected, = recall(*common, folder=tmp_path)
    with Index.open(str(tmp_path / "index")) as index:
        assert len(index) == 3
        hits, = index.search(encoder, ["信息抽取"])
        first_lines, = index.search(encoder, ["信息抽取"], distinct=True)
        best, = index.search(encoder, ["信息抽取"], top_k=1)
    assert [[hit.id, hit.line, hit.document, hit.passage, hit.score] for hit in hits] == [
        [line["id"], line["line"], line["document"], line["passage"], line["cosine"]] for line in expected["results"]]
    assert {hit.id for hit in hits} == {"d1", "d2", "d3"} and {hit.id for hit in first_lines} == {"d1", "d2"}
    assert best == hits[:1]


def test_an_index_is_only_read(encoder, kept_index, queries, tmp_path):
    folder = shutil.copytree(kept_index, tmp_path / "index")
    before = contents(folder)
    with Index.open(folder) as index:
        assert len(index) == 120
        assert index.search(encoder, queries[:1], top_k=500)[0][-1].line <= 120
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(ValueError, match="index: the index is closed"):
        index.search(encoder, queries)
    index.close()  # again, as files may be


def test_queries(encoder, index, queries):
    assert index.search(encoder, []) == []
    frame = pd.DataFrame({"query": queries})
    np.testing.assert_array_equal([hits[0].line for hits in index.search(encoder, frame["query"])],
                                  [hits[0].line for hits in index.search(encoder, queries)])
    assert [len(hits) for hits in index.search(encoder, queries[:3])] == [10, 10, 10]
    for query in ("", " \t\u3000", None, float("nan")):
        with pytest.raises(InputError, match=r"^queries\[1\]: expected a text.*, got .*; remove it$"):
            index.search(encoder, ["语义", query])
    with pytest.raises(InputError, match="^top_k: expected an integer >= 1, got 0$"):
        index.search(encoder, ["语义"], top_k=0)


def test_truncated_and_unknown_queries_are_warned_of(encoder, index, capsys):
    long, unknown = index.search(encoder, ["长" * 40, "😀"], top_k=1)
    assert unknown[0].score == 0 != long[0].score
    assert "1 of 2 texts is longer than 32 tokens" in (stderr := capsys.readouterr().err) and "all [UNK]" in stderr


@pytest.mark.parametrize("change, difference", [
    ({"max_seq_length": 16}, "max_seq_length 16, not 32"), ({"precision": "bf16"}, "precision bf16, not fp32")])
def test_an_encoder_of_other_options_is_refused(encoder, kept_index, tmp_path, change, difference):
    folder = shutil.copytree(kept_index, tmp_path / "index")
    manifest = dataclasses.replace(Manifest.load(str(folder), "--index_path", ""), **change)
    manifest.save(str(folder))
    with Index.open(folder) as index, pytest.raises(InputError) as raised:
        index.search(encoder, ["语义"])
    assert str(raised.value) == (
        f"--index_path {folder}: was built with {difference}; load the checkpoint that it was built with, by "
        f'Encoder.load(CHECKPOINT, max_seq_length={manifest.max_seq_length}, precision="{manifest.precision}", '
        "document_prefix='')")


def test_several_threads_take_turns(encoder, index):
    from concurrent.futures import ThreadPoolExecutor

    queries = [f"语义检索 {number}" for number in range(40)]
    alone = [index.search(encoder, [query], top_k=3) for query in queries]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda query: index.search(encoder, [query], top_k=3), queries)) == alone


@pytest.mark.parametrize("options, message", [
    ({"batch_size": -3}, "batch_size: expected an integer >= 1, got -3"),
    ({"max_seq_length": "32"}, "max_seq_length: expected an integer >= 3, got '32'"),
    ({"device": "cuda:0"}, "device: expected \"cpu\" or \"gpu\", got 'cuda:0'"),
    ({"query_prefix": "\ud800"}, "query_prefix: expected a text, got"), ({"precision": "fp8"}, "precision: expected")])
def test_options_that_no_flag_could_have(checkpoint, options, message):
    with pytest.raises(InputError, match=message):
        Encoder.load(checkpoint, **options)


def test_an_encoder_of_another_checkpoint_is_refused(checkpoint, encoder, index):
    other = Encoder.load(checkpoint.with_name("model_2"), precision="fp32")
    for _ in range(2):
        with pytest.raises(InputError, match="was built with another model; load the checkpoint that it was built"):
            index.search(other, ["语义"])
        assert index.search(encoder, ["语义"])


def test_an_encoder_without_a_checkpoint_is_not_taken(encoder, index):
    nameless = simcse_encoder.Encoder(encoder.engine, encoder.tokenizer, 32)
    with pytest.raises(ValueError, match="the encoder is not that of a checkpoint"):
        index.search(nameless, ["语义"])


def test_a_folder_without_an_index_is_refused(kept_index, tmp_path):
    with pytest.raises(InputError, match="^--index_path .*/none: no such folder; build the index with recall.py"):
        Index.open(tmp_path / "none")
    with pytest.raises(InputError, match="exists, but is not an index that recall.py wrote$"):
        Index.open(ENCODER)
    Manifest(ann_engine="none").save(str(tmp_path))
    with pytest.raises(InputError, match="has ann_engine none, which is not among those of this version"):
        Index.open(tmp_path)
    damaged = shutil.copytree(kept_index, tmp_path / "damaged")
    shard = damaged / "shard_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged: shard_0.bin is not what was written"):
        Index.open(damaged)
