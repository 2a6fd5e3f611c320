"""This project's way of doing each thing that a stage's command line does not time by itself; see original.py."""

import json
import os
import resource
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

import data  # noqa: E402

import numpy as np  # noqa: E402


def prepare(folder: str, sizes: dict, vocab_folder: str) -> dict:
    """Write an encoder of random weights, and a checkpoint of it with fc 256."""
    import model

    import paddle
    from paddlenlp.transformers import ErnieConfig, ErnieModel

    paddle.seed(0)
    network = model.SimCSE(ErnieModel(ErnieConfig(**sizes)), output_emb_size=256)
    network.ptm.save_pretrained(f"{folder}/encoder")
    tokenizer = data.load_tokenizer(vocab_folder)
    tokenizer.save_pretrained(f"{folder}/encoder")
    record = model.make_record(network, f"{folder}/encoder", 64)
    model.save_checkpoint(f"{folder}/checkpoint", network, tokenizer, record)
    return {}


def engine_of(checkpoint: str, precision: str = "auto"):
    """The engine and the tokenizer of a checkpoint."""
    import model
    from simcse import ranks
    from simcse.engine import make_engine

    ranks.set_device("cpu")
    network, tokenizer, _ = model.load_model(f"{checkpoint}/model_state.pdparams")
    return make_engine(network, precision), tokenizer


def best_of(times: int, work) -> float:
    """Seconds: the median of some runs after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def tokenize(encoder: str, cases: dict[str, list[str]]) -> dict[str, float]:
    """Texts/s."""
    tokenizer = data.load_tokenizer(encoder)
    return {name: len(texts) / best_of(5, lambda texts=texts: tokenizer(texts, 64)) for name, texts in cases.items()}


def encode(checkpoint: str, cases: dict[str, list[str]], precision: str) -> dict[str, float]:
    """Texts/s of `model.encode`, tokenizing included."""
    from model import encode

    engine, tokenizer = engine_of(checkpoint, precision)
    return {name: len(texts) / best_of(2, lambda texts=texts: encode(engine, tokenizer, texts, 64))
            for name, texts in cases.items()}


def shapes(checkpoint: str, precision: str, batches: list[int], lengths: list[int]) -> dict[str, float]:
    """Texts/s of the engine by batch and length, without tokenizing."""
    engine, _ = engine_of(checkpoint, precision)
    speeds = {}
    for length in lengths:
        for batch in batches:
            ids = np.random.default_rng(0).integers(5, 10000, (batch, length))
            speeds[f"batch {batch}, {length} tokens"] = batch / best_of(3, lambda ids=ids: engine.embed(ids, ids * 0))
    return speeds


def lines(path: str) -> dict[str, float]:
    """Seconds from a file of training texts to its first batch, and peak memory in MB."""
    start = time.perf_counter()
    texts = data.TextFile(path, "--train_set_file")
    [texts[row] for row in next(data.ShuffledBatches(len(texts), 64).epoch(0))]
    return {"s": time.perf_counter() - start, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def clustered(count: int, seed: int, centres: int = 1000, spread: float = 0.5) -> np.ndarray:
    """Unit vectors of 256 around `centres` random ones; the cosine within a cluster is about 1 / (1 + spread^2)."""
    random, means = np.random.default_rng(seed), np.random.default_rng(0).standard_normal((centres, 256), "float32")
    vectors = means[random.integers(0, centres, count)] + spread * random.standard_normal((count, 256), "float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def index(count: int, checkpoint: str | None, texts: list[str], queries: list[str]) -> dict[str, float]:
    """Vectors/s of the build and ANN recall@50 of the defaults; hnswlib alone, and with the original's settings.

    Vectors are those of `texts`, or, without a checkpoint, `count` clustered ones.
    """
    from ann_util import Shards, ann_recall, exact_search

    import hnswlib

    if checkpoint:
        from model import encode

        engine, tokenizer = engine_of(checkpoint)
        vectors, asked = (encode(engine, tokenizer, part, 64) for part in (texts, queries))
    else:
        vectors, asked = clustered(count, 1), clustered(500, 2)
    _, exact = exact_search(asked, vectors, 50)
    result = {}

    def build(name: str, add, search) -> None:
        start = time.perf_counter()
        add()
        result[f"{name} build"] = len(vectors) / (time.perf_counter() - start)
        result[f"{name} recall"] = ann_recall(search(), exact)

    ours = Shards({"ann_engine": "hnswlib", "index_shards": 8, "hnsw_m": 32, "hnsw_ef": 100,
                   "hnsw_max_elements": len(vectors)}, len(vectors), 256, os.cpu_count())
    build("ours", lambda: ours.fill(vectors[rows.start : rows.stop] for rows in ours.pieces),
          lambda: ours.search(asked, 50)[1])
    for name, m in (("hnswlib", 32), ("original", 100)) if checkpoint else (("hnswlib", 32),):
        alone = hnswlib.Index("ip", 256)
        alone.init_index(len(vectors), ef_construction=100, M=m)
        alone.set_ef(100)
        build(name, lambda: alone.add_items(vectors), lambda: 1 - alone.knn_query(asked, 50)[1])  # noqa: B023
    return result


if __name__ == "__main__":
    print("RESULT " + json.dumps(globals()[sys.argv[1]](**json.load(sys.stdin))))
