"""Recall the most similar documents of a corpus for every query.

    python recall.py --device cpu --params_path checkpoints/model_900 --corpus_file recall/corpus.csv \\
        --similar_text_pair recall/dev.csv --recall_num 50
    # the corpus shared out among 4 GPUs
    python -u -m paddle.distributed.launch --gpus 0,1,2,3 recall.py --params_path ... --corpus_file ... (as above)
    # keep the index, then ask it
    python recall.py ... --index_path my_index
    python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query 语义检索 --top_k 10
    head queries.txt | python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query

Encodes the corpus, builds an index while it does, and writes `query \\t document \\t cosine`, `recall_num` lines a
query, best first, to <recall_result_dir>/<recall_result_file>; answers to --query go to stdout, those to queries of
stdin as they come. With --hybrid_bm25 the ranking is fused with that of words, and the fused score stands where the
cosine does."""

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import ann_util
from simcse import console, flags
from simcse.encoder.weights import model_digest
from simcse.files import STDIN, building, file_digest, new_file, read_ahead
from simcse.index.documents import Entries
from simcse.index.hits import Hit, expand, search
from simcse.index.shards import MEASURED_K, Shards, report, sample
from simcse.machine import RANK, RANKS
from simcse.text import formats, textfile, tokens
from simcse.text.passages import Passages

HNSW_M, HNSW_EF, SHARDS = 32, 100, 8
OF_INDEX = ("ann_engine", "index_shards", "hnsw_m", "hnsw_ef", "hnsw_max_elements", "passages")  # that a kept index has
MILVUS_URI = "./recall.db"


class Query(NamedTuple):
    text: str
    place: str  # as file:line
    id: str | None = None  # of the query file


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("files")
    add = group.add_argument
    add("--corpus_file", type=flags.readable_file, help="documents to search, a text a line, or its id, a tab and the "
        "text; may be left out with --query and --query_file, where there is an index")
    add("--corpus_columns", type=int, choices=formats.CORPUS_COLUMNS,
        help="1: a text a line; 2: an id, a tab and the text; None: as most lines of --corpus_file are")
    add("--similar_text_pair", "--similar_text_pair_file", type=flags.readable_file,
        help="query and target, tab-separated, a pair a line; for the queries documents are recalled, and of the "
        "targets is said whether the corpus has them")
    flags.add_targets_argument(group)
    add("--query_file", type=flags.readable_file, help="queries without targets, instead of --similar_text_pair, a "
        "text a line, or its id, a tab and the text")
    add("--query", action="append", nargs="?", const=STDIN, metavar="TEXT", type=flags.given_text, default=[],
        help="a query, instead of --similar_text_pair; may be given several times. Without TEXT, or -: queries of "
        "stdin, one a line, answered as they come, a blank or malformed one with no document")
    add("--recall_result_dir", default="recall_result_dir", help="folder of the result, made if need be")
    add("--recall_result_file", default="recall_result.txt", help="name of the result in that folder")
    add("--format", choices=("tsv", "jsonl", "trec"), default="tsv", help="of the result. tsv: query, document, "
        'cosine, a line a document; jsonl: {"query", "results": [{"rank", "line", "id", "document", "cosine"}]}, a '
        "line a query; trec: query id, Q0, document id, rank, cosine, simcse, the number of a line being the id where "
        'there is none; with --hybrid_bm25 the fused score instead of the cosine, in jsonl as "score"')
    group = parser.add_argument_group("model")
    flags.add_model_arguments(group)
    flags.add_encode_arguments(group)
    add = parser.add_argument_group("index").add_argument
    add("--recall_num", "--top_k", type=flags.positive_int, default=10, help="documents recalled for each query")
    add("--distinct", action="store_true", help="each text once, however many lines of the corpus have it")
    add("--ann_engine", choices=("hnswlib", "exact", "milvus"),
        help="hnswlib: an approximate graph; exact: a matrix product, for up to some 100,000 documents; milvus: a "
        "collection of Milvus (requirements-milvus.txt); None: that of the index in --index_path, else hnswlib")
    add("--index_path", help="folder of the index: used where there is one, which has to be of the same corpus, model "
        "and settings as far as they are given; otherwise the index is built and kept there")
    add("--index_shards", type=flags.positive_int, help="parts of the index, at least as many as processes; results "
        f"depend on it, and not on the number of processes; None: {SHARDS}")
    add("--hnsw_m", type=flags.hnsw_links, help=f"links a node of the graph; None: {HNSW_M}")
    add("--hnsw_ef", type=flags.positive_int, help="candidates kept while building the graph, and while searching it: "
        "of each shard, and at least twice --recall_num; a kept index is searched with another, too; None: that of the "
        f"index, else {HNSW_EF}")
    add("--hnsw_max_elements", type=flags.positive_int,
        help="distinct texts the graph can hold; None: as many as the corpus has")
    add("--passages", action="store_true", help="split each document at sentence ends into passages of at most "
        "--max_seq_length tokens, and find it by the best of them, each embedded in its document; else the encoder "
        "sees a document's first tokens alone; a kept index knows whether it has them")
    add("--hybrid_bm25", action="store_true", help="fuse the ranking with that of BM25 over words, "
        f"{flags.FUSED} documents of each, or --recall_num if that is more; the result has the fused score instead of "
        "the cosine: the cosine plus BM25's score divided by the query's highest")
    add = parser.add_argument_group("milvus").add_argument
    add("--milvus_uri", type=flags.milvus_uri, help="http://host:port of a server, its token in the environment as "
        f"MILVUS_TOKEN; or a path ending in .db: Milvus Lite, without a server; None: {MILVUS_URI}")
    add("--milvus_collection", type=flags.nonempty_text, help="collection, made where there is none, gone on with "
        f"where it is not full; None: {flags.COLLECTION}")
    args = flags.check_arguments(parser, parser.parse_args())
    check(parser, args)
    if (args.hnsw_m or args.hnsw_ef or args.hnsw_max_elements) and not args.ann_engine:
        args.ann_engine = "hnswlib"
    args.milvus_uri = args.milvus_uri or MILVUS_URI
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of another engine, and those that say too little, or two things, about queries and documents."""
    engine, graph, stdin = args.ann_engine, args.hnsw_m or args.hnsw_ef, STDIN in args.query
    milvus, server = engine == "milvus", (args.milvus_uri or MILVUS_URI).startswith("http")
    in_folder = not args.corpus_file and not milvus
    sources = [flag for flag in ("--similar_text_pair", "--query_file", "--query") if getattr(args, flag[2:])]
    for wrong, message in (
            (args.milvus_uri and not milvus, "--milvus_uri needs --ann_engine milvus"),
            (args.milvus_collection and not milvus, "--milvus_collection needs --ann_engine milvus"),
            (engine == "exact" and (graph or args.hnsw_max_elements),
             "--hnsw_m, --hnsw_ef and --hnsw_max_elements need --ann_engine hnswlib"),
            (milvus and (args.index_path or args.index_shards or args.hnsw_max_elements),
             "--index_path, --index_shards and --hnsw_max_elements are not for --ann_engine milvus"),
            (milvus and graph and not server, "--hnsw_m and --hnsw_ef are not for Milvus Lite, which searches exactly"),
            (milvus and args.hybrid_bm25 and not args.corpus_file,
             "--hybrid_bm25 with --ann_engine milvus needs --corpus_file"),
            (not sources, "one of --similar_text_pair, --query_file and --query is needed"),
            (len(sources) > 1, f"{' and '.join(sources)}: one of them, please"),
            (args.format == "trec" and args.query, "--format trec needs --query_file or --similar_text_pair"),
            (args.targets == "id" and not args.similar_text_pair, "--targets needs --similar_text_pair"),
            (args.corpus_columns and not args.corpus_file, "--corpus_columns needs --corpus_file"),
            (stdin and len(args.query) > 1, "--query TEXT and queries of stdin: one of them, please"),
            (stdin and RANKS > 1, "--query of stdin is for one process"),
            (args.similar_text_pair and not args.corpus_file, "the following arguments are required: --corpus_file"),
            (in_folder and not args.index_path,
             f"{' '.join(sources)} needs --index_path, or --corpus_file, or --ann_engine milvus"),
            (in_folder and not os.path.isdir(args.index_path or ""),
             f"argument --index_path: {args.index_path}: no such folder; --corpus_file is needed to build it")):
        if wrong:
            parser.error(message)


def check_targets(args: argparse.Namespace, pairs: Iterable[textfile.Row], corpus: textfile.Corpus) -> None:
    """Warn of the targets of --similar_text_pair that the corpus lacks, and that no recall can find."""
    path, ids = args.similar_text_pair, args.targets == "id"
    lines = {pair.fields[1]: pair.line_number for pair in reversed(list(pairs))}
    count, near = len(lines), ""
    for document in corpus.all_ids() if ids else corpus:
        if lines.pop(document, None) and not lines:
            return
    if not ids:
        looks = {textfile.normalize(target) for target in lines}
        there = {look for document in corpus if (look := textfile.normalize(document)) in looks}
        unseen = sum(textfile.normalize(target) in there for target in lines)
        near = f" {unseen:,} of them are but for white space, width or invisible characters:"
    first = ", ".join(f"{path}:{number}" for number in sorted(lines.values())[:3])
    console.warn_data(f"--similar_text_pair: {len(lines):,} of {count:,} targets are not {'ids ' * ids}in "
                     f"{corpus.name}, and count as missed;{near} {first}")


def fingerprint_of(args: argparse.Namespace, corpus: textfile.Corpus | None, encoder) -> tuple[dict, dict]:
    """What an index that is there has to agree with: how texts become embeddings, and what is given; and all that a new
    one depends on."""
    milvus, given = args.ann_engine == "milvus", {name: getattr(args, name) for name in OF_INDEX if getattr(args, name)}
    wanted = {"max_seq_length": args.max_seq_length, "precision": encoder.precision, **given}
    if args.index_path or milvus:
        wanted["model"] = model_digest(args.params_path, args.model_name_or_path)
        wanted.update({"corpus": file_digest(corpus.path), "corpus_columns": corpus.columns} if corpus else {})
    new = {"ann_engine": "hnswlib", "hnsw_m": HNSW_M, "hnsw_ef": HNSW_EF, "passages": False}
    if milvus:
        new.update(dim=encoder.embedding_size, metric="COSINE",
                   index_type="HNSW" if args.milvus_uri.startswith("http") else "FLAT")
    else:
        new["index_shards"] = SHARDS
    return wanted, {**new, **wanted}


def open_index(args: argparse.Namespace, corpus: textfile.Corpus | None, encoder) -> tuple:
    """The index, kept or built, and what is in it: `Entries`, or the `MilvusIndex` itself where there is no corpus."""
    from simcse.ranks import join_ranks, wait_for_ranks

    def split(entries: Entries) -> None:
        entries.passages = Passages.split(entries, encoder.tokenizer, args.max_seq_length)

    join_ranks()
    wanted, new = fingerprint_of(args, corpus, encoder)
    if args.ann_engine == "milvus":
        from simcse.index.milvus import MilvusIndex

        entries = Entries(corpus) if corpus else None
        name = args.milvus_collection or flags.COLLECTION
        index = MilvusIndex(args.milvus_uri, name, wanted, entries, new, lambda: split(entries))
        if index.pieces and not corpus:
            raise console.InputError(f"--milvus_collection {name}: not all documents are in it yet; run again with "
                                     "--corpus_file")
        kept = ann_util.Kept(f"--milvus_collection {name}", entries, index.known, index.before, index.pieces,
                             index.stored) if index.follows else None
        fill(index, entries, encoder, kept)
        wait_for_ranks()
        index.finish()
        return index, entries or index
    path, claim, kept = args.index_path, contextlib.nullcontext(), None
    if path and not RANK and not ann_util.is_kept(path, wanted):
        claim = building(path, wanted, new)
    with claim:
        wait_for_ranks()  # for rank 0, which may have waited for another process to build the index
        if path and os.path.exists(path):
            kept = ann_util.read_fingerprint(path, wanted)
            if ann_util.is_kept(path, wanted):
                return ann_util.load_index(path, kept, encoder.embedding_size, args.cpu_threads, corpus)
            new = {**new, **{name: kept[name] for name in OF_INDEX if name in kept}}
        entries = Entries(corpus)
        if new["passages"]:
            split(entries)
        count = len(entries.vectors)
        if not args.hnsw_max_elements:
            new["hnsw_max_elements"] = count
        if new["hnsw_max_elements"] < count:
            raise console.InputError(f"--hnsw_max_elements {args.hnsw_max_elements}: the corpus has {count} distinct "
                                     + ("passages" if new["passages"] else "documents"))
        index = Shards(new, count, encoder.embedding_size, args.cpu_threads)
        fill(index, entries, encoder, kept and ann_util.kept_in(path, kept, entries, index.pieces,
                                                                encoder.embedding_size))
        if new["ann_engine"] == "hnswlib":  # measured on documents, which unlike queries are always there
            documents = encoder.encode(sample(entries), warn=False)
            new["ann_recall"] = index.measure(documents, min(MEASURED_K, len(entries)), "documents")
            report(new["ann_recall"])
        wait_for_ranks()
        if path:
            ann_util.save_index(path, index, entries, kept, args.hybrid_bm25)
    return index, entries


def fill(index, entries: Entries | None, encoder, kept: ann_util.Kept | None = None) -> None:
    """Add the entries of this rank that the index lacks while the next ones are encoded, but those whose embeddings are
    `kept`."""
    from simcse.encoder.encoder import TextWarnings, places_of

    warnings = TextWarnings(encoder.max_seq_length) if RANKS > 1 else None  # several ranks add up what they count
    if index.pieces:
        pieces, passages, started = kept.lacking if kept else index.pieces, entries.passages, time.time()
        copies, count = entries.documents - len(entries), sum(map(len, pieces))
        if not kept:
            what = f" passages of {len(entries)} documents" if passages else f" of {len(entries)} documents"
            console.log(f"encoding and indexing {count}{what} in {encoder.precision}"
                        + (f"; {copies} more lines are copies, --distinct gives each text once" if copies else ""))
        encoded = encoder.stream(entries.vectors, windows=passages.windows(pieces) if passages else pieces,
                                 warnings=warnings)
        encoded = passages.in_context(pieces, encoded) if passages else encoded
        index.fill(kept.blocks(encoded) if kept else encoded)
        if not kept:
            console.log(f"{count / (time.time() - started):.1f} {'passages' if passages else 'documents'}/s")
    if warnings:
        warnings = warnings.gather()
        if not RANK or console.settings.strict:
            warnings.report(places_of(entries and entries.vectors))


def write_results(args: argparse.Namespace, blocks: Iterable[list[Query]], index, entries, encoder, file: IO) -> None:
    """Search the queries, block by block, and write what was asked for; every rank searches, rank 0 alone fuses and
    writes."""
    measure, depth = ("score", max(args.recall_num, flags.FUSED)) if args.hybrid_bm25 else ("cosine", args.recall_num)
    if args.hybrid_bm25 and not RANK:
        from simcse.index.bm25 import Bm25, fuse

        bm25 = Bm25(entries, args.index_path and os.path.join(args.index_path, "bm25"), index.fingerprint.get("corpus"))
    for number, block in enumerate(blocks):
        place_of = {query.text: query.place for query in reversed(block)}
        queries = textfile.distinct(query.text for query in block)  # one on several lines is encoded and searched once
        embeddings = encoder.encode(queries, places=[place_of[query] for query in queries])
        (nearest, cosines), passages = search(index, entries, embeddings, depth)
        found = nearest, cosines.clip(-1, 1)  # rounding of two unit vectors may go beyond 1
        if index.fingerprint["ann_engine"] == "hnswlib" and not args.query and number == 0:
            report(index.measure(sample(embeddings), nearest.shape[1], "queries"))
        if RANK:
            continue
        if args.hybrid_bm25:
            found = fuse(found, bm25.search(queries, depth), min(args.recall_num, len(entries)))
        row_of = {query: row for row, query in enumerate(queries)}
        for query in block:
            row = slice(row_of[query.text], row_of[query.text] + 1)
            hits, = expand([side[row] for side in found], entries, [args.recall_num], args.distinct,
                           passages and passages[row])
            file.write(result(args.format, query, hits, measure))
        file.flush()


def result(form: str, query: Query, hits: Iterable[Hit], measure: str) -> str:
    """What is written of a query, in the --format `form`; the score is a `measure`, "cosine" or "score"."""
    if form == "jsonl":
        return console.line("jsonl", query=query.text, **({"id": query.id} if query.id else {}), results=[
            {"rank": rank, "line": hit.line, **({"id": hit.id} if hit.id else {}), "document": hit.document,
             **({"passage": hit.passage} if hit.passage else {}), measure: hit.score}
            for rank, hit in enumerate(hits, 1)])
    if form == "tsv":
        return "".join(f"{query.text}\t{hit.document}\t{hit.score}\n" for hit in hits)
    lines, name = [], query.id or query.place.rsplit(":", 1)[-1]
    for rank, hit in enumerate(hits, 1):
        fields = [name, "Q0", hit.id or str(hit.line), str(rank), str(hit.score), "simcse"]
        if any(len(field.split()) != 1 for field in fields):
            raise console.InputError(f"--format trec: white space parts its columns, and is in an id: {fields[:3]}")
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)


def asked(blocks: Iterable[list[textfile.Row]], form: str) -> Iterator[list[Query]]:
    """The queries among the rows of stdin; a blank or malformed one between them is answered here, with no document,
    when those before it have been."""
    for block in blocks:
        for are_queries, group in itertools.groupby(block, lambda row: row.problem is None):
            if are_queries:
                yield [Query(row.fields[0], f"stdin:{row.line_number}") for row in group]
                continue
            for row in group:
                rest = {"results": []} if form == "jsonl" else {"document": None, "cosine": None}
                print(console.line(form, query="\t".join(row.fields), **rest), end="")
            sys.stdout.flush()


def queries_of(args: argparse.Namespace) -> list[Query]:
    """Those of --query_file."""
    queries = textfile.Corpus(args.query_file, "--query_file")
    return [Query(text, queries.place(row), id) for row, (text, id) in enumerate(zip(queries, queries.all_ids()))]


def main() -> None:
    args = parse_args()
    corpus = textfile.Corpus(args.corpus_file, "--corpus_file", args.corpus_columns) if args.corpus_file else None
    streams = args.query == [STDIN]
    pairs = list(textfile.read_rows(args.similar_text_pair, 2, "--similar_text_pair")) if args.similar_text_pair else []
    queries = [Query(query, "--query") for query in args.query] or [
        Query(pair.fields[0], f"{args.similar_text_pair}:{pair.line_number}") for pair in pairs] or queries_of(args)
    if pairs and not RANK:
        check_targets(args, pairs, corpus)
    path = None if args.query else os.path.join(args.recall_result_dir, args.recall_result_file)
    if path:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if args.hybrid_bm25:
        import simcse.index.bm25  # noqa: F401  a missing package is told before anything takes time
    kept = args.index_path and os.path.exists(args.index_path)
    if kept and args.precision == "auto":
        args.precision = ann_util.kept_precision(args.index_path, args.device)
    target = args.index_path if kept else args.ann_engine or "hnswlib"
    with_ids = " with ids" * bool(corpus and corpus.has_ids)
    source = (f"{console.count(len(corpus), 'document')}{with_ids} for {target}" if corpus else
              f"index {args.index_path or args.milvus_uri}")
    flags.announce(args, args.params_path, source,
                 "queries of stdin" if streams else f"{len(queries):,} queries")

    import model

    encoder = model.load_encoder_for(args, corpus or ())
    index, entries = open_index(args, corpus, encoder)
    documents = len(entries) if args.distinct else entries.documents
    if args.recall_num > documents:
        console.warn(f"--recall_num {args.recall_num}: the corpus has only {documents} "
                     f"{'distinct ' * args.distinct}documents")
    blocks = (queries[start : start + tokens.WINDOW] for start in range(0, len(queries), tokens.WINDOW))
    if streams:
        blocks = asked(read_ahead(textfile.read_rows(STDIN, 1, "--query", keep_malformed=True)), args.format)
    with new_file(path) if path and not RANK else contextlib.nullcontext(sys.stdout) as file:
        write_results(args, blocks, index, entries, encoder, file)
    if path and not RANK:
        console.log(f"wrote {path}")
    index.close()


if __name__ == "__main__":
    console.run(main)
