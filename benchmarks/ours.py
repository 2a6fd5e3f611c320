"""This project's side of what a script's command line does not time by itself; see original.py."""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

import data  # noqa: E402
from simcse.machine import CPU_CORES  # noqa: E402
from simcse.text import textfile, tokens, wordpiece  # noqa: E402

import graphs  # noqa: E402
import numpy as np  # noqa: E402
import side  # noqa: E402

MILVUS_QUERIES = 100  # that a Milvus server is searched with at a time; exact search answers some ten a second


def prepare(folder: str, sizes: dict, vocab_folder: str) -> dict:
    """Write an encoder of random weights, and a checkpoint of it with fc 256."""
    import model

    import paddle
    from paddlenlp.transformers import ErnieConfig, ErnieModel

    paddle.seed(0)
    network = model.SimCSE(ErnieModel(ErnieConfig(**sizes)), output_emb_size=256)
    network.ptm.save_pretrained(f"{folder}/encoder")
    tokenizer = wordpiece.load_tokenizer(vocab_folder)
    tokenizer.save_pretrained(f"{folder}/encoder")
    record = model.make_record(network, f"{folder}/encoder", 64)
    model.save_checkpoint(f"{folder}/checkpoint", network, tokenizer, record)
    return {}


def encoder_of(checkpoint: str, precision: str = "auto", texts: Sequence[str] = ()):
    """Return the encoder of a checkpoint, as the scripts load it; int8 is calibrated with the texts."""
    from model import Encoder

    return Encoder.load(checkpoint, precision=precision, max_seq_length=64, calibration_texts=texts)


def median_seconds(times: int, work) -> float:
    """Return the median of the seconds of some calls, after one that does not count."""
    work()
    return float(np.median([side.seconds_of(work) for _ in range(times)]))


def tokenize(encoder: str, cases: dict[str, list[str]]) -> dict[str, float]:
    """Return texts/s of tokenizing."""
    tokenizer = wordpiece.load_tokenizer(encoder)
    speeds = {}
    for name, texts in cases.items():
        speeds[name] = len(texts) / median_seconds(5, partial(tokenizer, texts, 64))
    return speeds


def encode(checkpoint: str, cases: dict[str, list[str]], precision: str,
           paddle_inference: bool = False) -> Iterator[dict[str, float]]:
    """Yield texts/s of `Encoder.encode`, tokenizing included, a pass after another.

    Args:
        paddle_inference: use Paddle Inference, not what is fastest here.
    """
    from model import load_model
    from simcse.device import set_device
    from simcse.encoder.encoder import Encoder
    from simcse.encoder.engine import make_engine

    if paddle_inference:
        set_device("cpu")
        network, tokenizer, _ = load_model(f"{checkpoint}/model_state.pdparams")
        encoder = Encoder(make_engine(network, precision), tokenizer, 64)
    else:
        encoder = encoder_of(checkpoint, precision, cases["corpus"])
    while True:
        yield {name: len(texts) / side.seconds_of(lambda texts=texts: encoder.encode(texts))
               for name, texts in cases.items()}


def encode_openvino(checkpoint: str, cases: dict[str, list[str]], int8: bool) -> Iterator[dict[str, float]]:
    """Texts/s of OpenVINO driven by hand with the batches of `Encoder`, tokenized before: the ONNX graph, in int8 by
    NNCF's defaults for transformers, else in the precision that OpenVINO chooses."""
    import model
    from simcse.encoder.onnx import export_onnx
    from simcse.machine import BATCH_TOKENS

    import openvino

    network, tokenizer, _ = model.load_model(f"{checkpoint}/model_state.pdparams")
    batches = {name: [dict(zip(("input_ids", "token_type_ids"), batch)) for _, *batch in tokens.make_batches(
        tokenizer(texts, 64), tokenizer.pad_token_id, None, BATCH_TOKENS["cpu"])] for name, texts in cases.items()}
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(network, folder)
        graph = openvino.Core().read_model(f"{folder}/inference.onnx")
        if int8:
            import nncf

            graph = nncf.quantize(graph, nncf.Dataset(batches["corpus"]), model_type=nncf.ModelType.TRANSFORMER)
        compiled = openvino.Core().compile_model(graph, "CPU")
    while True:
        yield {name: len(cases[name]) / side.seconds_of(lambda some=some: [compiled(batch) for batch in some])
               for name, some in batches.items()}


def shapes(checkpoint: str, precision: str, batches: list[int], lengths: list[int]) -> dict[str, float]:
    """Return texts/s of the engine by batch and length, without tokenizing."""
    engine = encoder_of(checkpoint, precision).engine
    speeds = {}
    for length in lengths:
        for batch in batches:
            ids = np.random.default_rng(0).integers(5, 10000, (batch, length))
            token_types = np.zeros_like(ids)
            seconds = median_seconds(3, partial(engine.embed, ids, token_types))
            speeds[f"batch {batch}, {length} tokens"] = batch / seconds
    return speeds


def make_pairs(corpus: str, output: str) -> dict[str, float]:
    """Return documents/s of scripts/make_pairs.py as a whole, on all cores."""
    command = [sys.executable, f"{ROOT}/scripts/make_pairs.py", "--quiet", "--corpus_file", corpus, "--output_file",
               output]
    seconds = side.seconds_of(partial(subprocess.run, command, check=True))
    return {"pairs of documents": count_lines(corpus) / seconds}


def split_words_alone(corpus: str) -> dict[str, float]:
    """Return documents/s of jieba alone, in as many processes as make_pairs.py has.

    Unlike those of make_pairs.py, the seconds are without starting Python and reading jieba's dictionary.
    """
    import jieba

    jieba.initialize()
    with open(corpus, encoding="utf-8") as file, multiprocessing.Pool(CPU_CORES) as pool:
        texts = file.readlines()
        seconds = side.seconds_of(partial(pool.map, count_words, texts, chunksize=256))
    return {"pairs of documents": len(texts) / seconds}


def count_words(text: str) -> int:
    import jieba

    return len(jieba.lcut(text))


def count_lines(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file)


def train_table(encoder: str, texts: list[str], sparse: bool) -> Iterator[dict[str, float]]:
    """Yield pairs/s of training with --pooling first_avg, a step at a time: a clause of each text, and the text.

    Args:
        encoder: where the encoder is.
        texts: of one batch.
        sparse: as the project does it, by a sparse product; False: by the embeddings of all tokens of padded texts.
    """
    import model
    from simcse.encoder.pretrained import load_pretrained
    from simcse.encoder.table import TokenTable
    from simcse.training.gradients import backward

    import paddle

    if not sparse:
        TokenTable.can_average = lambda table: False
    tokenizer = wordpiece.load_tokenizer(encoder)
    network = model.SimCSE(load_pretrained(encoder, 0.0, uses_pooler=False), 0.0, 256, "first_avg")
    network.train()
    optimizer = paddle.optimizer.Adam(1e-3, parameters=network.parameters())
    sides = [data.Inputs.of(tokenizer(side_texts, 512), 0) for side_texts in ([text[:20] for text in texts], texts)]

    def step() -> None:
        backward(network, network, data.Batch(*sides), lambda loss: loss)
        optimizer.step()
        optimizer.clear_grad()

    while True:
        yield {f"batch {len(texts)}, first_avg": len(texts) / side.seconds_of(step)}


def lines(path: str) -> dict[str, float]:
    """Return the seconds from a file of training texts to its first batch, and the peak memory in MB."""
    start = time.perf_counter()
    texts = textfile.TextFile(path, "--train_set_file")
    [texts[row] for row in next(data.ShuffledBatches(len(texts), 64).epoch(0))]
    return {"s": time.perf_counter() - start, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def clustered(count: int, seed: int, centres: int = 1000, spread: float = 0.5) -> np.ndarray:
    """Return unit vectors of 256 numbers around `centres` random ones, float32 [count, 256].

    The cosine within a cluster is about 1 / (1 + spread^2).
    """
    means = np.random.default_rng(0).standard_normal((centres, 256), "float32")
    random = np.random.default_rng(seed)
    vectors = means[random.integers(0, centres, count)] + spread * random.standard_normal((count, 256), "float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vectors(folder: str, count: int, checkpoint: str | None, texts: list[str], queries: list[str]) -> dict:
    """Write what `index` is measured with: vectors of `texts` and `queries`, or, without a checkpoint, `count`
    clustered ones; and what exact search finds."""
    from simcse.index.exact import exact_search

    if checkpoint:
        encoder = encoder_of(checkpoint)
        both = [encoder.encode(part) for part in (texts, queries)]
    else:
        both = [clustered(count, 1), clustered(500, 2)]
    exact, _ = exact_search(both[1], both[0], graphs.K)
    for name, array in zip(("vectors", "queries", "exact"), (*both, exact)):
        np.save(f"{folder}/{name}.npy", array)
    return {}


def index(folder: str, m: int, ef: int) -> dict[str, float]:
    """Measure this project's index, in as many shards as recall.py makes of so many vectors; see `graphs.measure`."""
    from simcse.index.manifest import Manifest
    from simcse.index.shards import ShardedIndex, choose_shard_count

    vectors, queries, exact = graphs.load(folder)
    index = ShardedIndex(Manifest(
        ann_engine="hnswlib", index_shards=choose_shard_count(len(vectors)), dimension=vectors.shape[1],
        rows=len(vectors), build_settings={"hnsw_m": m}, search_settings={"hnsw_ef": ef}), os.cpu_count())

    def search(queries: np.ndarray, effort: int) -> np.ndarray:
        index.set_search_settings({"hnsw_ef": effort})
        return index.search(queries, graphs.K).rows

    def fill() -> None:
        for rows in index.missing_rows:
            index.add(rows, vectors[rows])
        index.finish()

    def save(path: str) -> None:
        os.mkdir(path)
        index.save(path)

    return graphs.measure(fill, save, search, queries, exact)


def reading(count: int) -> dict[str, float]:
    """Measure, in seconds, how all vectors of a graph are read: by our engine, and by hnswlib's get_items."""
    from simcse.index.hnsw import HnswEngine

    vectors = clustered(count, 1)
    engine = HnswEngine(vectors.shape[1], count, {"hnsw_m": 4, "hnsw_ef": 4})  # a graph that is soon built
    engine.add(vectors)
    return {"ours": side.seconds_of(engine.all_vectors),
            "get_items": side.seconds_of(lambda: engine.vectors(np.arange(count)))}


def index_alone(folder: str, m: int, ef: int) -> dict[str, float]:
    """Measure hnswlib alone; see `graphs.measure`."""
    import hnswlib

    vectors, queries, exact = graphs.load(folder)
    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), ef_construction=ef, M=m)

    def search(queries: np.ndarray, effort: int) -> np.ndarray:
        index.set_ef(effort)
        return index.knn_query(queries, graphs.K)[0]

    return graphs.measure(lambda: index.add_items(vectors), index.save_index, search, queries, exact)


def index_milvus(folder: str, uri: str, index_type: str, m: int, ef: int) -> dict[str, float]:
    """Measure an index type of a Milvus server as recall.py uses it; see `graphs.measure`."""
    import dataclasses

    from simcse.index.documents import Documents
    from simcse.index.manifest import Manifest
    from simcse.index.milvus import MilvusIndex, manifest_for_corpus
    from simcse.index.milvus_collection import BOUNDED
    from simcse.index.milvus_update import compare_with_corpus
    from simcse.text.textfile import Corpus

    vectors, queries, exact = graphs.load(folder)
    path = f"{folder}/corpus"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{number:08}\n" for number in range(len(vectors)))
    documents = Documents(Corpus(path, "--corpus_file"))
    graph = {"M": m, "efConstruction": ef} if index_type == "HNSW" else {}
    manifest = manifest_for_corpus(Manifest(build_settings={"milvus_index": index_type, **graph}), None, is_lite=False)
    index = MilvusIndex(uri, index_type)
    sizes = {"dimension": vectors.shape[1], "rows": len(vectors), "lines": len(vectors), "documents": len(vectors)}
    update = compare_with_corpus(index, documents, dataclasses.replace(manifest, **sizes))
    update.start()

    def insert() -> None:
        for rows in update.missing_rows:
            update.add(rows, vectors[rows])
        update.wait_for_pieces()

    def search(queries: np.ndarray, effort: int) -> np.ndarray:
        settings = {"ef": effort, "nprobe": effort, "reorder_k": max(effort, 100)}
        index.set_search_settings({name: settings[name] for name in index.manifest.search_settings})
        return index.search(queries, graphs.K).rows

    built = {"inserting": side.seconds_of(insert), "indexing": side.seconds_of(update.finish)}
    index.collection.consistency = BOUNDED  # as in the service
    max_effort = index.manifest.build_settings.get("nlist", graphs.EFFORTS[-1])
    return built | graphs.measure_search(search, queries[:MILVUS_QUERIES], exact[:MILVUS_QUERIES], max_effort)


def insert_alone(folder: str, uri: str) -> dict[str, float]:
    """Measure how long pymilvus takes to insert the same rows, made beforehand, into the same fields."""
    from simcse.index.manifest import Manifest
    from simcse.index.milvus_collection import MAX_ROWS_PER_UPSERT, Collection

    vectors, _, _ = graphs.load(folder)
    collection = Collection(uri, "alone")
    collection.create(Manifest(dimension=vectors.shape[1], build_settings={"milvus_index": "FLAT"}))
    collection.load()
    rows = [{"id": number, "document": number, "text": f"{number:08}", "passage": "", "lines": 1, "ids": "",
             "embedding": vector} for number, vector in enumerate(vectors)]

    def insert() -> None:
        for start in range(0, len(rows), MAX_ROWS_PER_UPSERT):
            collection._client.insert("alone", rows[start : start + MAX_ROWS_PER_UPSERT])

    return {"inserting": side.seconds_of(insert)}


if __name__ == "__main__":
    side.serve(globals())
