"""Recall the most similar documents of a corpus for every query.

    python recall.py --device cpu --params_path checkpoints/model_900 --corpus_file recall/corpus.csv \\
        --similar_text_pair recall/dev.csv --recall_num 50

Encodes the corpus, builds an index while it does, and writes `query \\t document \\t cosine`, `recall_num` lines a
query, best first, to <recall_result_dir>/<recall_result_file>. With --index_path the index is kept and used again.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import data

HNSW_M, HNSW_EF = 32, 100
SAMPLE = 100  # queries whose neighbours are searched exactly as well, to measure the index


def parse_args() -> argparse.Namespace:
    parser = data.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("files")
    group.add_argument("--corpus_file", type=data.readable_file, required=True, help="documents to search, one a line")
    group.add_argument("--similar_text_pair", "--similar_text_pair_file", type=data.readable_file, required=True,
                       help="query and target, tab-separated, a pair a line; only the queries are used")
    group.add_argument("--recall_result_dir", default="recall_result_dir", help="folder of the result, made if need be")
    group.add_argument("--recall_result_file", default="recall_result.txt", help="name of the result in that folder")
    group = parser.add_argument_group("model")
    data.add_model_arguments(group)
    data.add_encode_arguments(group)
    group = parser.add_argument_group("index")
    group.add_argument("--recall_num", type=data.positive_int, default=10, help="documents recalled for each query")
    group.add_argument("--ann_engine", choices=("hnswlib", "exact"), default="hnswlib",
                       help="hnswlib: an approximate graph; exact: a matrix product, for up to some 100,000 documents")
    group.add_argument("--index_path", default=None,
                       help="folder of the index: used where there is one, which has to be of the same corpus, model "
                       "and settings; otherwise the index is built and kept there")
    group.add_argument("--hnsw_m", type=data.hnsw_links, default=None,
                       help=f"links a node of the graph; None: {HNSW_M}")
    group.add_argument("--hnsw_ef", type=data.positive_int, default=None,
                       help="candidates kept while building the graph; a search keeps as many, and at least 4 times "
                       f"--recall_num; None: {HNSW_EF}")
    group.add_argument("--hnsw_max_elements", type=data.positive_int, default=None,
                       help="documents the graph can hold; None: as many as the corpus has")
    args = data.check_encode_arguments(parser, parser.parse_args())
    if args.ann_engine == "exact" and (args.hnsw_m or args.hnsw_ef or args.hnsw_max_elements):
        parser.error("--hnsw_m, --hnsw_ef and --hnsw_max_elements need --ann_engine hnswlib")
    return args


def new_index(args: argparse.Namespace, documents: int, dim: int):
    """An empty index for so many embeddings of `dim`."""
    from ann_util import ExactIndex, HnswIndex

    if args.ann_engine == "exact":
        return ExactIndex()
    return HnswIndex(dim, args.hnsw_max_elements or documents, args.hnsw_m or HNSW_M, args.hnsw_ef or HNSW_EF,
                     args.cpu_threads)


def fill(index, embeddings: Iterable) -> None:
    """Add blocks of embeddings to the index, one while the next is encoded."""
    with ThreadPoolExecutor(1) as worker:
        adding = None
        for block in embeddings:
            if adding:
                adding.result()
            adding = worker.submit(index.add, block)
        adding.result()


def fingerprint(args: argparse.Namespace, corpus: list[str], precision: str) -> dict[str, str | int]:
    """What an index depends on: corpus and model as SHA-256, and the settings."""
    texts, model = hashlib.sha256(), hashlib.sha256((args.model_name_or_path or "").encode())
    for text in corpus:
        texts.update(text.encode() + b"\n")
    beside = (os.path.join(os.path.dirname(args.params_path), name) for name in ("simcse_config.json", "vocab.txt"))
    for path in [args.params_path, *filter(os.path.isfile, beside)]:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                model.update(block)
    return {"corpus": texts.hexdigest(), "model": model.hexdigest(), "max_seq_length": args.max_seq_length,
            "precision": precision, "ann_engine": args.ann_engine, "hnsw_m": args.hnsw_m or HNSW_M,
            "hnsw_ef": args.hnsw_ef or HNSW_EF, "hnsw_max_elements": args.hnsw_max_elements or len(corpus)}


def load_index(path: str, index, wanted: dict) -> None:
    """Fill `index` from the folder `path`.

    Raises:
        InputError: it was built for something else, or is damaged.
    """
    try:
        with open(os.path.join(path, "fingerprint.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        raise data.InputError(f"--index_path {path}: exists, but is not an index that recall.py wrote") from None
    if other := [name for name in wanted if found.get(name) != wanted[name]]:
        raise data.InputError(f"--index_path {path}: was built with another {', '.join(other)}; name another folder, "
                              "or remove this one to build it again")
    try:
        index.load(os.path.join(path, "index.bin"))
    except (OSError, RuntimeError, ValueError) as error:
        raise data.InputError(f"--index_path {path}: damaged: {data.first_line(error)}") from None


def save_index(path: str, index, made_of: dict) -> None:
    from model import new_folder

    with new_folder(path) as folder:
        index.save(os.path.join(folder, "index.bin"))
        with open(os.path.join(folder, "fingerprint.json"), "w", encoding="utf-8") as file:
            json.dump(made_of, file, indent=2)
    data.log(f"kept the index in {path}")


def report_ann_recall(index, queries, cosines) -> None:
    """Say what the approximation costs: a sample of the queries is searched exactly too."""
    from ann_util import ann_recall, exact_search

    sample = slice(None, None, -(-len(queries) // SAMPLE))
    _, exact = exact_search(queries[sample], index.blocks(), cosines.shape[1])
    data.log(f"ANN recall@{cosines.shape[1]} against exact search, {len(exact)} queries: "
             f"{ann_recall(cosines[sample], exact):.4f} (--hnsw_m and --hnsw_ef raise it)")


def main() -> None:
    args = parse_args()
    corpus = data.read_texts(args.corpus_file, "--corpus_file", args.strict_data)
    queries = [query for query, _ in data.read_text_pairs(args.similar_text_pair, "--similar_text_pair",
                                                          args.strict_data)]
    if (args.hnsw_max_elements or len(corpus)) < len(corpus):
        raise data.InputError(f"--hnsw_max_elements {args.hnsw_max_elements}: the corpus has {len(corpus)} documents")
    result_path = os.path.join(args.recall_result_dir, args.recall_result_file)
    os.makedirs(os.path.dirname(result_path) or ".", exist_ok=True)

    from deploy.python.predictor import load_engine
    from model import encode, encode_stream, is_first_rank

    if not is_first_rank():
        data.log("recall.py encodes on one process; this one has nothing to do")
        return
    engine, tokenizer = load_engine(args)
    index = new_index(args, len(corpus), engine.embedding_size)
    made_of = fingerprint(args, corpus, engine.precision) if args.index_path else {}
    if args.index_path and os.path.exists(args.index_path):
        load_index(args.index_path, index, made_of)
        data.log(f"using the index in {args.index_path}")
    else:
        data.log(f"encoding and indexing {len(corpus)} documents in {engine.precision}")
        started = time.time()
        fill(index, encode_stream(engine, tokenizer, corpus, args.max_seq_length, args.batch_size))
        data.log(f"{len(corpus) / (time.time() - started):.1f} documents/s")
        if args.index_path:
            save_index(args.index_path, index, made_of)

    asked = data.distinct(queries)  # a query on several lines is encoded and searched once
    embeddings = encode(engine, tokenizer, asked, args.max_seq_length, args.batch_size)
    rows, cosines = index.search(embeddings, args.recall_num)
    if args.ann_engine != "exact":
        report_ann_recall(index, embeddings, cosines)
    if args.recall_num > len(corpus):
        data.log(f"--recall_num {args.recall_num}: the corpus has only {len(corpus)} documents")

    found = {query: (row.tolist(), cosine.tolist()) for query, row, cosine in zip(asked, rows, cosines)}
    with data.new_file(result_path) as file:
        for query in queries:
            file.writelines(f"{query}\t{corpus[row]}\t{cosine}\n" for row, cosine in zip(*found[query]))
    data.log(f"wrote {len(queries)} queries x {rows.shape[1]} documents to {result_path}")


if __name__ == "__main__":
    data.run(main)
