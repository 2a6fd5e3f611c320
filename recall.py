"""Recall the most similar documents of a corpus for every query.

    python recall.py --device cpu --params_path checkpoints/model_900 --corpus_file recall/corpus.csv \\
        --similar_text_pair recall/dev.csv --recall_num 50
    # the corpus shared out among 4 GPUs
    python -u -m paddle.distributed.launch --gpus 0,1,2,3 recall.py --params_path ... --corpus_file ... (as above)
    # keep the index, then ask it
    python recall.py ... --index_path my_index
    python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query 语义检索 --top_k 10
    head queries.txt | python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query
    # fuse the ranking with that of words
    python recall.py ... --hybrid_bm25

Encodes the corpus, builds an index while it does, and writes `query \\t document \\t cosine`, `recall_num` lines a
query, best first, to <recall_result_dir>/<recall_result_file>; answers to --query go to stdout, those to queries of
stdin as they come. With --hybrid_bm25 the score that the ranking goes by stands where the cosine does.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import ann_util
import data
from simcse import console, flags
from simcse.files import STDIN, arriving, file_digest, new_file
from simcse.machine import RANK, RANKS
from simcse.weights import model_digest

HNSW_M, HNSW_EF, SHARDS = 32, 100, 8
FUSED = 100  # documents that a ranking brings to the fusion, or --recall_num, if that is more
MILVUS_URI = "./recall.db"
SAMPLE = 100  # queries whose neighbours are searched exactly as well, to measure the index


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("files")
    group.add_argument("--corpus_file", type=flags.readable_file, default=None,
                       help="documents to search, one a line; may be left out with --query, where there is an index")
    group.add_argument("--similar_text_pair", "--similar_text_pair_file", type=flags.readable_file, default=None,
                       help="query and target, tab-separated, a pair a line; only the queries are used")
    group.add_argument("--query", action="append", nargs="?", const=STDIN, metavar="TEXT",
                       type=flags.nonempty_text, default=[],
                       help="a query, instead of --similar_text_pair; may be given several times. Without TEXT, or "
                       "-: queries of stdin, one a line, answered as they come")
    group.add_argument("--recall_result_dir", default="recall_result_dir", help="folder of the result, made if need be")
    group.add_argument("--recall_result_file", default="recall_result.txt", help="name of the result in that folder")
    flags.add_format_argument(group, "of the result. tsv: query, document, cosine, a line a document, which is what "
                            'evaluate.py reads; jsonl: {"query", "results": [{"rank", "document", "cosine"}]}, a line '
                            'a query; with --hybrid_bm25 the fused score instead of the cosine, in jsonl as "score"',
                            default="tsv")
    group = parser.add_argument_group("model")
    flags.add_model_arguments(group)
    flags.add_encode_arguments(group)
    group = parser.add_argument_group("index")
    group.add_argument("--recall_num", "--top_k", type=flags.positive_int, default=10,
                       help="documents recalled for each query")
    group.add_argument("--ann_engine", choices=("hnswlib", "exact", "milvus"), default="hnswlib",
                       help="hnswlib: an approximate graph; exact: a matrix product, for up to some 100,000 documents; "
                       "milvus: a collection of Milvus (requirements-milvus.txt)")
    group.add_argument("--index_path", default=None,
                       help="folder of the index: used where there is one, which has to be of the same corpus, model "
                       "and settings; otherwise the index is built and kept there")
    group.add_argument("--index_shards", type=flags.positive_int, default=None,
                       help="parts of the index, at least as many as processes; results depend on it, and not on the "
                       f"number of processes; None: {SHARDS}")
    group.add_argument("--hnsw_m", type=flags.hnsw_links, default=None,
                       help=f"links a node of the graph; None: {HNSW_M}")
    group.add_argument("--hnsw_ef", type=flags.positive_int, default=None,
                       help="candidates kept while building the graph; a search keeps as many, and at least twice "
                       f"--recall_num, of each shard; None: {HNSW_EF}")
    group.add_argument("--hnsw_max_elements", type=flags.positive_int, default=None,
                       help="documents the graph can hold; None: as many as the corpus has")
    group.add_argument("--hybrid_bm25", action="store_true",
                       help=f"fuse the ranking with that of BM25 over words, {FUSED} documents of each, or "
                       "--recall_num if that is more; the result has the fused score instead of the cosine: the cosine "
                       "plus BM25's score divided by the query's highest")
    group = parser.add_argument_group("milvus")
    group.add_argument("--milvus_uri", type=flags.milvus_uri, default=None,
                       help="http://host:port of a server, its token in the environment as MILVUS_TOKEN; or a path "
                       f"ending in .db: Milvus Lite, without a server; None: {MILVUS_URI}")
    group.add_argument("--milvus_collection", type=flags.nonempty_text, default=None,
                       help="collection, made where there is none, gone on with where it is not full; None: "
                       f"{flags.COLLECTION}")
    args = flags.check_encode_arguments(parser, parser.parse_args())
    check_engine(parser, args)
    check_files(parser, args)
    return args


def check_engine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of another engine."""
    milvus = [flag for flag in ("milvus_uri", "milvus_collection") if getattr(args, flag)]
    if args.ann_engine != "milvus":
        if milvus:
            parser.error(f"--{milvus[0]} needs --ann_engine milvus")
        if args.ann_engine == "exact" and (args.hnsw_m or args.hnsw_ef or args.hnsw_max_elements):
            parser.error("--hnsw_m, --hnsw_ef and --hnsw_max_elements need --ann_engine hnswlib")
        return
    if args.index_path or args.index_shards or args.hnsw_max_elements:
        parser.error("--index_path, --index_shards and --hnsw_max_elements are not for --ann_engine milvus")
    args.milvus_uri = args.milvus_uri or MILVUS_URI
    if not args.milvus_uri.startswith("http") and (args.hnsw_m or args.hnsw_ef):
        parser.error("--hnsw_m and --hnsw_ef are not for Milvus Lite, which searches exactly")
    if args.hybrid_bm25 and not args.corpus_file:
        parser.error("--hybrid_bm25 with --ann_engine milvus needs --corpus_file")


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that say too little, or two things, about queries and documents."""
    if bool(args.query) == bool(args.similar_text_pair):
        parser.error("one of --similar_text_pair and --query is needed" + (", not both" if args.query else ""))
    if STDIN in args.query and len(args.query) > 1:
        parser.error("--query TEXT and queries of stdin: one of them, please")
    if STDIN in args.query and RANKS > 1:
        parser.error("--query of stdin is for one process")
    if not args.corpus_file and not args.query:
        parser.error("the following arguments are required: --corpus_file")
    if args.corpus_file or args.ann_engine == "milvus":
        return
    if not args.index_path:
        parser.error("--query needs --index_path, or --corpus_file, or --ann_engine milvus")
    if not os.path.isdir(args.index_path):
        parser.error(f"argument --index_path: {args.index_path}: no such folder; --corpus_file is needed to build it")


def settings(args: argparse.Namespace, documents: int, engine) -> dict[str, str | int]:
    """What an index depends on beside corpus and model."""
    common = {"max_seq_length": args.max_seq_length, "precision": engine.precision, "ann_engine": args.ann_engine,
              "hnsw_m": args.hnsw_m or HNSW_M, "hnsw_ef": args.hnsw_ef or HNSW_EF}
    if args.ann_engine == "milvus":
        return {**common, "documents": documents, "dim": engine.embedding_size, "metric": "COSINE",
                "index_type": "HNSW" if args.milvus_uri.startswith("http") else "FLAT"}
    return {**common, "index_shards": args.index_shards or SHARDS,
            "hnsw_max_elements": args.hnsw_max_elements or documents}


def open_index(args: argparse.Namespace, corpus: data.TextFile | None, engine, tokenizer) -> tuple:
    """The index, kept or built, and the documents in it."""
    from simcse.ranks import join_ranks

    rank, ranks = join_ranks()
    fingerprint = {"max_seq_length": args.max_seq_length, "precision": engine.precision}
    if corpus is not None:  # else what is not said is as in the index; what texts become is not left open
        fingerprint = settings(args, len(corpus), engine)
    if args.index_path or args.ann_engine == "milvus":
        fingerprint["model"] = model_digest(args.params_path, args.model_name_or_path)
        fingerprint.update({} if corpus is None else {"corpus": file_digest(corpus.path)})
    if args.ann_engine == "milvus":
        return open_collection(args, corpus, engine, tokenizer, fingerprint, rank, ranks)
    kept = args.index_path and os.path.exists(args.index_path)
    if kept:
        fingerprint = ann_util.read_fingerprint(args.index_path, fingerprint)
        corpus = corpus or ann_util.read_kept_corpus(args.index_path, fingerprint["corpus"])
    index = ann_util.new_index(fingerprint, len(corpus), engine.embedding_size, args.cpu_threads, rank, ranks)
    if kept:
        ann_util.load_index(args.index_path, index, fingerprint)
        return index, corpus
    fill(args, index, index.add, corpus, engine, tokenizer)
    if args.index_path:
        ann_util.save_index(args.index_path, index, fingerprint, corpus)
    return index, corpus


def open_collection(args: argparse.Namespace, corpus: data.TextFile | None, engine, tokenizer, fingerprint: dict,
                    rank: int, ranks: int) -> tuple:
    """The collection of Milvus, filled where it lacks documents, and the documents in it."""
    from simcse.milvus import MilvusIndex
    from simcse.ranks import wait_for_ranks

    collection = args.milvus_collection or flags.COLLECTION
    index = MilvusIndex(args.milvus_uri, collection, fingerprint, rank, ranks, wait_for_ranks)
    if index.pieces and corpus is None:
        raise console.InputError(f"--milvus_collection {index.collection}: not all documents are in it yet; run again "
                                 "with --corpus_file")
    if index.pieces:
        fill(args, index, lambda rows, embeddings: index.add(rows, embeddings, corpus[rows.start : rows.stop]), corpus,
             engine, tokenizer)
    else:
        console.log(f"using the collection {index.collection} in {args.milvus_uri}")
    wait_for_ranks()
    return index, index.texts if corpus is None else corpus


def fill(args: argparse.Namespace, index, add, corpus: data.TextFile, engine, tokenizer) -> None:
    """Encode this rank's documents that the index lacks, and add them while the next ones are encoded."""
    from model import encode_stream

    count = sum(map(len, index.pieces))
    console.log(f"encoding and indexing {count} of {len(corpus)} documents in {engine.precision}")
    started = time.time()
    blocks = encode_stream(engine, tokenizer, corpus, args.max_seq_length, args.batch_size, index.pieces)
    for rows, embeddings in zip(index.pieces, blocks):
        add(rows, embeddings)
    index.finish()
    console.log(f"{count / (time.time() - started):.1f} documents/s")


def best_of_ranks(found: tuple, k: int) -> tuple:
    """The k best of what every rank found."""
    from simcse.ranks import gather_arrays

    return ann_util.merge(list(zip(*map(gather_arrays, ann_util.fill_up(found, k)))), k)


def report_ann_recall(index, queries, cosines) -> None:
    """Say what the approximation costs: a sample of the queries is searched exactly too."""
    sample, k = slice(None, None, -(-len(queries) // SAMPLE)), cosines.shape[1]
    _, exact = best_of_ranks(index.search(queries[sample], k, exact=True), k)
    if not RANK:
        console.log(f"ANN recall@{k} against exact search, {len(exact)} queries: "
                    f"{ann_util.ann_recall(cosines[sample], exact):.4f} (--hnsw_m and --hnsw_ef raise it)")


def search(args: argparse.Namespace, blocks: Iterable[list[str]], index, k: int, encode) -> Iterator[tuple]:
    """Yield each block of queries, the different ones of them, and the k best rows and cosines of each. Every rank
    takes part; all get the same."""
    sampled = bool(args.query)
    for block in blocks:
        asked = data.distinct(block)  # a query on several lines is encoded and searched once
        embeddings = encode(asked)
        rows, cosines = best_of_ranks(index.search(embeddings, k), k)
        if args.ann_engine == "hnswlib" and not sampled:
            report_ann_recall(index, embeddings, cosines)
        sampled = True
        yield block, asked, (rows, cosines)


def answers(args: argparse.Namespace, block: list[str], asked: list[str], found: tuple,
            corpus: Sequence[str]) -> Iterator[str]:
    """The result's lines for a block of queries, of whose different ones, `asked`, this was found."""
    measure = "score" if args.hybrid_bm25 else "cosine"
    ranking = {query: (rows.tolist(), scores.tolist()) for query, rows, scores in zip(asked, *found)}
    for query in block:
        rows, scores = (side[: args.recall_num] for side in ranking[query])
        yield console.recall_lines(args.format, query, [corpus[row] for row in rows], scores, measure)


def result_path(args: argparse.Namespace) -> str:
    return os.path.join(args.recall_result_dir, args.recall_result_file)


@contextlib.contextmanager
def result_file(args: argparse.Namespace) -> Iterator[IO]:
    """Where the result goes: stdout for --query, else the result file; what other ranks than 0 write is kept nowhere.
    """
    if RANK:
        with open(os.devnull, "w", encoding="utf-8") as file:
            yield file
    elif args.query:
        yield sys.stdout
    else:
        with new_file(result_path(args)) as file:
            yield file
        console.log(f"wrote {result_path(args)}")


def write_results(args: argparse.Namespace, blocks: Iterable[list[str]], index, corpus: Sequence[str], encode) -> None:
    """Search the queries, block by block, and write what was asked for; rank 0 alone fuses and writes."""
    bm25 = None
    if args.hybrid_bm25 and not RANK:
        from simcse.bm25 import Bm25, fuse

        bm25 = Bm25(corpus, args.index_path and os.path.join(args.index_path, "bm25"))
    depth = max(args.recall_num, FUSED) if args.hybrid_bm25 else args.recall_num
    with result_file(args) as file:
        for block, asked, found in search(args, blocks, index, min(depth, len(corpus)), encode):
            if bm25:
                found = fuse(found, bm25.search(asked, depth), min(args.recall_num, len(corpus)))
            file.writelines(answers(args, block, asked, found, corpus))
            file.flush()


def main() -> None:
    args = parse_args()
    corpus = data.TextFile(args.corpus_file, "--corpus_file", args.strict_data) if args.corpus_file else None
    streams = args.query == [STDIN]
    queries = args.query or [query for query, _ in data.read_text_pairs(
        args.similar_text_pair, "--similar_text_pair", args.strict_data)]
    if corpus and (args.hnsw_max_elements or len(corpus)) < len(corpus):
        raise console.InputError(f"--hnsw_max_elements {args.hnsw_max_elements}: the corpus has {len(corpus)} "
                                 "documents")
    if not args.query:
        os.makedirs(os.path.dirname(result_path(args)) or ".", exist_ok=True)
    if args.hybrid_bm25:
        import simcse.bm25  # noqa: F401  a missing package is told before anything takes time
    flags.announce(args, args.params_path, f"{flags.count(corpus, 'document')} for {args.ann_engine}" if corpus else
                 f"index {args.index_path or args.milvus_uri}",
                 "queries of stdin" if streams else f"{len(queries):,} queries")

    from model import encode, load_engine

    engine, tokenizer = load_engine(args)
    index, corpus = open_index(args, corpus, engine, tokenizer)
    if args.recall_num > len(corpus):
        console.warn(f"--recall_num {args.recall_num}: the corpus has only {len(corpus)} documents")
    blocks = (queries[start : start + data.WINDOW] for start in range(0, len(queries), data.WINDOW))
    if streams:
        blocks = arriving(query for (query,) in data.read_rows(STDIN, 1, "--query", args.strict_data))
    write_results(args, blocks, index, corpus,
                  lambda texts: encode(engine, tokenizer, texts, args.max_seq_length, args.batch_size))
    index.close()


if __name__ == "__main__":
    console.run(main)
