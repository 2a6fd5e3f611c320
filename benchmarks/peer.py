"""Other libraries at the same tasks; run.py runs this file in the Python that --peer_python names."""

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import side


def encode(vocab: str, sizes: dict, cases: dict[str, list[str]], kind: str) -> Iterator[dict[str, float]]:
    """Yield texts/s of sentence-transformers on an encoder of the same dimensions, a pass after another.

    Args:
        kind: "torch" for bfloat16; "openvino" for its OpenVINO backend in int8, calibrated with the corpus as its
            documentation says.
    """
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig(**sizes)).save_pretrained(f"{folder}/encoder")
        BertTokenizerFast(vocab_file=vocab).save_pretrained(f"{folder}/encoder")
        dtype = {"model_args": {"torch_dtype": torch.bfloat16}} if kind == "torch" else {}
        encoder = models.Transformer(f"{folder}/encoder", max_seq_length=64, **dtype)
        fc = models.Dense(sizes["hidden_size"], 256, activation_function=torch.nn.Identity())
        pooling = models.Pooling(sizes["hidden_size"], pooling_mode="cls")
        model = SentenceTransformer(modules=[encoder, pooling, fc, models.Normalize()], device="cpu")
        if kind == "torch":
            fc.to(torch.bfloat16)
        else:
            model = openvino_int8(model, folder, cases["corpus"])
    while True:
        yield {name: len(texts) / side.seconds_of(partial(model.encode, texts, batch_size=32))
               for name, texts in cases.items()}


def openvino_int8(model, folder: str, texts: list[str]):
    """Return a SentenceTransformer in its OpenVINO backend, statically quantized with the texts."""
    from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

    os.mkdir(f"{folder}/texts")
    with open(f"{folder}/texts/train.txt", "w", encoding="utf-8") as file:
        file.writelines(text + "\n" for text in texts)
    model.save_pretrained(f"{folder}/model")
    model = SentenceTransformer(f"{folder}/model", backend="openvino", device="cpu")
    model.save_pretrained(f"{folder}/openvino")
    export_static_quantized_openvino_model(
        model, None, f"{folder}/openvino", dataset_name=f"{folder}/texts", dataset_config_name="default",
        dataset_split="train", column_name="text")
    return SentenceTransformer(f"{folder}/openvino", backend="openvino", device="cpu",
                               model_kwargs={"file_name": "openvino_model_qint8_quantized.xml"})


def train(vocab: str, sizes: dict, texts: list[str], batch: int, length: int,
          bf16: bool) -> Iterator[dict[str, float]]:
    """Yield samples/s of SimCSE in torch, ten steps a pass.

    A step encodes a batch twice under dropout 0.1, padded to its longest text; the optimizer is AdamW.

    Args:
        bf16: compute in bfloat16 where autocast does so, else in float32.
    """
    import torch
    import torch.nn.functional as F
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.set_num_threads(os.cpu_count())
    encoder = BertModel(BertConfig(**sizes))
    tokenizer = BertTokenizerFast(vocab_file=vocab)
    fc = torch.nn.Linear(sizes["hidden_size"], 256)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *fc.parameters()], lr=5e-5, weight_decay=0.0)

    def embed(inputs):
        return F.normalize(F.dropout(fc(encoder(**inputs).pooler_output).float(), 0.1), dim=-1)

    encoder.train()
    while True:
        start = time.perf_counter()
        for first in range(0, 10 * batch, batch):
            inputs = tokenizer(texts[first : first + batch], max_length=length, truncation=True, padding=True,
                               return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                query = embed(inputs)
                title = embed(inputs)
            F.cross_entropy(20 * query @ title.T, torch.arange(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield {f"batch {batch}, {length} tokens": 10 * batch / (time.perf_counter() - start)}


def index_usearch(folder: str, m: int, ef: int) -> dict[str, float]:
    """Measure usearch in float32, with M and ef_construction of the other sides; see `graphs.measure`."""
    import graphs
    from usearch.index import Index

    vectors, queries, exact = graphs.load(folder)
    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=m, expansion_add=ef)

    def search(queries, effort: int):
        index.expansion_search = effort
        return index.search(queries, graphs.K).keys

    return graphs.measure(lambda: index.add(None, vectors), index.save, search, queries, exact)


def index_faiss(folder: str, m: int, ef: int, kind: str) -> dict[str, float]:
    """Measure faiss; see `graphs.measure`.

    Args:
        kind: "HNSW" with M and ef_construction of the other sides, or "IVF" with 4 sqrt(N) lists.
    """
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

    return graphs.measure(build, lambda path: faiss.write_index(index, path), search, queries, exact)


if __name__ == "__main__":
    side.serve(globals())
