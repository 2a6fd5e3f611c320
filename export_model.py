"""Export a checkpoint as a static graph for Paddle Inference, onnxruntime or OpenVINO.

    python export_model.py --params_path checkpoints/model_900 --output_path ./output
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_onnx --format onnx
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_int8 --format openvino \
        --precision int8 --calibration_file recall/corpus.csv

Writes the graph with its weights, the tokenizer and simcse_config.json: all that deploy/python/predict.py needs. Of a
network without layers (pooling first_avg) it writes a table as well, with which deploy/serving answers sooner. Before
the folder appears, the exported graph's embeddings are compared with the network's. The int8 graph is the one that
recall.py, inference.py and predict.py keep beside the checkpoint; it is made there if there is none.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from simcse import console, flags
from simcse.encoder.weights import ONNX_FILE, OPENVINO_FILE, OPSET
from simcse.files import check_writable
from simcse.text.tokens import make_batches
from simcse.text.wordpiece import RustTokenizer, WordPiece

import numpy as np

# Short, long, more than one batch and more than one length: the graph has to bear all of them.
CHECK_TEXTS = ["语义索引", flags.README_TEXT, "SimCSE", flags.README_TEXT * 3, "中西方语言与文化的差异"]
TOLERANCE = 1e-5


class Format(NamedTuple):
    """A kind of graph.

    Attributes:
        help: what is written, for the help of --format.
        endings: of the files inference.<ending> that it may write.
        packages: what writes and runs it, besides paddle; requirements-<format>.txt has them.
    """

    help: str
    endings: tuple[str, ...]
    packages: tuple[str, ...] = ()


FORMATS = {
    "paddle": Format("inference.json and inference.pdiparams", ("json", "pdmodel", "pdiparams")),
    "onnx": Format(f"{ONNX_FILE} instead, float32, opset {OPSET} (requirements-onnx.txt, paddlepaddle 3)", ("onnx",),
                   ("paddle2onnx", "onnxruntime")),
    "openvino": Format(f"{OPENVINO_FILE} and inference.bin, for a CPU (requirements-openvino.txt, paddlepaddle 3)",
                       ("xml", "bin"), ("paddle2onnx", "openvino"))}


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_model_arguments(parser, params_path=flags.DEFAULT_PARAMS)
    parser.add_argument("--output_path", default="./output",
                        help="folder to write; files of the same names are replaced")
    parser.add_argument("--format", choices=tuple(FORMATS), default="paddle",
                        help="; ".join(f"{name}: {kind.help}" for name, kind in FORMATS.items()))
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32",
                        help="number format of the exported matrix products; int8 needs --format openvino")
    flags.add_calibration_argument(parser)
    parser.set_defaults(device="cpu", cpu_threads=0)  # of all stages this one has no --device: it exports on a CPU
    args = parser.parse_args()
    if args.precision == "int8" and args.format != "openvino":
        parser.error("--precision int8 needs --format openvino")
    flags.set_max_seq_length(args)
    flags.check_arguments(parser, args)
    return args


def check_output(args: argparse.Namespace) -> None:
    """Check, before any work, that --output_path can be a folder of this --format, and that its packages are installed.

    Raises:
        InputError: the path is no folder, cannot be made, or has a graph of another format; or a package is missing.
    """
    path = args.output_path
    check_writable(path, "--output_path", is_folder=True)
    for name in os.listdir(path) if os.path.isdir(path) else ():
        if name.startswith("inference.") and name.split(".")[-1] not in FORMATS[args.format].endings:
            raise console.InputError(f"--output_path {path}: holds {name}, which is not of --format {args.format}; "
                                     "name another folder")
    console.check_installed(f"--format {args.format}", f"requirements-{args.format}.txt",
                            *FORMATS[args.format].packages)


def write_graph(args: argparse.Namespace, model, folder: str) -> None:
    """Write the graph that --format and --precision ask for to a folder."""
    if args.format == "paddle":
        from simcse.encoder.paddle_engine import export_graph

        export_graph(model, folder)
    elif args.format == "onnx":
        from simcse.encoder.onnx import export_onnx

        export_onnx(model, folder)
    elif args.precision == "int8":
        write_int8_graph(args, folder)
    elif args.format == "openvino":
        from simcse.encoder.openvino import export_openvino

        export_openvino(model, folder)
    else:
        raise ValueError(args.format)


def open_graph(args: argparse.Namespace, folder: str) -> Callable[..., Any]:
    """Open the graph in a folder, in fp32, as a function: input_ids, token_type_ids -> embeddings."""
    if args.format == "paddle":
        from simcse.encoder.paddle_engine import PaddleEngine

        return PaddleEngine(folder, "fp32").embed
    if args.format == "onnx":
        from simcse.encoder.onnx import onnx_graph

        return onnx_graph(folder)
    if args.format == "openvino":
        from simcse.encoder.openvino import OpenVinoEngine

        return OpenVinoEngine(folder, "fp32").embed
    raise ValueError(args.format)


def write_int8_graph(args: argparse.Namespace, folder: str) -> None:
    """Write the int8 graph that is kept beside the checkpoint to a folder.

    Where there is none yet, the network is quantized first, which takes a minute or two, and the graph is kept there.
    """
    from model import Encoder
    from simcse.encoder.int8_check import COMPARISONS_FILE
    from simcse.encoder.kept_graph import FINGERPRINT_FILE, KeptGraph

    # Loading it makes it where it is not there.
    Encoder.load(args.params_path, precision="int8", model_name_or_path=args.model_name_or_path,
                 output_emb_size=args.output_emb_size, calibration_file=args.calibration_file)
    kept = KeptGraph(args.params_path, "int8", args.model_name_or_path, args.calibration_file)
    shutil.copytree(kept.folder, folder, ignore=shutil.ignore_patterns(FINGERPRINT_FILE, COMPARISONS_FILE),
                    dirs_exist_ok=True)


def check_graph(model, tokenizer, graph: Callable[..., Any]) -> float:
    """Return the largest difference between the exported graph's embeddings and the network's.

    Raises:
        InputError: it is larger than TOLERANCE.
    """
    largest = 0.0
    for _, *batch in make_batches(tokenizer(CHECK_TEXTS, 64), tokenizer.pad_token_id, batch_size=2):
        difference = float(abs(model.embed(*batch).numpy() - np.asarray(graph(*batch))).max())
        if not difference <= TOLERANCE:  # NaN neither
            raise console.InputError(f"the exported graph differs from the dynamic one by {difference:.2g}, more than "
                                     f"{TOLERANCE:g}; nothing was written")
        largest = max(largest, difference)
    return largest


def write_tokenizer(tokenizer, folder: str) -> None:
    """Write tokenizer.json, which deploy/python reads, if the tokenizer is of that kind."""
    if isinstance(tokenizer, WordPiece):
        tokenizer.save_rust(folder)
    elif not isinstance(tokenizer, RustTokenizer):  # which has written it with the checkpoint's files
        console.warn("the encoder's tokenizer is not ERNIE's or BERT's: deploy/python cannot read it; deploy/serving "
                     "can")


def main() -> None:
    args = parse_args()
    check_output(args)
    flags.announce(args, f"{args.params_path} to {args.output_path}")

    from model import load_model
    from simcse.device import set_device
    from simcse.encoder.table import write_table
    from simcse.encoder.weights import model_digest, read_record, write_record
    from simcse.files import name_output, new_folder

    set_device("cpu")
    model, tokenizer, record = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    # A server compares the digest with that of an index, to know that both are of the same model.
    record["model"] = model_digest(args.params_path, args.model_name_or_path)
    with name_output(args.output_path, "--output_path"), new_folder(args.output_path) as folder:
        write_graph(args, model, folder)
        record.update(read_record(folder))
        if args.format == "paddle":
            record["table"] = write_table(model, folder)
        write_record(folder, record, tokenizer)
        write_tokenizer(tokenizer, folder)
        if args.precision == "int8":  # was compared with the network when it was made
            cosines = record["int8_cosines"]
            result = f"cosine of int8 to fp32 {cosines['mean']:.4f} on the mean, {cosines['lowest']:.4f} at lowest"
        else:
            difference = check_graph(model, tokenizer, open_graph(args, folder))
            result = f"largest difference to the dynamic graph {difference:.2g}"
    console.log(f"exported {args.params_path} to {args.output_path}; {result}")


if __name__ == "__main__":
    console.run(main)
