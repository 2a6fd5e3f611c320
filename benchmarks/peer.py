"""What other libraries make of the same task; run by run.py in the Python that --peer_python names."""

import json
import sys
import tempfile
import time


def encode(vocab: str, sizes: dict, cases: dict[str, list[str]], threads: int) -> dict[str, float]:
    """Texts/s of sentence-transformers with torch bfloat16 on an encoder of the same dimensions, the second of two
    passes over each case."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig(**sizes)).save_pretrained(folder)
        BertTokenizerFast(vocab_file=vocab).save_pretrained(folder)
        encoder = models.Transformer(folder, max_seq_length=64, model_args={"torch_dtype": torch.bfloat16})
    fc = models.Dense(sizes["hidden_size"], 256, activation_function=torch.nn.Identity()).to(torch.bfloat16)
    pooling = models.Pooling(sizes["hidden_size"], pooling_mode="cls")
    model = SentenceTransformer(modules=[encoder, pooling, fc, models.Normalize()], device="cpu")
    speeds = {}
    for name, texts in cases.items():
        for _ in range(2):
            start = time.perf_counter()
            model.encode(texts, batch_size=32)
            speeds[name] = len(texts) / (time.perf_counter() - start)
    return speeds


def index_usearch(folder: str, m: int, ef: int) -> dict[str, float]:
    """See `graphs.figures`; float32, with M and ef_construction of the other sides."""
    import graphs
    from usearch.index import Index

    vectors, queries, exact = graphs.load(folder)
    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=m, expansion_add=ef)

    def search(queries, effort: int):
        index.expansion_search = effort
        return index.search(queries, graphs.K).keys

    return graphs.figures(lambda: index.add(None, vectors), index.save, search, queries, exact)


def index_faiss(folder: str, m: int, ef: int, kind: str) -> dict[str, float]:
    """See `graphs.figures`; "HNSW" with M and ef_construction of the other sides, or "IVF" with 4 sqrt(N) lists."""
    import faiss
    import graphs

    vectors, queries, exact = graphs.load(folder)
    if kind == "HNSW":
        index = faiss.IndexHNSWFlat(vectors.shape[1], m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = ef
    else:
        index = faiss.index_factory(vectors.shape[1], f"IVF{round(4 * len(vectors) ** 0.5)},Flat",
                                    faiss.METRIC_INNER_PRODUCT)

    def build() -> None:
        index.train(vectors)
        index.add(vectors)

    def search(queries, effort: int):
        if kind == "HNSW":
            index.hnsw.efSearch = effort
        else:
            index.nprobe = effort
        return index.search(queries, graphs.K)[1]

    return graphs.figures(build, lambda path: faiss.write_index(index, path), search, queries, exact)


if __name__ == "__main__":
    print("RESULT " + json.dumps(globals()[sys.argv[1]](**json.load(sys.stdin))))
