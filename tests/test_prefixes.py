"""Prefixes of queries and documents: where they are put, what they count for, and who knows them."""

import argparse
import json
import shutil

import ann_util
import data
import model as m
from deploy.python import encoder as deployed
from simcse.console import InputError
from simcse.encoder.encoder import Encoder, tokenize
from simcse.encoder.weights import PARAMS_FILE, model_digest
from simcse.index.manifest import Manifest
from simcse.text import wordpiece
from simcse.text.prefixes import Prefixes, count_tokens

import numpy as np
import pytest
from conftest import FP32, read_texts, run_script

PREFIXES = Prefixes(query="查询：", document="文档：")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return m.checkpoint_tokenizer(str(checkpoint / PARAMS_FILE))


@pytest.fixture(scope="module")
def plain(checkpoint):
    return m.Encoder.load(str(checkpoint), precision="fp32", max_seq_length=32)


@pytest.fixture(scope="module")
def encoder(plain):
    return Encoder(plain.engine, plain.tokenizer, 32, prefixes=PREFIXES)


@pytest.fixture(scope="module")
def with_prefixes(checkpoint, tmp_path_factory):
    """A checkpoint that records prefixes."""
    folder = tmp_path_factory.mktemp("prefixes") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    record = folder / "simcse_config.json"
    content = json.loads(record.read_text("utf-8")) | PREFIXES.as_record()
    record.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def test_an_embedding_is_that_of_prefix_and_text(encoder, plain):
    texts = ["语义检索", "信息抽取的方法"]
    queries = plain.encode([PREFIXES.query + text for text in texts])
    documents = plain.encode([PREFIXES.document + text for text in texts])
    np.testing.assert_allclose(encoder.encode(texts, input_type="query"), queries, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(texts), documents, atol=1e-6)
    first, second = encoder.encode_pairs([texts])
    np.testing.assert_allclose(first, queries[:1], atol=1e-6)
    np.testing.assert_allclose(second, documents[1:], atol=1e-6)
    for wrong in ("title", None, ["query", "title"]):
        with pytest.raises(InputError, match="input_type: expected query or document, got "):
            encoder.encode(texts, input_type=wrong)


def test_a_text_is_unknown_whatever_its_prefix(encoder, capsys):
    texts = ["😀", "语", "😀！", "。"]
    for input_type in ("query", "document"):
        assert encoder.encode(texts, input_type=input_type).any(axis=1).tolist() == [False, True, False, True]
    assert "2 of 4 texts are all [UNK]" in capsys.readouterr().err
    inputs = tokenize(encoder.tokenizer, ["😀", "😀", "语"], 32, PREFIXES, ["query", "document", "query"])
    assert inputs.unknown == [0, 1] and inputs.ids[0] != inputs.ids[1]


def test_a_token_that_grows_together_with_the_text_is_the_texts(plain, tmp_path):
    """As "ab" of the prefix "a" and the text "b"; it is no unknown text."""
    tokenizer = wordpiece.WordPiece({token: number for number, token in enumerate(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "ab"])})
    inputs = tokenize(tokenizer, ["b", "", "b b", "😀"], 8, Prefixes(query="a"), "query")
    assert [ids[1:-1] for ids in inputs.ids] == [[7], [5], [7, 6], [5, 1]] and inputs.unknown == [1, 3]
    tokenizer.save_rust(str(tmp_path))
    own = deployed.Tokenizer(str(tmp_path))
    predictor = argparse.Namespace(embed=lambda ids, types: np.ones((len(ids), 2), "float32"), batch_tokens=2048,
                                   max_batch_size=None, max_positions=512, embedding_size=2)
    assert deployed.encode(predictor, own, ["b", "", "b b", "😀"], 8, prefixes=["a"] * 4).unknown == [1, 3]


def test_a_prefix_counts_as_tokens(encoder, plain, capsys):
    """[CLS], three tokens of prefix, the text, [SEP]."""
    assert count_tokens(encoder.tokenizer, PREFIXES.query) == 3
    encoder.encode(["长" * 27, "长" * 28])
    assert "1 of 2 texts is longer than 32 tokens" in capsys.readouterr().err
    assert encoder.max_document_length() == 29
    with pytest.raises(InputError, match="--query_prefix has 3 tokens, which leave none of --max_seq_length 5 to"):
        Encoder(plain.engine, plain.tokenizer, 5, prefixes=PREFIXES)


def test_passages_have_room_for_it(encoder, tmp_path):
    from simcse.text.textfile import Corpus

    path = tmp_path / "corpus.csv"
    path.write_text("语义检索的方法。" * 20 + "\n", encoding="utf-8")
    documents = ann_util.read_documents(Corpus(str(path), "--corpus_file"), encoder, Manifest(passages=True))
    inputs = encoder.tokenize(documents.passages[:])
    assert len(documents.passages) > 5 and 24 < inputs.lengths.max() <= 32


def batch_of(texts, tokenizer, **flags):
    args = argparse.Namespace(max_seq_length=16, keep_duplicate_negatives=False, crop_rate=0.0, seed=1)
    vars(args).update(flags)
    return data.make_batch(texts, tokenizer, args, range(len(texts)), 0, PREFIXES)


def test_sides_of_a_training_batch(tokenizer):
    """Duplicates are found whatever their prefixes are."""
    batch = batch_of([("语义", "检索", "语义"), ("检索", "义", "语")], tokenizer)
    for side, prefix, texts in ((batch.query, "查询：", ["语义", "检索"]), (batch.title, "文档：", ["检索", "义"]),
                                (batch.hard_negative, "文档：", ["语义", "语"])):
        expected = data.Inputs.of(tokenizer([prefix + text for text in texts], 16), tokenizer.pad_token_id)
        assert side.input_ids.tolist() == expected.input_ids.tolist()
    keys = batch.duplicate_keys
    assert keys.query[0] == keys.hard_negative[0] and keys.query[1] == keys.title[0]
    assert len({*keys.query, *keys.title, *keys.hard_negative}) == 4


def test_duplicates_that_are_cut_at_other_places(tokenizer):
    """A query has a prefix, its copy among the titles has none: both are cut, the query earlier."""
    long = "中西方语言与文化的差异研究以及信息抽取的方法"
    args = argparse.Namespace(max_seq_length=16, keep_duplicate_negatives=False, crop_rate=0.0, seed=1)
    batch = data.make_batch([(long, "语义"), ("检索", long)], tokenizer, args, [0, 1], 0, Prefixes(query="查询："))
    assert batch.duplicate_keys.query[0] == batch.duplicate_keys.title[1]


@pytest.mark.parametrize("crop_rate", [0.0, 0.5])
def test_views_of_a_text(tokenizer, crop_rate):
    """A query and a document, with the same key; cropping leaves the prefix whole."""
    batch = batch_of(["中西方语言与文化的差异研究", "语义"], tokenizer, crop_rate=crop_rate)
    for side, prefix in ((batch.query, "查询："), (batch.title, "文档：")):
        ids = side.input_ids[0].tolist()
        assert ids[:4] == tokenizer([prefix], 16)[0][:-1] and len(ids) <= 16
    assert batch.duplicate_keys.query.tolist() == batch.duplicate_keys.title.tolist()
    cut = batch.query.input_ids[0].tolist() != tokenizer(["查询：中西方语言与文化的差异研究"], 16)[0]
    assert cut == bool(crop_rate)


def test_a_checkpoint_records_them(with_prefixes, checkpoint):
    """They change no vector of a given text, so that the model is the same."""
    weights = str(with_prefixes / PARAMS_FILE)
    assert m.Encoder.load(weights).prefixes == PREFIXES
    assert m.Encoder.load(weights, query_prefix="", document_prefix="d: ").prefixes == Prefixes("", "d: ")
    assert m.load_model(weights).record["document_prefix"] == "文档："
    assert model_digest(weights, None) == model_digest(str(checkpoint / PARAMS_FILE), None)


def test_an_index_knows_that_of_its_documents(with_prefixes, plain, sample, tmp_path):
    """Results have the texts without it; another prefix of queries is as good, another one of documents is refused."""
    texts = read_texts(sample / "corpus.csv")[:50]
    (tmp_path / "corpus.csv").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    recall = ("recall.py", "--device", "cpu", "--params_path", with_prefixes, "--max_seq_length", 32, "--index_path",
              tmp_path / "index", "--query", "语义检索", "--top_k", 3, "--format", "jsonl", *FP32)
    documents = plain.encode([PREFIXES.document + text for text in texts], warn=False)
    runs = (("查询：", ("--corpus_file", tmp_path / "corpus.csv")), ("问题：", ("--query_prefix", "问题：")))
    for prefix, more in runs:
        result = run_script(*recall, *more)
        assert not result.returncode, result.stderr
        hits = json.loads(result.stdout)["results"]
        cosines = documents @ plain.encode([f"{prefix}语义检索"])[0]
        best = np.argsort(-cosines)[:3]
        assert [hit["document"] for hit in hits] == [texts[row] for row in best]
        np.testing.assert_allclose([hit["cosine"] for hit in hits], cosines[best], atol=1e-5)
    refused = run_script(*recall, "--document_prefix", "")
    assert refused.returncode == 2
    assert ("was built with document_prefix '文档：', not ''; --document_prefix '文档：' takes it as it is"
            in refused.stderr), refused.stderr


def test_a_manifest_older_than_the_flag_has_none():
    older = json.loads(Manifest(document_prefix="").to_json())
    del older["document_prefix"]
    manifest = Manifest.from_dict(older, "here", "remedy")
    assert not manifest.differences(Manifest(document_prefix=""))
    assert manifest.differences(Manifest(document_prefix="d: ")) == ["document_prefix '', not 'd: '"]


def test_the_service_puts_them_before_texts(encoder):
    from types import SimpleNamespace

    pytest.importorskip("pydantic", reason="requirements-serving.txt is not installed")
    from deploy.serving.jobs import EmbedJob
    from deploy.serving.searcher import Searcher
    from deploy.serving.shapes import BatchShapes

    searcher = Searcher(encoder, None, SimpleNamespace(line_count=0), BatchShapes([1, 4], [8]))
    jobs = [EmbedJob(["语义", "语义"], ["query", "document"]), EmbedJob(["语义"], ["query"])]
    first, second = (answer.embeddings for answer in searcher.answer(jobs))
    assert (first[0] == second[0]).all()
    expected = encoder.encode_pairs([("语义", "语义")])
    np.testing.assert_allclose(first, np.concatenate(expected), atol=1e-6)


def test_an_exported_folder_puts_them_before_texts(encoder, tmp_path):
    encoder.tokenizer.save_rust(str(tmp_path))
    tokenizer = deployed.Tokenizer(str(tmp_path))
    engine = encoder.engine
    predictor = argparse.Namespace(embed=lambda *batch: np.asarray(engine.embed(*batch)), batch_tokens=2048,
                                   max_batch_size=None, max_positions=512, embedding_size=encoder.embedding_size)
    texts = ["语义检索", "信息抽取", "😀", "长" * 30]
    encoded = deployed.encode(predictor, tokenizer, texts, 32, prefixes=[*PREFIXES, *PREFIXES])
    expected = encoder.encode(texts, input_type=["query", "document"] * 2, warn=False)
    np.testing.assert_allclose(encoded.embeddings, expected, atol=1e-6)
    assert (encoded.truncated, encoded.unknown) == ([3], [2])
    with pytest.raises(ValueError, match="max_seq_length 5: the prefix '查询：' has 3 tokens"):
        deployed.encode(predictor, tokenizer, texts, 5, prefixes=[PREFIXES.query] * 4)


def test_training_records_the_prefixes_of_its_flags(with_prefixes, sample, tmp_path):
    """Those that it does not name are the checkpoint's; a whitened checkpoint has them, too."""
    result = run_script("train.py", "--device", "cpu", "--init_from_ckpt", with_prefixes, "--train_set_file",
                        sample / "corpus.csv", "--epochs", 0, "--whiten", "--max_seq_length", 16, "--query_prefix",
                        "q: ", "--save_dir", tmp_path, "--visualdl_dir", tmp_path / "log")
    assert not result.returncode, result.stderr
    for name in ("model_0", "model_0_whitened"):
        record = json.loads((tmp_path / name / "simcse_config.json").read_text("utf-8"))
        assert (record["query_prefix"], record["document_prefix"]) == ("q: ", "文档：")


def test_unknown_texts_of_a_tokenizer(tokenizer):
    ids = tokenizer(["查询：", "查询：😀", "查询：语"], 16)
    assert wordpiece.find_unknown(tokenizer, ids) == []
    assert wordpiece.find_unknown(tokenizer, ids, 3) == [0, 1]
