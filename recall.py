"""Recall the most similar documents of a corpus for every query.

    python recall.py --device cpu --params_path checkpoints/model_900 --corpus_file recall/corpus.csv \\
        --similar_text_pair recall/dev.csv --recall_num 50
    # the corpus shared out among 4 GPUs
    python -u -m paddle.distributed.launch --gpus 0,1,2,3 recall.py --params_path ... --corpus_file ... (as above)
    # keep the index, then ask it
    python recall.py ... --index_path my_index
    python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query 语义检索 --top_k 10
    head queries.txt | python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query
    # fuse the ranking with that of words; mine negatives to train on
    python recall.py ... --hybrid_bm25 --fusion score
    python recall.py ... --mine_negatives train_triples.csv

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

import cli
import console
import data
import index_store
import mining
import results
from machine import RANK, RANKS

HNSW_M, HNSW_EF, SHARDS = 32, 100, 8
BM25_WEIGHT, FUSED = 1.0, 100  # FUSED: documents that a ranking brings to the fusion, or --recall_num, if that is more
MILVUS_URI = "./recall.db"
SAMPLE = 100  # queries whose neighbours are searched exactly as well, to measure the index


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("files")
    group.add_argument("--corpus_file", type=cli.readable_file, default=None,
                       help="documents to search, one a line; may be left out with --query, where there is an index")
    group.add_argument("--similar_text_pair", "--similar_text_pair_file", type=cli.readable_file, default=None,
                       help="query and target, tab-separated, a pair a line; only the queries are used")
    group.add_argument("--query", action="append", nargs="?", const=data.STDIN, metavar="TEXT",
                       type=cli.nonempty_text, default=[],
                       help="a query, instead of --similar_text_pair; may be given several times. Without TEXT, or "
                       "-: queries of stdin, one a line, answered as they come")
    group.add_argument("--recall_result_dir", default="recall_result_dir", help="folder of the result, made if need be")
    group.add_argument("--recall_result_file", default="recall_result.txt", help="name of the result in that folder")
    cli.add_format_argument(group, "of the result. tsv: query, document, cosine, a line a document, which is what "
                            'evaluate.py reads; jsonl: {"query", "results": [{"rank", "document", "cosine"}]}, a line '
                            'a query; with --hybrid_bm25 the fused score instead of the cosine, in jsonl as "score"',
                            default="tsv")
    group = parser.add_argument_group("model")
    cli.add_model_arguments(group)
    cli.add_encode_arguments(group)
    group = parser.add_argument_group("index")
    group.add_argument("--recall_num", "--top_k", type=cli.positive_int, default=10,
                       help="documents recalled for each query")
    group.add_argument("--ann_engine", choices=("hnswlib", "exact", "milvus"), default="hnswlib",
                       help="hnswlib: an approximate graph; exact: a matrix product, for up to some 100,000 documents; "
                       "milvus: a collection of Milvus (requirements-milvus.txt)")
    group.add_argument("--index_path", default=None,
                       help="folder of the index: used where there is one, which has to be of the same corpus, model "
                       "and settings; otherwise the index is built and kept there")
    group.add_argument("--index_shards", type=cli.positive_int, default=None,
                       help="parts of the index, at least as many as processes; results depend on it, and not on the "
                       f"number of processes; None: {SHARDS}")
    group.add_argument("--hnsw_m", type=cli.hnsw_links, default=None,
                       help=f"links a node of the graph; None: {HNSW_M}")
    group.add_argument("--hnsw_ef", type=cli.positive_int, default=None,
                       help="candidates kept while building the graph; a search keeps as many, and at least twice "
                       f"--recall_num, of each shard; None: {HNSW_EF}")
    group.add_argument("--hnsw_max_elements", type=cli.positive_int, default=None,
                       help="documents the graph can hold; None: as many as the corpus has")
    group.add_argument("--vector_type", choices=data.VECTOR_TYPES, default="float32",
                       help="number format of the vectors of --ann_engine exact; int8: a quarter of the memory, and "
                       "cosines off by less than 0.01")
    add_fusion_arguments(parser.add_argument_group("fusion with BM25"))
    mining.add_arguments(parser.add_argument_group("hard negatives"))
    group = parser.add_argument_group("milvus")
    group.add_argument("--milvus_uri", type=cli.milvus_uri, default=None,
                       help="http://host:port of a server, its token in the environment as MILVUS_TOKEN; or a path "
                       f"ending in .db: Milvus Lite, without a server; None: {MILVUS_URI}")
    group.add_argument("--milvus_collection", type=cli.nonempty_text, default=None,
                       help="collection, made where there is none, gone on with where it is not full; None: "
                       f"{cli.COLLECTION}")
    group.add_argument("--milvus_index_type", choices=("FLAT", "IVF_FLAT", "HNSW"), default=None,
                       help="index; HNSW takes --hnsw_m and --hnsw_ef; None: FLAT in a file, HNSW on a server")
    group.add_argument("--milvus_metric", choices=("COSINE", "IP", "L2"), default=None,
                       help="metric of the index; what is written are cosines in any case; None: COSINE")
    args = cli.check_encode_arguments(parser, parser.parse_args())
    check_engine(parser, args)
    check_files(parser, args)
    check_fusion(parser, args)
    mining.check_arguments(parser, args, result_path(args))
    return args


def add_fusion_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hybrid_bm25", action="store_true",
                       help=f"fuse the ranking with that of BM25 over words, {FUSED} documents of each, or "
                       "--recall_num if that is more; the result has the fused score instead of the cosine")
    group.add_argument("--fusion", choices=("rrf", "score"), default=None,
                       help="rrf: by reciprocal rank (Cormack et al. 2009), 1 / (60 + rank) of the one plus weight / "
                       "(60 + rank) of the other; score: the cosine plus weight times BM25's score divided by the "
                       "query's highest; None: rrf")
    group.add_argument("--bm25_weight", type=cli.positive_float, default=None,
                       help=f"weight of BM25's ranking, that of the embeddings being 1; None: {BM25_WEIGHT}")


def check_engine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of another engine; make up the defaults of Milvus."""
    if args.vector_type != "float32" and args.ann_engine != "exact":
        parser.error(f"--vector_type {args.vector_type} needs --ann_engine exact")
    milvus = [flag for flag in ("milvus_uri", "milvus_collection", "milvus_index_type", "milvus_metric")
              if getattr(args, flag)]
    if args.ann_engine != "milvus":
        if milvus:
            parser.error(f"--{milvus[0]} needs --ann_engine milvus")
        if args.ann_engine == "exact" and (args.hnsw_m or args.hnsw_ef or args.hnsw_max_elements):
            parser.error("--hnsw_m, --hnsw_ef and --hnsw_max_elements need --ann_engine hnswlib")
        return
    if args.index_path or args.index_shards or args.hnsw_max_elements:
        parser.error("--index_path, --index_shards and --hnsw_max_elements are not for --ann_engine milvus")
    args.milvus_uri = args.milvus_uri or MILVUS_URI
    if args.corpus_file:
        lite = not args.milvus_uri.startswith("http")
        args.milvus_index_type = args.milvus_index_type or ("FLAT" if lite else "HNSW")
        if args.milvus_index_type != "HNSW" and (args.hnsw_m or args.hnsw_ef):
            parser.error("--hnsw_m and --hnsw_ef need --milvus_index_type HNSW")


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that say too little, or two things, about queries and documents."""
    if bool(args.query) == bool(args.similar_text_pair):
        parser.error("one of --similar_text_pair and --query is needed" + (", not both" if args.query else ""))
    if data.STDIN in args.query and len(args.query) > 1:
        parser.error("--query TEXT and queries of stdin: one of them, please")
    if data.STDIN in args.query and RANKS > 1:
        parser.error("--query of stdin is for one process")
    if not args.corpus_file and not args.query:
        parser.error("the following arguments are required: --corpus_file")
    if args.corpus_file or args.ann_engine == "milvus":
        return
    if not args.index_path:
        parser.error("--query needs --index_path, or --corpus_file, or --ann_engine milvus")
    if not os.path.isdir(args.index_path):
        parser.error(f"argument --index_path: {args.index_path}: no such folder; --corpus_file is needed to build it")


def check_fusion(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what BM25 cannot do; make up its defaults."""
    if not args.hybrid_bm25 and (asked := [flag for flag in ("bm25_weight", "fusion") if getattr(args, flag)]):
        parser.error(f"--{asked[0]} needs --hybrid_bm25")
    if args.hybrid_bm25 and args.ann_engine == "milvus" and not args.corpus_file:
        parser.error("--hybrid_bm25 with --ann_engine milvus needs --corpus_file")
    args.fusion, args.bm25_weight = args.fusion or "rrf", args.bm25_weight or BM25_WEIGHT


def settings(args: argparse.Namespace, documents: int, engine) -> dict[str, str | int]:
    """What an index depends on beside corpus and model."""
    common = {"max_seq_length": args.max_seq_length, "precision": engine.precision, "ann_engine": args.ann_engine,
              "hnsw_m": args.hnsw_m or HNSW_M, "hnsw_ef": args.hnsw_ef or HNSW_EF}
    if args.ann_engine == "milvus":
        return {**common, "documents": documents, "dim": engine.embedding_size,
                "index_type": args.milvus_index_type, "metric": args.milvus_metric or "COSINE"}
    exact = {"vector_type": args.vector_type} if args.ann_engine == "exact" else {}
    return {**common, **exact, "index_shards": args.index_shards or SHARDS,
            "hnsw_max_elements": args.hnsw_max_elements or documents}


def open_index(args: argparse.Namespace, corpus: data.TextFile | None, engine, tokenizer) -> tuple:
    """The index, kept or built, and the documents in it."""
    from model import join_ranks

    rank, ranks = join_ranks()
    made_of = {"max_seq_length": args.max_seq_length, "precision": engine.precision}
    if args.vector_type != "float32":
        made_of["vector_type"] = args.vector_type
    if corpus is not None:  # else what is not said is as in the index; what texts become is not left open
        made_of = settings(args, len(corpus), engine)
    if args.index_path or args.ann_engine == "milvus":
        made_of["model"] = index_store.model_digest(args.params_path, args.model_name_or_path,
                                                     args.output_emb_size)
        made_of.update({} if corpus is None else {"corpus": data.file_digest(corpus.path)})
    if args.ann_engine == "milvus":
        return open_collection(args, corpus, engine, tokenizer, made_of, rank, ranks)
    kept = args.index_path and os.path.exists(args.index_path)
    if kept:
        made_of = index_store.read_made_of(args.index_path, made_of)
        corpus = corpus or index_store.read_kept_corpus(args.index_path, made_of["corpus"])
    index = index_store.new_index(made_of, len(corpus), engine.embedding_size, args.cpu_threads, rank, ranks)
    if kept:
        index_store.load_index(args.index_path, index, made_of)
        return index, corpus
    fill(args, index, index.add, corpus, engine, tokenizer)
    if args.index_path:
        index_store.save_index(args.index_path, index, made_of, corpus)
    return index, corpus


def open_collection(args: argparse.Namespace, corpus: data.TextFile | None, engine, tokenizer, made_of: dict,
                    rank: int, ranks: int) -> tuple:
    """The collection of Milvus, filled where it lacks documents, and the documents in it."""
    from milvus_index import MilvusIndex
    from model import wait_for_ranks

    index = MilvusIndex(args.milvus_uri, args.milvus_collection or cli.COLLECTION, made_of, rank, ranks, wait_for_ranks)
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
    from ann_util import fill_up, merge
    from model import gather_arrays

    return merge(list(zip(*map(gather_arrays, fill_up(found, k)))), k)


def report_ann_recall(index, queries, cosines) -> None:
    """Say what the approximation costs: a sample of the queries is searched exactly too."""
    from ann_util import ann_recall
    from model import is_first_rank

    sample, k = slice(None, None, -(-len(queries) // SAMPLE)), cosines.shape[1]
    _, exact = best_of_ranks(index.search(queries[sample], k, exact=True), k)
    if is_first_rank():
        console.log(f"ANN recall@{k} against exact search, {len(exact)} queries: "
                    f"{ann_recall(cosines[sample], exact):.4f} (--hnsw_m and --hnsw_ef raise it)")


def search(args: argparse.Namespace, blocks: Iterable[list[str]], index, k: int, encode) -> Iterator[tuple]:
    """Yield each block of queries, the different ones of them, their embeddings, and the k best rows and cosines of
    each. Every rank takes part; all get the same."""
    sampled = bool(args.query)
    for block in blocks:
        asked = data.distinct(block)  # a query on several lines is encoded and searched once
        embeddings = encode(asked)
        rows, cosines = best_of_ranks(index.search(embeddings, k), k)
        if args.ann_engine == "hnswlib" and not sampled:
            report_ann_recall(index, embeddings, cosines)
        sampled = True
        yield block, asked, embeddings, (rows, cosines)


def answers(args: argparse.Namespace, block: list[str], asked: list[str], found: tuple,
            corpus: Sequence[str]) -> Iterator[str]:
    """The result's lines for a block of queries, of whose different ones, `asked`, this was found."""
    measure = "score" if args.hybrid_bm25 else "cosine"
    ranking = {query: (rows.tolist(), scores.tolist()) for query, rows, scores in zip(asked, *found)}
    for query in block:
        rows, scores = (side[: args.recall_num] for side in ranking[query])
        yield results.recall_lines(args.format, query, [corpus[row] for row in rows], scores, measure)


def result_path(args: argparse.Namespace) -> str:
    return os.path.join(args.recall_result_dir, args.recall_result_file)


@contextlib.contextmanager
def written(path: str | None) -> Iterator[IO]:
    """A file that rank 0 writes; what other ranks write, or what has no path, is kept nowhere."""
    if not path or RANK:
        with open(os.devnull, "w", encoding="utf-8") as file:
            yield file
    else:
        with data.new_file(path) as file:
            yield file
        console.log(f"wrote {path}")


def result_file(args: argparse.Namespace) -> contextlib.AbstractContextManager[IO]:
    """Where the result goes: stdout for --query, else the result file, which rank 0 writes."""
    if args.query and not RANK:
        return contextlib.nullcontext(sys.stdout)
    return written(None if args.query else result_path(args))


def write_results(args: argparse.Namespace, blocks: Iterable[list[str]], index, corpus: Sequence[str], embed,
                  pairs: Sequence[tuple[str, str]]) -> None:
    """Search the queries, block by block, and write what was asked for; rank 0 alone fuses, mines and writes."""
    bm25 = miner = None
    if args.hybrid_bm25 and not RANK:
        from lexical import Bm25, fuse

        bm25 = Bm25(corpus, args.index_path and os.path.join(args.index_path, "bm25"))
    if args.mine_negatives and not RANK:
        miner = mining.Miner(pairs, args.negative_depth, args.negatives_per_pair, args.negative_max_score,
                             args.negative_max_overlap)
    depth = max(args.recall_num, FUSED if args.hybrid_bm25 else 0, args.negative_depth[1] if args.mine_negatives else 0)
    with result_file(args) as file, written(args.mine_negatives) as triples:
        for block, asked, embeddings, found in search(args, blocks, index, min(depth, len(corpus)), embed):
            if miner:
                triples.writelines(miner.mine(asked, embeddings, found, corpus, embed))
            if bm25:
                found = fuse(found, bm25.search(asked, depth), min(args.recall_num, len(corpus)), args.bm25_weight,
                             args.fusion)
            file.writelines(answers(args, block, asked, found, corpus))
            file.flush()
    if miner:
        miner.report()


def main() -> None:
    args = parse_args()
    corpus = data.TextFile(args.corpus_file, "--corpus_file", args.strict_data) if args.corpus_file else None
    streams = args.query == [data.STDIN]
    pairs = [] if args.query else data.read_text_pairs(args.similar_text_pair, "--similar_text_pair", args.strict_data)
    queries = args.query or [query for query, _ in pairs]
    if corpus and (args.hnsw_max_elements or len(corpus)) < len(corpus):
        raise console.InputError(f"--hnsw_max_elements {args.hnsw_max_elements}: the corpus has {len(corpus)} "
                                 "documents")
    if args.mine_negatives:
        mining.check_depth(args.negative_depth, len(corpus))
    for path in filter(None, (None if args.query else result_path(args), args.mine_negatives)):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if args.hybrid_bm25:
        import lexical  # noqa: F401  a missing package is told before anything takes time
    cli.announce(args, args.params_path, f"{cli.count(corpus, 'document')} for {args.ann_engine}" if corpus else
                 f"index {args.index_path or args.milvus_uri}",
                 "queries of stdin" if streams else f"{len(queries):,} queries")

    from deploy.python.predictor import load_engine
    from model import encode

    engine, tokenizer = load_engine(args)
    index, corpus = open_index(args, corpus, engine, tokenizer)
    if args.recall_num > len(corpus):
        console.warn(f"--recall_num {args.recall_num}: the corpus has only {len(corpus)} documents")
    blocks = (queries[start : start + data.WINDOW] for start in range(0, len(queries), data.WINDOW))
    if streams:
        blocks = data.arriving(query for (query,) in data.read_rows(data.STDIN, 1, "--query", args.strict_data))
    write_results(args, blocks, index, corpus,
                  lambda texts: encode(engine, tokenizer, texts, args.max_seq_length, args.batch_size), pairs)
    index.close()


if __name__ == "__main__":
    console.run(main)
