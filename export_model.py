"""Export a checkpoint as a static graph for Paddle Inference, onnxruntime or OpenVINO.

    python export_model.py --params_path checkpoints/model_900 --output_path ./output
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_onnx --format onnx
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_int8 --format openvino \
        --precision int8 --calibration_file recall/corpus.csv

Writes the graph with its weights, the tokenizer and simcse_config.json: all that deploy/python/predict.py needs; of
pooling first_avg a table as well, with which deploy/serving answers sooner. The exported graph is run against the
dynamic one before the folder appears. The int8 graph is that which recall.py, inference.py and predict.py use with
--precision int8, beside the checkpoint, and is made there where there is none.
"""

import argparse
import os
import shutil

from simcse import console, flags
from simcse.encoder.weights import ONNX_FILE, OPENVINO_FILE, OPSET
from simcse.text.tokens import make_batches
from simcse.text.wordpiece import WordPiece

# Short, long, more than one batch and more than one length: what the dynamic axes of the graph have to bear.
CHECK_TEXTS = ["语义索引", flags.README_TEXT, "SimCSE", flags.README_TEXT * 3, "中西方语言与文化的差异"]
TOLERANCE = 1e-5
NEEDS = {"paddle": (), "onnx": ("paddle2onnx", "onnxruntime"), "openvino": ("paddle2onnx", "openvino")}
ENDINGS = {"paddle": ("json", "pdmodel", "pdiparams"), "onnx": ("onnx",), "openvino": ("xml", "bin")}


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_model_arguments(parser, params_path=flags.DEFAULT_PARAMS)
    parser.add_argument("--output_path", default="./output",
                        help="folder to write; files of the same names are replaced")
    parser.add_argument("--format", choices=tuple(ENDINGS), default="paddle",
                        help=f"paddle: inference.json and inference.pdiparams; onnx: {ONNX_FILE} instead, float32, "
                        f"opset {OPSET} (requirements-onnx.txt, paddlepaddle 3); openvino: {OPENVINO_FILE} and "
                        "inference.bin, for a CPU (requirements-openvino.txt, paddlepaddle 3)")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32",
                        help="number format of the exported matrix products; int8 is for --format openvino")
    flags.add_calibration_argument(parser)
    args = parser.parse_args()
    if args.precision == "int8" and args.format != "openvino":
        parser.error("--precision int8 needs --format openvino")
    return flags.check_arguments(parser, argparse.Namespace(**vars(args), device="cpu", cpu_threads=0, batch_size=None))


def check_output(args: argparse.Namespace) -> None:
    """Before any work: refuse an output path where the export would be no folder, or one of two graphs, and a format
    without what writes and runs it."""
    path = args.output_path
    if os.path.exists(path) and not os.path.isdir(path):
        raise console.InputError(f"--output_path {path}: exists and is not a folder")
    for name in os.listdir(path) if os.path.isdir(path) else ():
        if name.startswith("inference.") and name.split(".")[-1] not in ENDINGS[args.format]:
            raise console.InputError(f"--output_path {path}: holds {name}, which is not of --format {args.format}; "
                                     "name another folder")
    console.check_installed(f"--format {args.format}", f"requirements-{args.format}.txt", *NEEDS[args.format])


def check_graph(model, tokenizer, graph) -> float:
    """The largest difference of the embeddings that an exported graph gives of input_ids and token_type_ids to the
    network's; InputError where it is larger than TOLERANCE."""
    ids = tokenizer(CHECK_TEXTS, 64)
    difference = max(float(abs(model.embed(*batch).numpy() - graph(*batch)).max())
                     for _, *batch in make_batches(ids, tokenizer.pad_token_id, batch_size=2))
    if not difference <= TOLERANCE:
        raise console.InputError(f"the exported graph differs from the dynamic one by {difference:.2g}, more than "
                                 f"{TOLERANCE:g}; nothing was written")
    return difference


def write_graph(args: argparse.Namespace, model, folder: str):
    """Write the graph that is asked for to a folder; returns it, as a function of input_ids and token_type_ids."""
    from simcse.encoder import engine

    if args.format == "onnx":
        from simcse.encoder.onnx import export_onnx, onnx_graph

        export_onnx(model, folder)
        return onnx_graph(folder)
    if args.format == "paddle":
        engine.export_graph(model, folder)
        return engine.CpuEngine(folder).embed
    if args.precision == "int8":
        from model import load_encoder_for

        load_encoder_for(args)  # makes the one that is kept beside the checkpoint, where there is none
        shutil.copytree(engine.KeptGraph(args).folder, folder, ignore=shutil.ignore_patterns("fingerprint.json"),
                        dirs_exist_ok=True)
    else:
        from simcse.encoder.openvino import export_openvino

        export_openvino(model, folder)
    return engine.OpenVinoEngine(folder, args.precision).embed


def main() -> None:
    args = parse_args()
    check_output(args)
    flags.announce(args, f"{args.params_path} to {args.output_path}")

    from model import load_model
    from simcse.device import set_device
    from simcse.encoder.table import TableEngine
    from simcse.encoder.weights import model_digest, read_record, write_record
    from simcse.files import new_folder

    set_device("cpu")
    model, tokenizer, record = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    # By its digest a server knows the indexes that are of this model.
    record["model"] = model_digest(args.params_path, args.model_name_or_path)
    with new_folder(args.output_path) as folder:
        graph = write_graph(args, model, folder)
        record.update(read_record(folder))
        if args.format == "paddle":
            record["table"] = TableEngine.write(model, folder)
        write_record(folder, record, tokenizer)
        if isinstance(tokenizer, WordPiece):
            tokenizer.save_rust(folder)
        else:
            console.warn("the encoder's tokenizer is not ERNIE's or BERT's: deploy/python cannot read it; "
                         "deploy/serving can")
        if args.precision == "int8":
            cosines = record["int8_cosines"]
            found = f"cosine of int8 to fp32 {cosines['mean']:.4f} on the mean, {cosines['lowest']:.4f} at lowest"
        else:
            found = f"largest difference to the dynamic graph {check_graph(model, tokenizer, graph):.2g}"
    console.log(f"exported {args.params_path} to {args.output_path}; {found}")


if __name__ == "__main__":
    console.run(main)
