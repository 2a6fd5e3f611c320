"""The search service: its answers are those of the scripts, alone, batched, and of every kind of index and model."""

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from conftest import FP32, Service, succeed

pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
TEXTS = ["语义检索", "儿童哮喘的延续护理", "a b  c", "语义检索", "😀 ①", "长" * 2000, "\x1f\u200b.", "Ünïcödé"]


def lines_of(path, count):
    return path.read_text(encoding="utf-8").splitlines()[:count]


def answered(service, path, key, body, **headers):
    """What a request that succeeds is answered."""
    status, _, content = service.ask(path, body, **headers)
    assert status == 200, content
    return content[key]


def by_recall(checkpoint, queries, top_k, *index):
    """What recall.py finds: of every query its documents and cosines."""
    asked = [word for query in queries for word in ("--query", query)]
    lines = succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--max_seq_length", 32, "--format",
                    "jsonl", "--top_k", top_k, *index, *FP32, *asked).stdout.splitlines()
    return [json.loads(line)["results"] for line in lines]


def same_hits(found, expected):
    assert [[(hit["rank"], hit["document"]) for hit in hits] for hits in found] == [
        [(hit["rank"], hit["document"]) for hit in hits] for hits in expected]
    for hits, others in zip(found, expected):
        np.testing.assert_allclose(*([hit["cosine"] for hit in each] for each in (hits, others)), atol=1e-5)


def test_embed_is_inference(service, checkpoint, sample, tmp_path):
    texts = lines_of(sample / "corpus.csv", 57) + [text for text in TEXTS if text.isprintable()]
    (tmp_path / "texts").write_text("\n".join(texts), encoding="utf-8")
    succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, "--max_seq_length", 32, *FP32,
            "--input_file", tmp_path / "texts", "--output_file", tmp_path / "v.npy")
    found = np.array(answered(service, "/embed", "embeddings", {"texts": texts}))
    np.testing.assert_allclose(found, np.load(tmp_path / "v.npy"), atol=1e-5)
    norms = [0 if "😀" in text else 1 for text in texts]  # all [UNK], and nobody's match
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), norms, atol=1e-5)
    assert found.shape == (64, 128) and abs(found[0] - found[1]).max() > 0.01


def test_similarity_is_predict(service, checkpoint, sample):
    lines = succeed("predict.py", "--device", "cpu", "--params_path", checkpoint, "--max_seq_length", 32, *FP32,
                    "--text_pair_file", sample / "test.csv").stdout.splitlines()
    pairs = [line.split("\t") for line in lines_of(sample / "test.csv", None)]
    found = answered(service, "/similarity", "cosines", {"pairs": pairs})
    np.testing.assert_allclose(found, [float(line) for line in lines], atol=1e-5)
    assert len(found) == 40 and np.std(found) > 0.01


@pytest.mark.parametrize("top_k", [7, 100])
def test_search_is_recall(service, checkpoint, sample, kept_index, top_k):
    queries = [line.split("\t")[0] for line in lines_of(sample / "dev.csv", 5)]
    queries += queries[:1]
    status, _, found = service.ask("/search", {"queries": queries, "top_k": top_k})
    assert status == 200 and found["documents"] == 120 and found["milliseconds"] > 0
    same_hits(found["results"], by_recall(checkpoint, queries, top_k, "--index_path", kept_index))
    assert [len(hits) for hits in found["results"]] == [top_k] * 6 and found["results"][5] == found["results"][0]


def test_search_gives_ten_unless_told(service):
    assert len(answered(service, "/search", "results", {"queries": ["语义"]})[0]) == 10
    assert len(answered(service, "/search", "results", {"queries": ["语义"], "top_k": 3.0})[0]) == 3


@pytest.mark.default_stack
def test_more_than_the_corpus_has(serve, checkpoint, kept_index, sample):
    service = serve("--max_top_k", 1000)
    found = answered(service, "/search", "results", {"queries": ["语义", "检索"], "top_k": 1000})
    assert [len(hits) for hits in found] == [120, 120]
    assert {hit["document"] for hit in found[0]} == set(lines_of(sample / "corpus.csv", None))
    same_hits(found, by_recall(checkpoint, ["语义", "检索"], 120, "--index_path", kept_index))


@pytest.mark.default_stack
def test_requests_at_once_get_each_its_own_answer(service, sample):
    """200 requests of all kinds by 32 clients: what each gets is what it gets alone, and batches had several."""
    lines, asked = lines_of(sample / "corpus.csv", None), []
    for n in range(200):
        some = [lines[(7 * n + step) % 120][: 4 + n % 50] for step in range(1 + n % 5)]
        asked.append([("/embed", {"texts": some}), ("/search", {"queries": some, "top_k": 1 + n % 13}),
                      ("/similarity", {"pairs": [[each, some[0]] for each in some]})][n % 3])
    alone = [service.ask(*each)[2] for each in asked]
    before, ready = service.figures(), threading.Barrier(32)

    def client(some):
        ready.wait(60)
        return [service.ask(*each)[2] for each in some]

    with ThreadPoolExecutor(32) as clients:
        at_once = list(clients.map(client, [asked[first::32] for first in range(32)]))
    for n, expected in enumerate(alone):
        found = at_once[n % 32][n // 32]
        for key in ("embeddings", "cosines"):
            np.testing.assert_allclose(found.get(key, []), expected.get(key, []), atol=1e-5)
        same_hits(found.get("results", []), expected.get("results", []))
    after = service.figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["simcse_batch_requests_sum"] == 200
    assert grown["simcse_batch_requests_count"] < 150, "batches of more than one request"
    assert grown['simcse_batch_requests_bucket{le="1.0"}'] < grown["simcse_batch_requests_count"]
    assert grown["simcse_texts_total"] == sum(len(body.get("pairs", [])) + sum(map(len, body.values()))
                                              if "pairs" in body else len(body.get("texts", body.get("queries")))
                                              for _, body in asked)
    assert grown['simcse_requests_total{path="/search",status="200"}'] == 67
    assert after["simcse_waiting_texts"] == 0 and after["simcse_documents"] == 120


def test_health_says_what_is_served(service):
    assert service.ask("/healthz")[2] == {"status": "ok", "documents": 120, "embedding_size": 128, "max_texts": 64,
                                          "max_text_length": 2000, "max_top_k": 100, "modes": ["embedding"],
                                          "index_is_outdated": False}


@pytest.mark.default_stack
@pytest.mark.parametrize("token", ["geheim", "密码 é"])
def test_token(serve, token):
    service = serve(env={"SIMCSE_TOKEN": token})
    sent = token.encode().decode("latin-1")  # as bytes go into a header
    for path, body in (("/embed", {"texts": ["a"]}), ("/similarity", {"pairs": [["a", "b"]]}),
                       ("/search", {"queries": ["a"]}), ("/metrics", None)):
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": f"Basic {sent}"},
                        {"Authorization": "Bearer"}, {"Authorization": f"Bearer {sent}x"}, {"Authorization": sent}):
            status, answer, content = service.ask(path, body, **headers)
            assert status == 401 and answer["WWW-Authenticate"] == "Bearer" and list(content) == ["error"]
        assert service.ask(path, body, Authorization=f"Bearer {sent}")[0] == 200
    for path in ("/healthz", "/", "/docs", "/openapi.json"):
        assert service.ask(path)[0] == 200
    log = service.log.read_text(encoding="utf-8")
    assert "with the token of SIMCSE_TOKEN" in log and token not in log and "another" not in log


@pytest.mark.default_stack
def test_docs_come_from_the_server_alone(service):
    status, headers, page = service.ask("/docs")
    linked = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert status == 200 and len(linked) == 3 and "://" not in page
    assert all(service.ask(path)[0] == 200 and path.startswith("/") for path in linked)
    for path in ("/", "/docs", "/healthz", "/nothing", "/page/index.html"):
        _, headers, _ = service.ask(path)
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert ("'unsafe-inline'" in policy) == (path == "/docs")
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/static-offline-docs/..%2f..%2fx"):
        assert service.ask(path)[0] == 404


@pytest.mark.default_stack
def test_milvus(checkpoint, exported, kept_index, sample, tmp_path):
    pytest.importorskip("pymilvus", reason="requirements-milvus.txt is not installed")
    database, queries = tmp_path / "recall.db", [line.split("\t")[0] for line in lines_of(sample / "dev.csv", 5)]
    expected = by_recall(checkpoint, queries, 20, "--ann_engine", "milvus", "--corpus_file", sample / "corpus.csv",
                         "--milvus_uri", database, "--milvus_collection", "papers")
    service = Service(tmp_path, "--model_dir", exported, "--milvus_uri", database, "--milvus_collection", "papers")
    try:
        asked = {"queries": queries, "top_k": 20}
        same_hits(answered(service, "/search", "results", asked), expected)
        same_hits(expected, by_recall(checkpoint, queries, 20, "--index_path", kept_index))
        with ThreadPoolExecutor(8) as clients:
            for found in clients.map(lambda _: answered(service, "/search", "results", asked), range(40)):
                same_hits(found, expected)
        assert service.ask("/healthz")[2]["documents"] == 120
        service.process.terminate()
        assert service.process.wait(60) == 0 and "Traceback" not in service.log.read_text(encoding="utf-8")
    finally:
        service.stop()


@pytest.mark.default_stack
def test_onnx(checkpoint, kept_index, service, tmp_path):
    pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed", exc_type=ImportError)
    pytest.importorskip("paddle2onnx", reason="requirements-onnx.txt is not installed", exc_type=ImportError)
    succeed("export_model.py", "--params_path", checkpoint, "--output_path", tmp_path / "onnx", "--format", "onnx")
    of_onnx = Service(tmp_path, "--model_dir", tmp_path / "onnx", "--index_path", kept_index)
    try:
        found, expected = (each.ask("/embed", {"texts": TEXTS})[2]["embeddings"] for each in (of_onnx, service))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        found, expected = (each.ask("/search", {"queries": TEXTS})[2]["results"] for each in (of_onnx, service))
        same_hits(found, expected)
    finally:
        of_onnx.stop()


def test_a_websocket_is_closed():
    """The service has none, and its requests have no method."""
    from deploy.serving.app import make_app
    from deploy.serving.jobs import EMBEDDING, Facts
    from deploy.serving.schemas import Limits

    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

    facts = Facts(3, 2, "fp32", (EMBEDDING,), 8, False)
    client = TestClient(make_app(SimpleNamespace(facts=facts, answer=None), Limits()))
    for path in ("/", "/search"):
        with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect(path):
            pass
        assert closed.value.code == 1000


def test_errors_of_the_index_and_of_the_service_itself():
    """Milvus is gone: 503; the model gives NaN: 500 and the reason; anything else: 500. No other detail is told, and
    the next request is answered."""
    from deploy.serving.app import make_app
    from deploy.serving.jobs import EMBEDDING, Embedded, Facts
    from deploy.serving.schemas import Limits
    from simcse.console import InputError, NotFiniteError

    class Failing:
        facts = Facts(3, 2, "fp32", (EMBEDDING,), 8, False)
        raises = None

        def answer(self, jobs):
            if self.raises:
                raise self.raises
            return [Embedded(np.zeros((len(job.texts), 2), "float32"), np.array([3])) for job in jobs]

    searcher = Failing()
    app = make_app(searcher, Limits())

    async def ask_all():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://a") as web:
            for searcher.raises in (InputError("--milvus_uri secret: gone"), NotFiniteError("embeddings contain NaN"),
                                    RuntimeError("secret"), KeyError("secret"), None):
                yield await web.post("/embed", json={"texts": ["a"]})

    async def answers():
        return [answer async for answer in ask_all()]

    gone, not_finite, *failed, good = asyncio.run(answers())
    assert gone.status_code == 503 and gone.headers["Retry-After"] == "1"
    assert (not_finite.status_code, not_finite.json()) == (500, {"error": "embeddings contain NaN"})
    assert [answer.status_code for answer in failed] == [500, 500]
    assert [answer.json() for answer in failed] == [{"error": f"internal error: {name}"} for name in
                                                    ("RuntimeError", "KeyError")]
    assert list(gone.json()) == ["error"] and "secret" not in gone.text
    assert good.json() == {"embeddings": [[0, 0]]}


def test_no_cosine_is_above_one():
    """Of float32 vectors of length 1 the sum of the products is now and then 1.0000001; whatever the index gives."""
    from deploy.serving.app import make_app
    from deploy.serving.jobs import EMBEDDING, SearchHit, SearchJob
    from deploy.serving.schemas import Limits
    from deploy.serving.searcher import Searcher
    from deploy.serving.shapes import BatchShapes
    from simcse.encoder.encoder import EncoderInput
    from simcse.index.protocols import Document, Line, SearchResult

    class Rounded:
        """An encoder, an index and a corpus in which all is a little too long."""

        line_count, embedding_size, texts, has_passages = 2, 2, ["甲", "乙"], False
        precision, max_seq_length = "fp32", 8

        def tokenize(self, texts, input_types):
            return EncoderInput(texts, np.ones(len(texts), int), [])

        def embed(self, inputs):
            return np.full([len(inputs.ids), 2], 0.70710725, "float32")

        def search(self, queries, depth):
            return SearchResult(np.array([[1, 0]] * len(queries)),
                                np.array([[1.0000007, -1.0000002]] * len(queries), "float32"))

        def read(self, documents, max_lines):
            return [Document(self.texts[row], [Line(row + 1, "ab"[row])]) for row in documents]

        def __len__(self):
            return 2

    one = Rounded()
    searcher = Searcher(one, one, one, BatchShapes([1, 2], [8]))
    assert searcher.answer([SearchJob(["a"], 2, EMBEDDING)]) == [[
        [SearchHit(1, "乙", 2, "b", 1.0, None, None, None), SearchHit(2, "甲", 1, "a", -1.0, None, None, None)]]]
    app = make_app(searcher, Limits())

    async def asked():
        transport = httpx.ASGITransport(app)
        async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://a") as web:
            return await web.post("/similarity", json={"pairs": [["a", "a"], ["a", "b"]]})

    assert asyncio.run(asked()).json() == {"cosines": [1.0, 1.0]}
