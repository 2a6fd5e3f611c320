"""Open what the flags of server.py name: the exported model, the index and its BM25."""

import argparse
import dataclasses
import os
from typing import Any

import ann_util
from deploy.python import predictor
from deploy.serving.searcher import Searcher
from deploy.serving.shapes import BatchShapes, choose_shapes
from simcse.console import InputError, log, warn
from simcse.encoder.encoder import Encoder
from simcse.encoder.weights import CONFIG_FILE, read_record
from simcse.index.documents import Documents
from simcse.index.engines import check_installed
from simcse.index.manifest import REBUILD, Manifest
from simcse.index.milvus import MilvusIndex
from simcse.index.protocols import DocumentStore, VectorIndex
from simcse.text.prefixes import Prefixes
from simcse.text.wordpiece import load_tokenizer


def open_searcher(args: argparse.Namespace) -> Searcher:
    """Open the model and the index.

    Raises:
        InputError: there is no exported model or no index, or the index is of another model.
    """
    record = read_record(args.model_dir)
    if not record:
        raise InputError(f"--model_dir {args.model_dir}: no {CONFIG_FILE}; export_model.py writes one with --format "
                         "paddle, onnx and openvino")
    if not record.get("model"):
        raise InputError(f"--model_dir {args.model_dir}: {CONFIG_FILE} does not name the checkpoint; export it again")
    wanted = Manifest(model=record["model"], calibration=record.get("calibration", {}).get("sha256"))
    if args.index_path:
        manifest = ann_util.read_manifest(args.index_path, wanted)
        manifest.warn_other_calibration(wanted, f"--index_path {args.index_path}", REBUILD)
        check_installed(manifest.ann_engine)
        encoder, shapes = open_encoder(args, manifest)
        index, documents = ann_util.load_index(args.index_path, manifest, threads=args.cpu_threads)
        bm25 = open_bm25(args.index_path, documents, manifest.corpus)
    else:
        index, documents = open_collection(args, wanted)
        encoder, shapes = open_encoder(args, index.manifest)
        bm25 = None
    searcher = Searcher(encoder, index, documents, shapes, distinct=args.distinct, bm25=bm25,
                        whitened=record.get("whitened_at") is not None)
    searcher.warm_up()
    return searcher


def open_collection(args: argparse.Namespace, wanted: Manifest) -> tuple[VectorIndex, DocumentStore]:
    """Open the collection of Milvus."""
    check_installed("milvus")
    if args.max_top_k > MilvusIndex.max_k:
        raise InputError(f"--max_top_k {args.max_top_k}: Milvus gives at most {MilvusIndex.max_k}")
    wanted = dataclasses.replace(wanted, search_settings=args.milvus_index_params)
    return ann_util.open_collection(args.milvus_uri, args.milvus_collection, wanted)


def open_bm25(index_path: str, documents: Documents, corpus: str | None) -> Any:
    """Open the BM25 index in an index folder; None: recall.py was not run with --hybrid_bm25.

    Args:
        corpus: SHA-256 of the file of the documents.
    """
    if not os.path.isdir(os.path.join(index_path, ann_util.BM25_FOLDER)):
        return None
    bm25 = ann_util.build_or_open_bm25(documents, corpus, index_path)
    bm25.search(["语义检索"], 1)  # so that no request waits while jieba reads its dictionary
    return bm25


def open_encoder(args: argparse.Namespace, manifest: Manifest) -> tuple[Encoder, BatchShapes]:
    """Load the exported model, for texts as long as those of the index; return it with the shapes of its batches.

    Queries get the prefix of --query_prefix or the one that the model records, documents that of the index.
    """
    weights = sum(file.stat().st_size for file in os.scandir(args.model_dir) if file.name.startswith("inference."))
    shapes = choose_shapes(weights, manifest.max_seq_length)
    engine = open_engine(args, manifest.precision, len(shapes.all()))
    tokenizer = load_tokenizer(args.model_dir)
    recorded = Prefixes.from_record(read_record(args.model_dir))
    prefixes = recorded.replaced_by(args.query_prefix, manifest.document_prefix)
    if args.query_prefix is None and recorded.document != prefixes.document:
        warn(f"the index was built with --document_prefix {prefixes.document!r}, and the model records "
             f"{recorded.document!r}; queries get the prefix that the model records, {recorded.query!r}: "
             "--query_prefix names another")
    encoder = Encoder(engine, tokenizer, manifest.max_seq_length, make_batches=shapes.make_batches, prefixes=prefixes)
    return encoder, shapes


def open_engine(args: argparse.Namespace, precision_of_index: str, shapes: int) -> Any:
    """Load what runs the exported model: on a CPU its table, where it has one, else the runtime of its graph.

    Args:
        precision_of_index: the default of --precision, or the nearest to it that the model can run in.
        shapes: number of batch shapes for which oneDNN keeps kernels.
    """
    precision = args.precision or choose_precision(args, precision_of_index)
    has_table = read_record(args.model_dir).get("table")
    if has_table and args.device == "cpu" and precision == "fp32":
        from simcse.encoder.table import TableEngine

        return TableEngine(args.model_dir)
    try:
        engine = predictor.load_predictor(args.model_dir, device=args.device, precision=precision,
                                          cpu_threads=args.cpu_threads, onednn_shapes=shapes)
    except predictor.InputError as error:
        message = str(error)
        if not args.precision and message.startswith("--precision"):
            message += "; the index was made in this precision, --precision names another"
        raise InputError(message) from None
    if engine.calibration:
        log(f"{precision} graph {engine.calibration}")
    return engine


def choose_precision(args: argparse.Namespace, precision_of_index: str) -> str:
    """Return the precision of the index, or fp32 where the model cannot run in it but gives much the same vectors."""
    graph = predictor.find_graph(args.model_dir)
    if precision_of_index == "tf32":
        return "fp32"
    if precision_of_index == "fp16" and args.device == "cpu":
        return "fp32"
    if precision_of_index != "int8" and graph == predictor.ONNX_FILE:
        return "fp32"
    return precision_of_index
