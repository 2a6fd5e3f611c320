"""Recall the most similar documents of a corpus for every query.

    python recall.py --device cpu --params_path checkpoints/model_900 --corpus_file recall/corpus.csv \\
        --similar_text_pair recall/dev.csv --recall_num 50
    # the corpus shared out among 4 GPUs
    python -u -m paddle.distributed.launch --gpus 0,1,2,3 recall.py --params_path ... --corpus_file ... (as above)
    # keep the index, then query it
    python recall.py ... --index_path my_index
    python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query 语义检索 --top_k 10
    head queries.txt | python recall.py --device cpu --params_path checkpoints/model_900 --index_path my_index --query

The corpus is encoded and indexed at the same time. The result, <recall_result_dir>/<recall_result_file>, has
`recall_num` lines `query \\t document \\t cosine` for each query, best first. Answers to --query go to stdout; queries
from stdin are streamed. With --hybrid_bm25 the ranking is fused with that of BM25, and the result has the fused score
instead of the cosine."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import ann_util
from simcse import console, flags
from simcse.encoder.weights import model_digest
from simcse.files import STDIN, check_not_input, check_writable, file_digest, new_file, stream_blocks
from simcse.index import milvus_types
from simcse.index.ann_recall import pick_evenly, report_ann_recall
from simcse.index.engines import DEFAULT_ENGINE, ENGINES, check_installed
from simcse.index.hits import FUSION_DEPTH, Hit, Ranking, hits_of
from simcse.index.hits import search as search_index
from simcse.index.lock import lock_folder
from simcse.index.manifest import REBUILD, Manifest
from simcse.index.milvus import MilvusIndex
from simcse.index.protocols import DocumentStore, VectorIndex
from simcse.index.settings import Setting
from simcse.index.shards import MAX_SHARDS, VECTORS_OF_ONE_SHARD, VECTORS_PER_SHARD
from simcse.machine import RANK, RANKS
from simcse.text import formats, textfile
from simcse.text.prefixes import QUERY
from simcse.text.tokens import WINDOW

if TYPE_CHECKING:
    from simcse.encoder.encoder import Encoder
    from simcse.encoder.int8_check import TextSource
    from simcse.index.bm25 import Bm25

MILVUS_URI = "./recall.db"


class Query(NamedTuple):
    """A query, or a line that should be one.

    Attributes:
        text: the query, or the line.
        place: where it stands, as file:line.
        id: of the query file; None: it has none.
        is_malformed: whether the line is blank or has several columns; it gets no documents.
    """

    text: str
    place: str
    id: str | None = None
    is_malformed: bool = False


# ---------------------------------------------------------------------------------------------------------- the flags
def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add_file_arguments(parser)
    group = parser.add_argument_group("model")
    flags.add_model_arguments(group)
    flags.add_encode_arguments(group)
    add_index_arguments(parser)
    args = parser.parse_args()
    flags.set_max_seq_length(args)
    flags.check_arguments(parser, args)
    check_queries(parser, args)
    check_engine_settings(parser, args)
    set_engine_defaults(args)
    check_milvus(parser, args)
    check_corpus(parser, args)
    return args


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the corpus, the queries and the result."""
    group = parser.add_argument_group("files")
    add = group.add_argument
    add("--corpus_file", type=flags.readable_file, help="documents to search, a text a line, or its id, a tab and the "
        "text; not needed for --query and --query_file if the index exists")
    add("--corpus_columns", type=int, choices=formats.CORPUS_COLUMNS,
        help="1: a text a line; 2: an id, a tab and the text (default: as most lines of --corpus_file)")
    add("--similar_text_pair", "--similar_text_pair_file", type=flags.readable_file,
        help="query and target, tab-separated, a pair a line; the queries are searched, and a warning names targets "
        "that the corpus lacks")
    flags.add_targets_argument(group)
    add("--query_file", type=flags.readable_file, help="queries without targets, instead of --similar_text_pair, a "
        "text a line, or its id, a tab and the text")
    add("--query", action="append", nargs="?", const=STDIN, metavar="TEXT", type=flags.given_text, default=[],
        help="a query, instead of --similar_text_pair; may be given several times. Without TEXT, or -: queries from "
        "stdin, one a line, streamed: each is answered when it arrives, a blank or malformed one with no document")
    add("--recall_result_dir", default="recall_result_dir", help="folder of the result, made if it does not exist")
    add("--recall_result_file", default="recall_result.txt", help="name of the result in that folder")
    add("--format", choices=tuple(FORMATS), default="tsv", help="format of the result. tsv: query, document, cosine, a "
        'line a document; jsonl: {"query", "results": [{"rank", "line", "id", "document", "cosine"}]}, a line a query; '
        "trec: query id, Q0, document id, rank, cosine, simcse, with the number of the line if there is no id. With "
        '--hybrid_bm25 the fused score stands instead of the cosine, in jsonl as "score"')


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the index, and those that the engines declare."""
    add = parser.add_argument_group("index").add_argument
    add("--recall_num", "--top_k", type=flags.positive_int, default=10, help="documents recalled for each query")
    add("--distinct", action="store_true", help="give each text once, however many lines of the corpus have it")
    descriptions = [f"{name}: {engine.description}" for name, engine in ENGINES.items()]
    add("--ann_engine", choices=tuple(ENGINES),
        help=f"{'; '.join(descriptions)} (default: that of the kept index, or {DEFAULT_ENGINE})")
    add("--index_path", help="folder of the index. If it has one, that is used, and must be of the same corpus, model "
        "and settings, as far as they are given; otherwise the index is built and kept there")
    add("--index_shards", type=flags.positive_int, help="parts of the index; results depend on their number, not on "
        f"that of processes or threads (default: 1 for up to {VECTORS_OF_ONE_SHARD:,} vectors, above that one for "
        f"every {VECTORS_PER_SHARD:,}, from 2 to {MAX_SHARDS})")
    for setting in engine_settings():
        add(f"--{setting.name}", type=setting.type,
            help=f"{' and '.join(engines_with(setting))}: {setting.help} (default: {setting.default_text})")
    add("--passages", action="store_true", help="split each document at sentence ends into passages of at most "
        "--max_seq_length tokens, and find it by the best of them, each embedded in its document; otherwise only the "
        "first tokens of a document are encoded. A kept index records whether it has them")
    add("--hybrid_bm25", action="store_true", help="fuse the ranking with that of BM25 over words, "
        f"{FUSION_DEPTH} documents of each, or --recall_num if that is more; the fused score is the cosine plus BM25's "
        "score divided by the query's highest")
    add = parser.add_argument_group("milvus").add_argument
    add("--milvus_uri", type=flags.milvus_uri, help="http://host:port of a server, its token in the environment as "
        f"MILVUS_TOKEN; or a path ending in .db: Milvus Lite, without a server (default: {MILVUS_URI})")
    add("--milvus_collection", type=flags.nonempty_text, help="name of the collection, made if it does not exist, "
        f"completed if documents are missing (default: {flags.COLLECTION})")
    types = [f"{name}: {index_type.description}" for name, index_type in milvus_types.INDEX_TYPES.items()]
    to_build = milvus_types.describe_settings(milvus_types.build_settings())
    to_search = milvus_types.describe_settings(milvus_types.search_settings())
    add("--milvus_index", choices=tuple(milvus_types.INDEX_TYPES), help="how the server indexes vectors. "
        f"{'; '.join(types)} (default: that of the collection, or {milvus_types.DEFAULT_TYPE}; "
        f"{milvus_types.LITE_TYPE} in Milvus Lite, which has no other)")
    add("--milvus_index_params", type=milvus_types.parse_parameters, metavar="NAME=VALUE,...",
        help="parameters of the index, with Milvus's parameter names, such as nlist=4096,nprobe=64. "
        f"When it is built: {to_build}. When it is searched: "
        f"{to_search}; a collection can be searched with other values of these")


def engine_settings() -> list[Setting]:
    """Return the settings of all engines, each once."""
    settings = [setting for engine in ENGINES.values() for setting in (*engine.build_settings, *engine.search_settings)]
    return list(dict.fromkeys(settings))


def engines_with(setting: Setting) -> list[str]:
    """Return the names of the engines that have a setting."""
    return [name for name, engine in ENGINES.items() if setting in (*engine.build_settings, *engine.search_settings)]


def setting_values(args: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Any]:
    """Return those of some settings that the command line has, by name."""
    return {setting.name: getattr(args, setting.name) for setting in settings
            if getattr(args, setting.name) is not None}


def check_queries(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse several sources of queries, none, and flags that do not suit the source."""
    sources = query_sources(args)
    from_stdin = STDIN in args.query
    if not sources:
        parser.error("one of --similar_text_pair, --query_file and --query is needed")
    if len(sources) > 1:
        parser.error(f"{' and '.join(sources)} are mutually exclusive")
    if args.format == "trec" and args.query:
        parser.error("--format trec needs --query_file or --similar_text_pair")
    if args.targets == "id" and not args.similar_text_pair:
        parser.error("--targets needs --similar_text_pair")
    if from_stdin and len(args.query) > 1:
        parser.error("--query TEXT and queries from stdin are mutually exclusive")
    if from_stdin and RANKS > 1:
        parser.error("queries from stdin need a single process")


def query_sources(args: argparse.Namespace) -> list[str]:
    """Return the flags that name queries."""
    return [flag for flag in ("--similar_text_pair", "--query_file", "--query") if getattr(args, flag[2:])]


def settings_on_command_line(args: argparse.Namespace) -> list[Setting]:
    """Return the settings of engines that the command line has."""
    return [setting for setting in engine_settings() if getattr(args, setting.name) is not None]


def kept_engine(args: argparse.Namespace) -> str | None:
    """Return the engine of the index in --index_path; None: there is no index."""
    return ann_util.peek_manifest(args.index_path).get("ann_engine") if args.index_path else None


def engine_in_use(args: argparse.Namespace) -> str:
    """Return the engine of --ann_engine, else of the kept index, else the first with the settings that are given."""
    engine = args.ann_engine or kept_engine(args)
    if engine:
        return engine
    given = settings_on_command_line(args)
    return engines_with(given[0])[0] if given else DEFAULT_ENGINE


def check_engine_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse settings that the engine in use does not have."""
    engine = engine_in_use(args)
    for setting in settings_on_command_line(args):
        if engine in engines_with(setting):
            continue
        message = f"--{setting.name} needs --ann_engine {' or '.join(engines_with(setting))}"
        if args.ann_engine is None and kept_engine(args):
            message += f"; the index in {args.index_path} has ann_engine {engine}"
        parser.error(message)


def set_engine_defaults(args: argparse.Namespace) -> None:
    """Set --ann_engine if a setting of an engine is given, and the address of Milvus if that is used.

    Otherwise --ann_engine stays None: a kept index has any engine, and a new one DEFAULT_ENGINE.
    """
    if settings_on_command_line(args):
        args.ann_engine = engine_in_use(args)
    if args.ann_engine == "milvus":
        args.milvus_uri = args.milvus_uri or MILVUS_URI
        args.milvus_collection = args.milvus_collection or flags.COLLECTION


def check_milvus(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not suit Milvus, and flags of Milvus without it."""
    milvus_flags = ("milvus_uri", "milvus_collection", "milvus_index", "milvus_index_params")
    if args.ann_engine != "milvus":
        given = [f"--{flag}" for flag in milvus_flags if getattr(args, flag)]
        if given:
            parser.error(f"{' and '.join(given)} {console.verb(len(given), 'need')} --ann_engine milvus")
        return
    if args.index_path or args.index_shards:
        parser.error("--index_path and --index_shards are not for --ann_engine milvus")
    if not (milvus_types.is_lite(args.milvus_uri) or milvus_types.is_collection_name(args.milvus_collection)):
        parser.error(f"--milvus_collection {args.milvus_collection}: expected at most 255 ASCII letters, digits and _, "
                     "and no digit first")
    check_milvus_index(parser, args)
    if args.recall_num > MilvusIndex.max_k:
        parser.error(f"--recall_num {args.recall_num}: Milvus gives at most {MilvusIndex.max_k}")
    if args.hybrid_bm25 and not args.corpus_file:
        parser.error("--hybrid_bm25 with --ann_engine milvus needs --corpus_file")


def check_milvus_index(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse parameters of the index that its type does not have, as far as the type is known, or that are given twice.

    Those of an existing collection are checked when it is opened.
    """
    given = settings_on_command_line(args)
    parameters = args.milvus_index_params or {}
    if milvus_types.is_lite(args.milvus_uri):
        if given or parameters or args.milvus_index not in (None, milvus_types.LITE_TYPE):
            parser.error("--milvus_index, --milvus_index_params, --hnsw_m and --hnsw_ef are not for Milvus Lite, which "
                         "searches exactly; name a server by --milvus_uri")
        return
    for setting in given:
        parameter = milvus_types.SETTING_OF_FLAG[setting.name]
        if parameter in parameters:
            parser.error(f"--{setting.name} and {parameter} of --milvus_index_params are mutually exclusive")
    if args.milvus_index:
        try:
            milvus_types.check_names(args.milvus_index, list(milvus_settings(args)))
        except console.InputError as error:
            parser.error(str(error))


def milvus_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of Milvus's index that the command line has, by Milvus's names."""
    values = dict(args.milvus_index_params or {})
    for setting in settings_on_command_line(args):
        values[milvus_types.SETTING_OF_FLAG[setting.name]] = getattr(args, setting.name)
    return values


def check_corpus(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse to search without a corpus and without an index."""
    if args.corpus_file:
        return
    if args.corpus_columns:
        parser.error("--corpus_columns needs --corpus_file")
    if args.similar_text_pair:
        parser.error("the following arguments are required: --corpus_file")
    if args.ann_engine == "milvus":
        return
    if not args.index_path:
        source, = query_sources(args)
        parser.error(f"{source} needs --index_path, or --corpus_file, or --ann_engine milvus")
    if not os.path.isdir(args.index_path):
        parser.error(f"argument --index_path: {args.index_path}: no such folder; --corpus_file is needed to build it")


# --------------------------------------------------------------------------------------------------------- what is read
def read_corpus(args: argparse.Namespace) -> textfile.Corpus | None:
    """Return the documents of --corpus_file; None: the index has them."""
    if not args.corpus_file:
        return None
    return textfile.Corpus(args.corpus_file, "--corpus_file", args.corpus_columns)


def read_queries(args: argparse.Namespace, corpus: textfile.Corpus | None) -> list[Query]:
    """Return the queries of the command line or of a file, and warn of targets that the corpus lacks."""
    if args.query:
        return [Query(text, "--query") for text in args.query]
    if args.query_file:
        rows = textfile.Corpus(args.query_file, "--query_file")
        return [Query(text, rows.place(row), id) for row, (text, id) in enumerate(zip(rows, rows.all_ids()))]
    pairs = list(textfile.read_rows(args.similar_text_pair, 2, "--similar_text_pair"))
    if not RANK:
        warn_missing_targets(args, pairs, corpus)
    return [Query(pair.fields[0], f"{args.similar_text_pair}:{pair.line_number}") for pair in pairs]


def warn_missing_targets(args: argparse.Namespace, pairs: Sequence[textfile.Row], corpus: textfile.Corpus) -> None:
    """Warn of the targets of --similar_text_pair that the corpus lacks, and that no recall can find."""
    path = args.similar_text_pair
    are_ids = args.targets == "id"
    missing: dict[str, int] = {}  # the first line of each target
    for pair in pairs:
        missing.setdefault(pair.fields[1], pair.line_number)
    total = len(missing)
    for target in corpus.all_ids() if are_ids else corpus:
        missing.pop(target, None)
        if not missing:
            return
    where = f"among the ids of {corpus.name}" if are_ids else f"in {corpus.name}"
    message = (f"--similar_text_pair: {console.part(len(missing), total, 'target', 'are')} not {where}, "
               f"and {console.verb(len(missing), 'count')} as missed;")
    if not are_ids:
        similar = count_similar(list(missing), corpus)
        if similar:
            message += (f" {similar:,} of them {console.verb(similar, 'match')} a document after Unicode and "
                        "white-space normalization:")
    first_lines = sorted(missing.values())[:3]
    console.warn_data(f"{message} {', '.join(f'{path}:{line}' for line in first_lines)}")


def count_similar(targets: Sequence[str], corpus: textfile.Corpus) -> int:
    """Return how many texts match a document of the corpus after normalization."""
    wanted = {textfile.normalize(target) for target in targets}
    found = wanted.intersection(textfile.normalize(document) for document in corpus)
    return sum(textfile.normalize(target) in found for target in targets)


def read_blocks(args: argparse.Namespace, queries: list[Query]) -> Iterator[list[Query]]:
    """Yield the queries in blocks that are searched together; of stdin what has arrived."""
    if not is_streamed(args):
        for start in range(0, len(queries), WINDOW):
            yield queries[start : start + WINDOW]
        return
    for rows in stream_blocks(textfile.read_rows(STDIN, 1, "--query", keep_malformed=True)):
        yield [Query("\t".join(row.fields), f"stdin:{row.line_number}", is_malformed=row.problem is not None)
               for row in rows]


def is_streamed(args: argparse.Namespace) -> bool:
    """Return whether the queries come from stdin."""
    return args.query == [STDIN]


# ----------------------------------------------------------------------------------------------------------- the index
def open_or_build_index(args: argparse.Namespace, corpus: textfile.Corpus | None,
                        encoder: "Encoder") -> tuple[VectorIndex, DocumentStore]:
    """Return the index that the flags name, and the documents of its rows; where it is not there yet, build it."""
    from simcse.ranks import join_ranks, wait_for_ranks

    join_ranks()
    wanted = wanted_manifest(args, corpus, encoder)
    if args.ann_engine == "milvus":
        return ann_util.open_collection(args.milvus_uri, args.milvus_collection, wanted, corpus=corpus,
                                        encoder=encoder)
    if not args.index_path:
        manifest = ann_util.manifest_to_build(wanted)
        return ann_util.build_index(corpus, encoder, manifest, threads=args.cpu_threads)
    with lock_unless_current(args.index_path, wanted):
        wait_for_ranks()  # for rank 0, which may have waited for another process to build the index
        return open_or_rebuild_index(args, wanted, corpus, encoder)


def open_or_rebuild_index(args: argparse.Namespace, wanted: Manifest, corpus: textfile.Corpus | None,
                       encoder: "Encoder") -> tuple[VectorIndex, DocumentStore]:
    """Open the index in --index_path; build it and keep it if there is none, or one of another state of the corpus."""
    path = args.index_path
    previous = ann_util.read_manifest(path, wanted) if os.path.exists(path) else None
    if previous is not None and not RANK:
        previous.warn_other_calibration(wanted, f"--index_path {path}", REBUILD)
    if previous is not None and previous.has_corpus_of(wanted):
        return ann_util.load_index(path, previous, threads=args.cpu_threads, corpus=corpus,
                                   search_settings=wanted.search_settings)
    manifest = ann_util.manifest_to_build(wanted, previous)
    previous_path = None if previous is None else path
    index, documents = ann_util.build_index(corpus, encoder, manifest, threads=args.cpu_threads,
                                            previous_path=previous_path)
    ann_util.save_index(path, index, documents, args.hybrid_bm25)
    return index, documents


def lock_unless_current(path: str, wanted: Manifest) -> contextlib.AbstractContextManager:
    """Return a context manager that locks the folder while rank 0 builds, and does nothing if the index is current."""
    if RANK:
        return contextlib.nullcontext()
    previous = ann_util.read_manifest(path, wanted) if os.path.exists(path) else None
    if previous is not None and previous.has_corpus_of(wanted):
        return contextlib.nullcontext()
    check_writable(path, "--index_path", is_folder=True)
    return lock_folder(path, wanted, ann_util.manifest_to_build(wanted, previous))


def wanted_manifest(args: argparse.Namespace, corpus: textfile.Corpus | None, encoder: "Encoder") -> Manifest:
    """Return what an index has to be made of, as far as the flags say it."""
    build_settings, search_settings = wanted_settings(args)
    wanted = Manifest(
        max_seq_length=args.max_seq_length,
        precision=encoder.precision,
        calibration=encoder.calibration,
        passages=True if args.passages else None,
        document_prefix=encoder.prefixes.document,
        ann_engine=args.ann_engine,
        index_shards=args.index_shards,
        build_settings=build_settings,
        search_settings=search_settings)
    is_kept = args.index_path or args.ann_engine == "milvus"
    if is_kept:
        wanted.model = model_digest(args.params_path, args.model_name_or_path)
    if is_kept and corpus is not None:
        wanted.corpus = file_digest(corpus.path)
        wanted.corpus_columns = corpus.columns
    return wanted


def wanted_settings(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that the command line has, those of building an index and those of searching it, by name."""
    if args.ann_engine == "milvus":
        build_settings, search_settings = milvus_types.split_settings(milvus_settings(args))
        if args.milvus_index:
            build_settings[milvus_types.INDEX_TYPE] = args.milvus_index
        return build_settings, search_settings
    engine = ENGINES[args.ann_engine or DEFAULT_ENGINE]
    return setting_values(args, engine.build_settings), setting_values(args, engine.search_settings)


def warn_small_corpus(args: argparse.Namespace, documents: DocumentStore) -> None:
    """Warn if the corpus has fewer documents than are recalled."""
    available = len(documents) if args.distinct else documents.line_count
    kind = "distinct document" if args.distinct else "document"
    if args.recall_num > available:
        console.warn(f"--recall_num {args.recall_num}: the corpus has only {console.count(available, kind)}")


# ------------------------------------------------------------------------------------------------------------ searching
class Retriever:
    """Searches blocks of queries, by embeddings, and with --hybrid_bm25 by words as well.

    All ranks search together; what it returns is complete on rank 0 alone.
    """

    def __init__(self, args: argparse.Namespace, encoder: "Encoder", index: VectorIndex,
                 documents: DocumentStore) -> None:
        self.encoder = encoder
        self.index = index
        self.documents = documents
        self.bm25: Bm25 | None = None
        # How many documents each ranking has, and how many are left when two have been fused.
        self.depth = args.recall_num
        self.fused_depth = min(args.recall_num, len(documents))
        if args.hybrid_bm25:
            self.depth = max(args.recall_num, FUSION_DEPTH)
        if args.hybrid_bm25 and not RANK:
            self.bm25 = ann_util.build_or_open_bm25(documents, index.manifest.corpus, args.index_path)
        self._has_to_measure = not args.query  # the recall of a few queries would say little

    def search(self, texts: Sequence[str], places: Sequence[str]) -> Ranking:
        """Return the best documents for each query.

        Args:
            texts: the queries, each once.
            places: where each stands, as file:line, for warnings.
        """
        embeddings = self.encoder.encode(texts, input_type=QUERY, places=places)
        ranking = search_index(self.index, self.documents, embeddings, self.depth)
        if self._has_to_measure:
            k = ranking.documents.shape[1]
            report_ann_recall(self.index.measure(pick_evenly(embeddings), k, "queries"))
            self._has_to_measure = False
        if self.bm25 is None:
            return ranking
        from simcse.index.bm25 import fuse

        return fuse(ranking, self.bm25.search(texts, self.depth), self.fused_depth)


def write_results(args: argparse.Namespace, blocks: Iterable[list[Query]], retriever: Retriever, file: IO) -> None:
    """Search the queries block by block, and write what is found; rank 0 writes."""
    format_hits = FORMATS[args.format]
    score_name = "score" if args.hybrid_bm25 else "cosine"
    for block in blocks:
        row_of = {}  # of each different query; one on several lines is encoded and searched once
        places = []
        for query in block:
            if not query.is_malformed and query.text not in row_of:
                row_of[query.text] = len(row_of)
                places.append(query.place)
        ranking = retriever.search(list(row_of), places) if row_of else None
        if RANK:
            continue
        for query in block:
            if query.is_malformed:
                file.write(format_no_answer(args.format, query))
                continue
            row = row_of[query.text]
            ranking_of_query = Ranking(*(column[row : row + 1] for column in ranking))
            hits, = hits_of(ranking_of_query, retriever.documents, [args.recall_num], args.distinct)
            file.write(format_hits(query, hits, score_name))
        file.flush()


def format_tsv(query: Query, hits: Sequence[Hit], score_name: str) -> str:
    """Return a line for each hit: query, document and score."""
    return "".join(f"{query.text}\t{hit.document}\t{hit.score}\n" for hit in hits)


def format_jsonl(query: Query, hits: Sequence[Hit], score_name: str) -> str:
    """Return a line: an object with the query and its hits."""
    fields: dict[str, Any] = {"query": query.text}
    if query.id:
        fields["id"] = query.id
    fields["results"] = [_hit_as_json(rank, hit, score_name) for rank, hit in enumerate(hits, 1)]
    return console.line("jsonl", **fields)


def _hit_as_json(rank: int, hit: Hit, score_name: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"rank": rank, "line": hit.line}
    if hit.id:
        fields["id"] = hit.id
    fields["document"] = hit.document
    if hit.passage:
        fields["passage"] = hit.passage
    fields[score_name] = hit.score
    return fields


def format_trec(query: Query, hits: Sequence[Hit], score_name: str) -> str:
    """Return a line of a TREC run for each hit.

    Raises:
        InputError: an id has white space, which separates the columns; or a document has no id and, in a collection
            that was opened without its corpus, no line either.
    """
    query_id = query.id or query.place.rsplit(":", 1)[-1]
    lines = []
    for rank, hit in enumerate(hits, 1):
        if hit.id is None and hit.line is None:
            raise console.InputError("--format trec: a document has no id in the collection, and its line is not known "
                                     "without the corpus; add --corpus_file")
        fields = [query_id, "Q0", hit.id or str(hit.line), str(rank), str(hit.score), "simcse"]
        if any(len(field.split()) != 1 for field in fields):
            raise console.InputError(f"--format trec: white space separates its columns, and is in an id: {fields[:3]}")
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)


FORMATS: dict[str, Callable[[Query, Sequence[Hit], str], str]] = {
    "tsv": format_tsv,
    "jsonl": format_jsonl,
    "trec": format_trec,
}


def format_no_answer(form: str, query: Query) -> str:
    """Return the line that answers a malformed line of stdin."""
    if form == "jsonl":
        return console.line("jsonl", query=query.text, results=[])
    return console.line("tsv", query=query.text, document=None, cosine=None)


@contextlib.contextmanager
def open_output(args: argparse.Namespace) -> Iterator[IO]:
    """Open the result, which takes the place of an earlier one when all is written; stdout for --query."""
    if args.query or RANK:
        yield sys.stdout
        return
    path = result_path(args)
    with new_file(path, flag="--recall_result_file") as file:
        yield file
    console.log(f"wrote {path}")


def result_path(args: argparse.Namespace) -> str:
    """Return the file of the result."""
    return os.path.join(args.recall_result_dir, args.recall_result_file)


# ---------------------------------------------------------------------------------------------------------------- main
def check_packages(args: argparse.Namespace) -> None:
    """Raise an error if a package that the flags, or the kept index, need is missing."""
    engine = engine_in_use(args)
    if engine in ENGINES:  # a damaged manifest is reported when the index is opened
        check_installed(engine)
    if args.hybrid_bm25:
        import simcse.index.bm25  # noqa: F401  it imports packages, one of which may be missing


def set_precision(args: argparse.Namespace) -> None:
    """Replace --precision auto by the precision of the kept index, if there is one."""
    if args.precision == "auto" and args.index_path:
        args.precision = ann_util.query_precision(args.index_path, args.device)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError, before anything takes time, where the result or the index cannot be written."""
    if not args.query:  # whose answers go to stdout
        check_writable(result_path(args), "--recall_result_file")
        check_not_input(result_path(args), "--recall_result_file", {
            "--corpus_file": args.corpus_file, "--query_file": args.query_file,
            "--similar_text_pair": args.similar_text_pair, "--calibration_file": args.calibration_file,
            "--params_path": args.params_path})
    if args.index_path and args.corpus_file and not os.path.isdir(args.index_path):
        check_writable(args.index_path, "--index_path", is_folder=True)


def check_trec_ids(args: argparse.Namespace, corpus: textfile.Corpus | None, queries: Sequence[Query]) -> None:
    """Refuse ids with white space, which separates the columns of a TREC run, before anything takes time."""
    if args.format != "trec" or RANK:
        return
    places = [query.place for query in queries if query.id is not None and len(query.id.split()) != 1]
    if corpus is not None and corpus.has_ids:
        places += [corpus.place(row) for row, id in enumerate(corpus.all_ids()) if len(id.split()) != 1]
    if places:
        ids = "an id has" if len(places) == 1 else f"{len(places):,} ids have"
        raise console.InputError(f"--format trec: {ids} white space, which separates its columns: "
                                 f"{console.some(places, 3)}; give other ids, or --format jsonl")


def announce(args: argparse.Namespace, corpus: textfile.Corpus | None, queries: list[Query]) -> None:
    """Log what is about to be done."""
    if args.ann_engine == "milvus":
        target = f"the collection {args.milvus_collection} in {args.milvus_uri}"
    elif args.index_path and os.path.exists(args.index_path):
        target = args.index_path
    else:
        target = args.ann_engine or DEFAULT_ENGINE
    if corpus is None:
        source = f"index {args.index_path}" if args.index_path else target
    else:
        with_ids = " with ids" if corpus.has_ids else ""
        source = f"{console.count(len(corpus), 'document')}{with_ids} for {target}"
    asked = "queries of stdin" if is_streamed(args) else console.count(len(queries), "query")
    if any(query.id is not None for query in queries[:1]):
        asked += " with ids"
    flags.announce(args, args.params_path, source, asked)


def texts_to_encode(args: argparse.Namespace, corpus: textfile.Corpus | None,
                    queries: Sequence[Query]) -> "list[TextSource]":
    """Return the files on which int8 is compared with fp32; --query is left out, as few texts say little."""
    from simcse.encoder.int8_check import TextSource

    sources = []
    if corpus is not None:
        sources.append(TextSource(args.corpus_file, corpus))
    if not args.query:
        path = args.query_file or args.similar_text_pair
        sources.append(TextSource(path, [query.text for query in queries]))
    return sources


def main() -> None:
    args = parse_args()
    check_outputs(args)
    corpus = read_corpus(args)
    queries = read_queries(args, corpus)
    check_trec_ids(args, corpus, queries)
    check_packages(args)
    set_precision(args)
    announce(args, corpus, queries)

    import model

    encoder = model.load_encoder_for(args, texts_to_encode(args, corpus, queries))
    index, documents = open_or_build_index(args, corpus, encoder)
    warn_small_corpus(args, documents)
    retriever = Retriever(args, encoder, index, documents)
    with open_output(args) as file:
        write_results(args, read_blocks(args, queries), retriever, file)
    index.close()


if __name__ == "__main__":
    console.run(main)
