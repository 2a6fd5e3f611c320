"""The programs of docs/en/integrations.md: LangChain and LlamaIndex as clients of the search service."""

import ast
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FP32, ROOT, Service, read_texts, succeed

ADDRESS = "http://127.0.0.1:8000"  # of the service, in the programs
QUERY, TEXTS = "语义检索", ["语义检索", "向量召回"]  # those of the programs
TOKEN = "a-token"
LIBRARIES = ["LangChain", "LlamaIndex"]
PROGRAMS = ["retriever", "embeddings", "apart"]  # of each library, in the page's order


def read_section(language, library):
    """The section of a page about a library."""
    page = (ROOT / "docs" / language / "integrations.md").read_text(encoding="utf-8")
    return page.split(f"\n## {library}\n")[1].split("\n## ")[0]


def read_programs(language, library):
    """The programs of a library, by what they show."""
    programs = re.findall(r"^```python\n(.*?)^```$", read_section(language, library), re.S | re.M)
    return dict(zip(PROGRAMS, programs, strict=True))


def read_packages(language):
    """The packages of each library, as the page's two lines install them."""
    page = (ROOT / "docs" / language / "integrations.md").read_text(encoding="utf-8")
    lines = re.findall(r"^pip install (.+)$", page, re.M)
    return dict(zip(LIBRARIES, map(shlex.split, lines), strict=True))


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_pages_have_the_same_programs(library):
    """But for comments."""
    english, chinese = (read_programs(language, library) for language in ("en", "zh"))
    for name in PROGRAMS:
        compile(english[name], name, "exec")
        assert ast.dump(ast.parse(english[name])) == ast.dump(ast.parse(chinese[name])), name
        assert ADDRESS in english[name]


def test_both_pages_install_the_same_pinned_packages():
    assert read_packages("en") == read_packages("zh")
    for packages in read_packages("en").values():
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in packages), packages


# ------------------------------------------------------------------------------- the programs against a running service
# A mark, since a skip in a fixture or test would come after the fixtures that train and export.
slow = pytest.mark.skipif("not config.getoption('--slow')",
                          reason="only with --slow: makes environments and installs LangChain and LlamaIndex")


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request, tmp_path_factory):
    """A library in an environment of its own: its name, and the Python that has it."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = read_packages("en")[request.param]
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", *packages], check=True)
    return SimpleNamespace(name=request.param, python=folder / "bin" / "python")


@pytest.fixture(scope="module")
def hybrid(exported, checkpoint, sample, tmp_path_factory):
    """A service over an index with ids and BM25, which asks for a token."""
    pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
    folder = tmp_path_factory.mktemp("hybrid")
    lines = [f"d{number}\t{text}\n" for number, text in enumerate(read_texts(sample / "corpus.csv"))]
    (folder / "corpus.csv").write_text("".join(lines), encoding="utf-8")
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", folder / "corpus.csv",
            "--query", QUERY, "--max_seq_length", 32, "--hybrid_bm25", "--index_path", folder / "index", *FP32)
    running = Service(folder, "--model_dir", exported, "--index_path", folder / "index", env={"SIMCSE_TOKEN": TOKEN})
    yield running
    running.stop()


@pytest.fixture
def recorder(hybrid):
    """A server that passes requests on to the service; `bodies` has what was sent."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.bodies.append(json.loads(content))
            headers = {name: self.headers[name] for name in ("Content-Type", "Authorization")}
            request = urllib.request.Request(hybrid.address + self.path, content, headers)
            try:
                answer = urllib.request.urlopen(request, timeout=60)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                answered = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(answered)))
            self.end_headers()
            self.wfile.write(answered)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run_program(library, name, recorder, folder, ending=""):
    """Run a program of the page, with further lines at its end, as a file of its own; return what it prints."""
    address = f"http://127.0.0.1:{recorder.server_port}"
    code = read_programs("en", library.name)[name].replace(ADDRESS, address)
    (folder / "program.py").write_text(f"{code}\n{ending}", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ran = subprocess.run([library.python, "program.py"], cwd=folder, capture_output=True, text=True, timeout=300,
                         encoding="utf-8", env={**environment, "SIMCSE_TOKEN": TOKEN, "no_proxy": "127.0.0.1",
                                                "PYTHONUTF8": "1"})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def ask(service, path, **body):
    status, _, content = service.ask(path, body, Authorization=f"Bearer {TOKEN}")
    assert status == 200, content
    return content


def embed(service, texts, **options):
    """What /v1/embeddings itself answers, as a matrix."""
    data = ask(service, "/v1/embeddings", input=texts, **options)["data"]
    return np.array([each["embedding"] for each in data])


RETRIEVE = {"LangChain": "invoke", "LlamaIndex": "retrieve"}  # async: ainvoke, aretrieve
TEXT_SCORE_METADATA = {"LangChain": "hit.page_content, hit.metadata.pop('score'), hit.metadata",
                       "LlamaIndex": "hit.text, hit.score, hit.metadata"}


@slow
@pytest.mark.parametrize("mode, is_async", [("embedding", False), ("hybrid", False), ("hybrid", True)])
def test_a_retriever_finds_what_search_finds(library, hybrid, recorder, mode, is_async, tmp_path):
    retrieve = f"retriever.{RETRIEVE[library.name]}('{QUERY}')"
    if is_async:
        retrieve = f"asyncio.run(retriever.a{RETRIEVE[library.name]}('{QUERY}'))"
    ending = ("import asyncio, json\n"
              f"retriever = SimcseRetriever(top_k=5, mode='{mode}')\n"
              f"hits = {retrieve}\n"
              f"print(json.dumps([[{TEXT_SCORE_METADATA[library.name]}] for hit in hits]))")
    lines = run_program(library, "retriever", recorder, tmp_path, ending)
    assert recorder.bodies == [{"queries": [QUERY], "top_k": 3, "mode": "embedding"},
                               {"queries": [QUERY], "top_k": 5, "mode": mode}]
    best, = ask(hybrid, "/search", queries=[QUERY], top_k=3, mode="embedding")["results"]
    assert lines[:-1] == [f"{hit['cosine']:.4f} {hit['document']}" for hit in best]
    found, = ask(hybrid, "/search", queries=[QUERY], top_k=5, mode=mode)["results"]
    measure = "score" if mode == "hybrid" else "cosine"
    assert json.loads(lines[-1]) == [
        [hit["document"], hit[measure], {name: hit[name] for name in ("line", "id", "cosine")}] for hit in found]


@slow
@pytest.mark.parametrize("flags, message", [
    pytest.param("top_k=1000", "body.top_k: Input should be less than or equal to 100", id="top_k"),
    pytest.param("mode='words'", "body.mode: Input should be 'embedding' or 'hybrid'", id="mode")])
def test_a_retriever_raises_the_services_error(library, recorder, flags, message, tmp_path):
    ending = (f"try:\n    SimcseRetriever({flags}).{RETRIEVE[library.name]}('{QUERY}')\n"
              "except RuntimeError as error:\n    print(error)\n")
    line = run_program(library, "retriever", recorder, tmp_path, ending)[-1]
    assert line == f'http://127.0.0.1:{recorder.server_port}/search: 422 {{"error":"{message}"}}'


@slow
def test_embeddings_are_those_of_the_service(library, hybrid, recorder, tmp_path):
    """And an error of the service is raised at once, with its text."""
    method = {"LangChain": "embed_documents", "LlamaIndex": "get_text_embedding_batch"}[library.name]
    ending = ("import json\nprint(json.dumps([query, *documents]))\n"
              f"try:\n    embeddings.{method}(['短', '长' * 40])\nexcept Exception as error:\n    print(error)")
    lines = run_program(library, "embeddings", recorder, tmp_path, ending)
    vectors = json.loads(lines[2])
    np.testing.assert_allclose(vectors, embed(hybrid, [QUERY, *TEXTS]), atol=1e-6)
    np.testing.assert_allclose([float(line) for line in lines[:2]], np.dot(vectors[1:], vectors[0]), atol=1e-6)
    assert "input 1: has more than 32 tokens" in lines[3]
    assert [body["input"] for body in recorder.bodies] == [[QUERY], TEXTS, ["短", "长" * 40]]
    assert not any("input_type" in body for body in recorder.bodies)


@slow
def test_queries_and_documents_are_sent_apart(library, hybrid, recorder, tmp_path):
    lines = run_program(library, "apart", recorder, tmp_path)
    sent = {body["input_type"]: body["input"] for body in recorder.bodies}
    assert sent == {"query": [QUERY], "document": TEXTS} and len(recorder.bodies) == 2
    cosines = embed(hybrid, TEXTS, input_type="document") @ embed(hybrid, [QUERY], input_type="query")[0]
    np.testing.assert_allclose([float(line.split()[0]) for line in lines], cosines, atol=1e-4)
