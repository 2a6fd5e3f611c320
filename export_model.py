"""Export a checkpoint: as a static graph for Paddle Inference, onnxruntime or OpenVINO, or for sentence-transformers.

    python export_model.py --params_path checkpoints/model_900 --output_path ./output
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_onnx --format onnx
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_int8 --format openvino \
        --precision int8 --calibration_file recall/corpus.csv
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_st --format sentence_transformers

Writes the graph with its weights, the tokenizer and simcse_config.json: all that deploy/python/predict.py needs. Of a
network without layers (pooling first_avg) it writes a table as well, with which deploy/serving answers sooner. Before
the folder appears, the exported graph's embeddings are compared with the network's. The int8 graph is the one that
recall.py, inference.py and predict.py keep beside the checkpoint; it is made there if there is none.

--format sentence_transformers writes no graph, but a folder in the layout of Hugging Face, which sentence-transformers
and what builds on it load. Its embeddings are compared in the same way.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from simcse import console, flags
from simcse.encoder import sentence_transformers_export as export
from simcse.encoder.weights import ONNX_FILE, OPENVINO_FILE, OPSET, WEIGHT_FILES, read_record, write_record
from simcse.files import check_writable
from simcse.index.manifest import MANIFEST_FILE
from simcse.text.prefixes import Prefixes
from simcse.text.tokens import make_batches
from simcse.text.wordpiece import RustTokenizer, WordPiece, load_tokenizer

import numpy as np

if TYPE_CHECKING:
    from model import LoadedModel  # imports paddle

# Short, long, more than one batch and more than one length: what is exported has to bear all of them.
CHECK_TEXTS = ["语义索引", flags.README_TEXT, "SimCSE", flags.README_TEXT * 3, "中西方语言与文化的差异",
               "C++ ≠ C～, ①℃ [SEP]"]
CHECK_LENGTH = 64  # tokens of a text, at most
TOLERANCE = 1e-5
# Files of folders that are no exports, and would be damaged.
OTHER_FOLDERS = (*WEIGHT_FILES, "pytorch_model.bin", MANIFEST_FILE)
Embed = Callable[[np.ndarray, np.ndarray], Any]  # input_ids, token_type_ids -> embeddings


# -------------------------------------------------------------------------------------------------------- the formats
def write_paddle(args: argparse.Namespace, loaded: "LoadedModel", folder: str) -> None:
    """Write the static graph of paddle; of a network without layers, its table as well."""
    from simcse.encoder.paddle_engine import export_graph
    from simcse.encoder.table import write_table

    export_graph(loaded.model, folder)
    graph_record = read_record(folder)  # write_table writes another one
    has_table = write_table(loaded.model, folder)
    write_beside_graph(args, loaded, folder, {**graph_record, "table": has_table})


def open_paddle(folder: str) -> Embed:
    """Open the graph in a folder by Paddle Inference."""
    from simcse.encoder.paddle_engine import PaddleEngine

    return PaddleEngine(folder, "fp32").embed


def write_onnx(args: argparse.Namespace, loaded: "LoadedModel", folder: str) -> None:
    """Write the graph as ONNX."""
    from simcse.encoder.onnx import export_onnx

    export_onnx(loaded.model, folder)
    write_beside_graph(args, loaded, folder, read_record(folder))


def open_onnx(folder: str) -> Embed:
    """Open the graph in a folder by onnxruntime."""
    from simcse.encoder.onnx import onnx_graph

    return onnx_graph(folder)


def write_openvino(args: argparse.Namespace, loaded: "LoadedModel", folder: str) -> None:
    """Write the graph for OpenVINO, in the --precision that is asked for."""
    if args.precision == "int8":
        write_int8_graph(args, folder)
    else:
        from simcse.encoder.openvino import export_openvino

        export_openvino(loaded.model, folder)
    write_beside_graph(args, loaded, folder, read_record(folder))


def open_openvino(folder: str) -> Embed:
    """Open the graph in a folder by OpenVINO."""
    from simcse.encoder.openvino import OpenVinoEngine

    return OpenVinoEngine(folder, "fp32").embed


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


def write_beside_graph(args: argparse.Namespace, loaded: "LoadedModel", folder: str,
                       graph_record: Mapping[str, Any]) -> None:
    """Write what a graph needs beside it: simcse_config.json and the tokenizer.

    Args:
        graph_record: what simcse_config.json says of the graph.
    """
    from simcse.encoder.weights import model_digest

    # A server compares the digest with that of an index, to know that both are of the same model.
    digest = model_digest(args.params_path, args.model_name_or_path)
    write_record(folder, {**loaded.record, "model": digest, **graph_record}, loaded.tokenizer)
    write_tokenizer(loaded.tokenizer, folder)


def write_tokenizer(tokenizer: Any, folder: str) -> None:
    """Write tokenizer.json, which deploy/python reads, if the tokenizer is of that kind."""
    if isinstance(tokenizer, WordPiece):
        tokenizer.save_rust(folder)
    elif not isinstance(tokenizer, RustTokenizer):  # which has written it with the checkpoint's files
        console.warn("the encoder's tokenizer is not ERNIE's or BERT's: deploy/python cannot read it; deploy/serving "
                     "can")


def write_sentence_transformers(args: argparse.Namespace, loaded: "LoadedModel", folder: str) -> None:
    """Write the network and its tokenizer for sentence-transformers."""
    # The checkpoint may have had no record before.
    export.check_supported(loaded.record, f"--params_path {args.params_path}")
    settings = export.ExportSettings(args.max_seq_length, Prefixes.from_record(loaded.record))
    export.export_sentence_transformers(loaded.model, loaded.tokenizer, folder, settings)
    if load_tokenizer(folder)(CHECK_TEXTS, CHECK_LENGTH) != loaded.tokenizer(CHECK_TEXTS, CHECK_LENGTH):
        raise console.InputError("the exported tokenizer gives other tokens than the checkpoint's; nothing was written")


class Format(NamedTuple):
    """What --format can ask for.

    Attributes:
        help: what is written, for the help of --format.
        files: names that only folders of this format have; those of an older folder are not kept.
        write: writes a checkpoint to a folder: the flags, what was loaded, the folder.
        open: opens what `write` wrote in a folder, to compute in fp32.
        packages: what writes and runs it, besides paddle; requirements-<format>.txt has them.
        check_record: refuses a checkpoint by its record, before any work; its arguments are the record, and what names
            the checkpoint in messages.
    """

    help: str
    files: tuple[str, ...]
    write: Callable[[argparse.Namespace, "LoadedModel", str], None]
    open: Callable[[str], Embed]
    packages: tuple[str, ...] = ()
    check_record: Callable[[Mapping[str, Any], str], None] | None = None


FORMATS = {
    "paddle": Format("inference.json and inference.pdiparams",
                     ("inference.json", "inference.pdmodel", "inference.pdiparams"), write_paddle, open_paddle),
    "onnx": Format(f"{ONNX_FILE} instead, float32, opset {OPSET} (requirements-onnx.txt, paddlepaddle 3)",
                   (ONNX_FILE,), write_onnx, open_onnx, packages=("paddle2onnx", "onnxruntime")),
    "openvino": Format(f"{OPENVINO_FILE} and inference.bin, for a CPU (requirements-openvino.txt, paddlepaddle 3)",
                       (OPENVINO_FILE, "inference.bin"), write_openvino, open_openvino,
                       packages=("paddle2onnx", "openvino")),
    "sentence_transformers": Format("a folder that sentence-transformers loads, of an ERNIE or BERT encoder and a "
                                    "pooling that sentence-transformers has", export.FILES,
                                    write_sentence_transformers, export.open_sentence_transformers,
                                    check_record=export.check_supported)}


# --------------------------------------------------------------------------------------------------------- the program
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
    """Check, before any work, that --format can be written to --output_path.

    Raises:
        InputError: the path is no folder, cannot be made, or has files of another format; a package is missing; or the
            format cannot be of this checkpoint.
    """
    path = args.output_path
    check_writable(path, "--output_path", is_folder=True)
    format_of_file = {name: key for key, kind in FORMATS.items() for name in kind.files}
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        if format_of_file.get(name, args.format) != args.format:
            raise console.InputError(f"--output_path {path}: holds {name}, which is not of --format {args.format}; "
                                     "name another folder")
        if name in OTHER_FOLDERS or (name == "model.safetensors" and not export.is_export(path)):
            raise console.InputError(f"--output_path {path}: holds {name}, so it is a checkpoint, an encoder or an "
                                     "index; name another folder")
    kind = FORMATS[args.format]
    console.check_installed(f"--format {args.format}", f"requirements-{args.format}.txt", *kind.packages)
    if kind.check_record:
        kind.check_record(flags.read_checkpoint_record(args), f"--params_path {args.params_path}")


def check_embeddings(loaded: "LoadedModel", embed: Embed) -> float:
    """Return the largest difference between the exported embeddings and the network's.

    Raises:
        InputError: it is larger than TOLERANCE.
    """
    largest = 0.0
    ids = loaded.tokenizer(CHECK_TEXTS, min(CHECK_LENGTH, loaded.model.max_positions))
    for _, *batch in make_batches(ids, loaded.tokenizer.pad_token_id, batch_size=2):
        difference = float(abs(loaded.model.embed(*batch).numpy() - np.asarray(embed(*batch))).max())
        if not difference <= TOLERANCE:  # NaN neither
            raise console.InputError(f"the exported embeddings differ from the checkpoint's by {difference:.2g}, more "
                                     f"than {TOLERANCE:g}; nothing was written")
        largest = max(largest, difference)
    return largest


def main() -> None:
    args = parse_args()
    check_output(args)
    flags.announce(args, f"{args.params_path} to {args.output_path}")

    from model import load_model
    from simcse.device import set_device
    from simcse.files import name_output, new_folder

    set_device("cpu")
    loaded = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    kind = FORMATS[args.format]
    with name_output(args.output_path, "--output_path"), new_folder(args.output_path, kind.files) as folder:
        kind.write(args, loaded, folder)
        if args.precision == "int8":  # was compared with the network when it was made
            cosines = read_record(folder)["int8_cosines"]
            result = f"cosine of int8 to fp32 {cosines['mean']:.4f} on the mean, {cosines['lowest']:.4f} at lowest"
        else:
            difference = check_embeddings(loaded, kind.open(folder))
            result = f"largest difference to the checkpoint's embeddings {difference:.2g}"
    console.log(f"exported {args.params_path} to {args.output_path}; {result}")


if __name__ == "__main__":
    console.run(main)
