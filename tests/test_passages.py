"""Long documents in passages: where they are split, what their embeddings are, and what is found by them."""

import json

import model as m
from simcse.encoder.encoder import Encoder
from simcse.encoder.engine import make_engine
from simcse.index.documents import Documents
from simcse.index.engines import DEFAULT_ENGINE
from simcse.index.hits import best_rows, hits_of, search
from simcse.index.protocols import SearchResult
from simcse.text.passages import Passages, find_passages
from simcse.text.textfile import Corpus, read_text_pairs
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import pytest
from conftest import ENCODER, FP32, Service, contents, read_texts, succeed, succeed_on
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import documents_of, for_engines


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ENCODER))


def parts_of(text, tokenizer, length):
    starts = find_passages([text], tokenizer, length)[0]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], None])]


@pytest.mark.parametrize("text, length, parts", [
    ("一二三。四五六。", 10, ["一二三。四五六。"]),
    ("一二三。四五六。", 9, ["一二三。", "四五六。"]),
    ("“一二。”三四？！五六", 8, ["“一二。”", "三四？！五六"]),  # quotes and further marks belong to the sentence
    ("a b. c d.5 e f", 8, ["a b. ", "c d.5 e f"]),  # a full stop ends one before white space alone
    ("一二\n三四\n五六", 6, ["一二\n三四\n", "五六"]),
    ("一二三四五六七八", 5, ["一二三", "四五六", "七八"]),  # no sentence ends
    ("一二three四五", 5, ["一二three", "四五"]),
])
def test_where_a_text_is_split(tokenizer, text, length, parts):
    assert parts_of(text, tokenizer, length) == parts


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("一二。，！？ \n.aZ1_-é\u0301ｱ𠀀😀”"), min_size=1, max_size=300), st.integers(3, 40))
def test_passages_are_all_of_a_text_and_have_room(tokenizer, text, length):
    parts = parts_of(text, tokenizer, length)
    assert "".join(parts) == text and all(parts)
    assert max(len(ids) for ids in tokenizer(parts, 1000)) <= length


def test_the_embedding_of_a_passage_is_in_its_document(tokenizer, tmp_path):
    """By hand, in whatever pieces: equal passages are encoded once, a document of one passage is as it was, and one
    that the encoder sees nothing of has zeros."""
    documents = documents_of(tmp_path, "一二。三四。五六。", "七八。", "一二。七八。九十。一二。")
    passages = Passages.split(documents, tokenizer, 5)
    assert passages[:] == ["一二。", "三四。", "五六。", "七八。", "一二。", "七八。", "九十。", "一二。"]
    assert passages[6] == "九十。" and passages[np.array([7, 1])] == ["一二。", "三四。"]
    assert passages.place(6) == f"{tmp_path}/corpus.csv:3" and passages.rows_of(1).tolist() == [3]
    vectors = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[1] = 0
    vectors = vectors[passages.first_row_of_text]
    wanted = []
    for rows in ([0, 1, 2], [3], [4, 5, 6, 7]):
        mean = vectors[rows].sum(axis=0)
        both = [vectors[row] + mean / np.linalg.norm(mean) for row in rows]
        wanted += [each / np.linalg.norm(each) for each in both] if len(rows) > 1 else [vectors[3]]
    wanted[1] = np.zeros(4)
    ended = []  # an encoder reports at its end what it has counted

    def encode(windows):
        for rows in windows:
            yield vectors[rows]
        ended.append(True)

    for pieces in ([range(8)], [range(2), range(2, 5), range(5, 8)], [np.array([1, 3]), np.array([7])]):
        windows = passages.rows_to_encode(pieces)
        got = np.concatenate(list(passages.blend_with_documents(pieces, encode(windows))))
        assert ended.pop()
        np.testing.assert_allclose(got, [wanted[row] for rows in pieces for row in rows], atol=1e-6)
    assert [rows.tolist() for rows in passages.rows_to_encode([range(8)])] == [[0, 1, 2, 3, 6]]


def test_the_best_rows_of_each_document_are_found():
    """Against a loop, with rows that are none."""
    random = np.random.default_rng(0)
    rows = np.stack([random.permutation(30) for _ in range(20)])
    rows[::3, 20:] = -1
    cosines = np.sort(random.random((20, 30)).astype("float32"))[:, ::-1]
    of = np.where(rows < 0, -1, rows // 4)
    found = best_rows(SearchResult(rows, cosines), of, 6)
    for number in range(20):
        wanted = {}
        for row, cosine, document in zip(rows[number], cosines[number], of[number]):
            if document >= 0:
                wanted.setdefault(document, (document, cosine, row))
        wanted = [*wanted.values(), *[(-1, -np.inf, -1)] * 6][:6]
        assert [tuple(side[number, k] for side in found) for k in range(6)] == wanted


def test_it_is_asked_deeper_until_there_are_enough_documents(tmp_path, tokenizer, capsys):
    """The first document has the 40 best passages."""
    documents = documents_of(tmp_path, "一二。" * 40, "三。", "四。")
    documents.split(tokenizer, 5)
    depths = []

    class Index:
        max_k = None

        def search(self, queries, k):
            depths.append(k)
            return SearchResult(np.arange(k)[None], 1 - np.arange(k, dtype="float32")[None] / 100)

    ranking = search(Index(), documents, np.zeros((1, 2)), 3)
    assert ranking.documents.tolist() == [[0, 1, 2]] and ranking.rows.tolist() == [[0, 40, 41]]
    assert depths == [6, 12, 24, 42]
    hits, = hits_of(ranking, documents, [3])
    assert [(hit.line, hit.passage) for hit in hits] == [(1, "一二。"), (2, "三。"), (3, "四。")]
    Index.max_k = 41  # as Milvus has
    ranking = search(Index(), documents, np.zeros((1, 2)), 3)
    assert ranking.documents.tolist() == [[0, 1, -1]] and ranking.scores[0, 2] == -np.inf
    assert depths[4:] == [6, 12, 24, 41]
    assert "1 of 1 query has fewer than 3 documents: the first 41 passages" in capsys.readouterr().err


@pytest.fixture(scope="module")
def long(sample, tmp_path_factory):
    """A corpus of long documents, in two states, with copies and ids, and the queries of each one's last sentence."""
    folder = tmp_path_factory.mktemp("long")
    texts = [text.rstrip("。") for text in read_texts(sample / "corpus.csv")]
    documents = ["。".join(texts[start : start + 5]) + "。" for start in range(0, 100, 5)]
    for name, own in (("before", documents), ("after", [*documents[3:8], "全新的文本。" * 9, *documents[8:]])):
        own = [*own, own[0]]
        (folder / f"{name}.csv").write_text("".join(f"d{own.index(text)}-{row}\t{text}\n" for row, text in
                                                    enumerate(own)), encoding="utf-8")
    return folder


def recall(checkpoint, *flags):
    return ["recall.py", "--device", "cpu", "--params_path", checkpoint, "--max_seq_length", 32, "--batch_size", 1,
            "--passages", "--format", "jsonl", *FP32, *flags]


@pytest.mark.parametrize("engine", for_engines())
def test_an_index_of_passages_follows_its_corpus(checkpoint, sample, long, tmp_path, engine):
    """To the byte as one built from nothing, on whatever ranks; the documents found are those of the best passage."""
    flags = recall(checkpoint, "--ann_engine", engine, "--similar_text_pair", sample / "dev.csv", "--recall_num", 30)
    succeed(*flags, "--corpus_file", long / "before.csv", "--index_path", "kept", cwd=tmp_path)
    ranks = 2 if engine == DEFAULT_ENGINE else 1
    said = succeed_on(ranks, *flags, "--corpus_file", long / "after.csv", "--index_path", "kept", cwd=tmp_path)
    assert "18 documents: 1 new, 3 gone" in said
    found = (tmp_path / "recall_result_dir" / "recall_result.txt").read_text("utf-8")
    succeed(*flags, "--corpus_file", long / "after.csv", "--index_path", "new", cwd=tmp_path)
    assert (tmp_path / "recall_result_dir" / "recall_result.txt").read_text("utf-8") == found
    assert contents(tmp_path / "kept") == contents(tmp_path / "new")
    for line in map(json.loads, found.splitlines()):
        assert len(line["results"]) == 19 and all(hit["passage"] in hit["document"] for hit in line["results"])


def test_the_cosine_is_that_of_the_best_passage(checkpoint, sample, long, tmp_path):
    """Computed again from texts that are encoded one by one."""
    queries = [query for query, _ in read_text_pairs(str(sample / "dev.csv"), "--flag")][:4]
    asked = [word for query in queries for word in ("--query", query)]
    lines = succeed(*recall(checkpoint, "--ann_engine", "exact", "--corpus_file", long / "before.csv", "--distinct",
                            "--top_k", 20, *asked), cwd=tmp_path).stdout.splitlines()
    network, tokenizer, _ = m.load_model(str(checkpoint / "model_state.pdparams"))
    documents = Documents(Corpus(str(long / "before.csv"), "--corpus_file"))
    passages = Passages.split(documents, tokenizer, 32)
    assert len(passages) > 2 * len(documents)
    encoder = Encoder(make_engine(network, "fp32"), tokenizer, 32, 1)
    own, asked = (encoder.encode(texts) for texts in (passages[:], queries))
    vectors, = passages.blend_with_documents([range(len(passages))], [own[np.unique(passages.first_row_of_text)]])
    cosines = asked @ vectors.T
    for line, each in zip(lines, cosines):
        best = np.maximum.reduceat(each, passages.starts[:-1])
        hits = json.loads(line)["results"]
        np.testing.assert_allclose([hit["cosine"] for hit in hits], np.sort(best)[::-1], atol=1e-5)
        top = int(best.argmax())
        assert hits[0]["document"] == documents[top]
        assert hits[0]["passage"] == passages[int(np.where(passages.documents_of(np.arange(len(each))) == top, each,
                                                           -2).argmax())]


def test_the_service_finds_what_recall_finds(checkpoint, exported, sample, long, tmp_path):
    pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
    queries = [query for query, _ in read_text_pairs(str(sample / "dev.csv"), "--flag")][:3]
    asked = [word for query in queries for word in ("--query", query)]
    ask = [*recall(checkpoint, "--index_path", "index", "--top_k", 9), *asked]
    lines = succeed(*ask, "--corpus_file", long / "before.csv", cwd=tmp_path).stdout.splitlines()
    fused = succeed(*ask, "--hybrid_bm25", cwd=tmp_path).stdout.splitlines()
    service = Service(tmp_path, "--model_dir", exported, "--index_path", tmp_path / "index")
    for mode, expected in (("embedding", lines), ("hybrid", fused)):
        _, _, content = service.ask("/search", {"queries": queries, "top_k": 9, "mode": mode})
        for hits, line in zip(content["results"], map(json.loads, expected)):
            wanted = line["results"]
            assert [(hit["line"], hit["id"], hit["document"]) for hit in hits] == [
                (hit["line"], hit["id"], hit["document"]) for hit in wanted]
            assert all(hit["passage"] == other.get("passage", hit["passage"]) for hit, other in zip(hits, wanted))
            assert all(hit["passage"] and hit["passage"] in hit["document"] for hit in hits)
    service.stop()
