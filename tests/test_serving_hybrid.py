"""The search service over an index with ids and BM25: it searches as recall.py does, and its page shows what it found.
"""

import json

from simcse.index.bm25 import query_words, words
from simcse.text.textfile import read_text_pairs

import numpy as np
import pytest
from conftest import FP32, Service, read_texts, succeed


@pytest.fixture(scope="module")
def index(checkpoint, sample, tmp_path_factory):
    """With ids, and the first document twice."""
    folder = tmp_path_factory.mktemp("hybrid")
    texts = read_texts(sample / "corpus.csv")
    (folder / "corpus.csv").write_text("".join(
        f"d{number}\t{text}\n" for number, text in enumerate([*texts, texts[0]])), encoding="utf-8")
    said = succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", folder / "corpus.csv",
                   "--query", "语义", "--max_seq_length", 32, "--hybrid_bm25", "--index_path", folder / "index", *FP32)
    assert said.stderr.index("BM25 over 120 documents") < said.stderr.index("kept the index")  # both in one step
    return folder / "index"


@pytest.fixture(scope="module")
def hybrid(index, exported, tmp_path_factory):
    pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
    running = Service(tmp_path_factory.mktemp("service"), "--model_dir", exported, "--index_path", index)
    yield running
    running.stop()


def search(service, **body):
    status, _, content = service.ask("/search", body)
    assert status == 200, content
    return content["results"]


def test_both_modes_are_recall(hybrid, index, checkpoint, sample):
    """Whoever asks for how many beside it; the cosine of what words alone have found is that of its embedding."""
    queries = [query for query, _ in read_text_pairs(str(sample / "dev.csv"), "--flag")][:6]
    assert hybrid.ask("/healthz")[2]["modes"] == ["embedding", "hybrid"]
    asked = [word for query in queries for word in ("--query", query)]
    for mode, more in (("hybrid", ["--hybrid_bm25"]), ("embedding", [])):
        lines = succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--index_path", index, "--format",
                        "jsonl", "--top_k", 20, *more, *FP32, *asked).stdout.splitlines()
        found = search(hybrid, queries=queries, top_k=20, mode=mode)
        for query, hits, line in zip(queries, found, lines):
            expected = json.loads(line)["results"]
            assert [[hit[name] for name in ("rank", "line", "id", "document")] for hit in hits] == [
                [hit[name] for name in ("rank", "line", "id", "document")] for hit in expected]
            measure = "score" if more else "cosine"
            np.testing.assert_allclose([hit[measure] for hit in hits], [hit[measure] for hit in expected], atol=1e-5)
            for hit in hits:
                common = [word for word in dict.fromkeys(query_words(query)) if word in words(hit["document"])]
                assert hit["words"] == (common if more else None)
    deep = search(hybrid, queries=queries[:2], top_k=100, mode="embedding")
    cosine_of = [{hit["document"]: hit["cosine"] for hit in hits} for hits in deep]
    for hits, cosines in zip(search(hybrid, queries=queries[:2]), cosine_of):
        for hit in hits:
            assert hit["cosine"] == pytest.approx(cosines.get(hit["document"], hit["cosine"]), abs=1e-5)
            assert -1 <= hit["cosine"] <= 1 and hit["score"] is not None


def test_a_mode_that_the_index_has_not_is_refused(service):
    status, _, content = service.ask("/search", {"queries": ["a"], "mode": "hybrid"})
    assert (status, content) == (422, {"error": "body.mode: Input should be 'embedding'"})
    assert service.ask("/healthz")[2]["modes"] == ["embedding"]


def test_the_page_has_the_switch_and_shows_ids_and_words(hybrid, visit):
    page = visit(hybrid.address)
    page.search("2型糖尿病患者的睡眠质量")
    (hits,) = search(hybrid, queries=["2型糖尿病患者的睡眠质量"])
    notes = page.texts("#results .notes")
    assert notes == [f"Id {hit['id']}    " + (f"Words found: {' · '.join(hit['words'])}" if hit["words"] else
                                              "None of the words") for hit in hits]
    assert page.texts("#results .text") == [hit["document"] for hit in hits]
    assert page.texts("#results .score") == [f"{hit['score']:.4f}" for hit in hits], "what ranked them"
    assert page.find("#results .score").get_attribute("title") == (
        f"fused score {hits[0]['score']:.4f} (cosine similarity {hits[0]['cosine']:.4f})")
    page.find("#hybrid").click()
    page.wait(lambda: page.texts("#results .notes")[0] in {f"Id {hit['id']}" for hit in search(
        hybrid, queries=["2型糖尿病患者的睡眠质量"], mode="embedding")[0]})
    page.browser.refresh()
    page.wait(lambda: page.texts("#results .notes"))
    assert not page.find("#hybrid").is_selected()


def test_an_open_page_goes_on_with_an_index_that_has_no_bm25(hybrid, index, visit):
    """The switch goes, and the keyboard with it to the box; and it comes back with BM25."""
    def rename(one, other, modes):
        (index / one).rename(index / other)
        page.wait(lambda: hybrid.ask("/healthz")[2]["modes"] == modes)

    page = visit(hybrid.address)
    page.search("糖尿病")
    page.find("#hybrid").click()  # off
    rename("bm25", ".bm25", ["embedding"])
    page.find("#hybrid").click()  # on
    page.wait(lambda: not page.find("#modes").is_displayed())
    assert page.focused() == "query"
    page.search("睡眠质量")
    assert len(page.texts("#results li")) == 10 and not page.text("#error")
    rename(".bm25", "bm25", ["embedding", "hybrid"])
    page.search("护理")
    assert page.find("#modes").is_displayed() and "ords" in page.texts("#results .notes")[0]
