"""Export a checkpoint as a static graph for Paddle Inference or onnxruntime.

    python export_model.py --params_path checkpoints/model_900 --output_path ./output
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_onnx --format onnx

Writes the graph with its weights, the tokenizer and simcse_config.json; deploy/python/predict.py needs nothing else.
The exported graph is run against the dynamic one before the folder appears.
"""

import argparse
import os

import cli
import console
from deploy.python.onnx_predictor import ONNX_FILE, OPSET, OnnxPredictor, check_packages, export_onnx
from index_store import model_digest

# Short, long, more than one batch and more than one length: what the dynamic axes of the graph have to bear.
CHECK_TEXTS = ["语义索引", cli.README_TEXT, "SimCSE", cli.README_TEXT * 3, "中西方语言与文化的差异"]
TOLERANCE = 1e-5


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_model_arguments(parser, params_path=cli.DEFAULT_PARAMS)
    parser.add_argument("--output_path", default="./output",
                        help="folder to write; files of the same names are replaced")
    parser.add_argument("--format", choices=("paddle", "onnx"), default="paddle",
                        help=f"paddle: inference.json and inference.pdiparams; onnx: {ONNX_FILE} instead, float32, "
                        f"opset {OPSET} (requirements-onnx.txt, paddlepaddle 3)")
    return parser.parse_args()


def check_folder(args: argparse.Namespace) -> None:
    """Refuse an output path where the export would be no folder, or one of two graphs."""
    path = args.output_path
    if os.path.exists(path) and not os.path.isdir(path):
        raise console.InputError(f"--output_path {path}: exists and is not a folder")
    for name in os.listdir(path) if os.path.isdir(path) else ():
        if name.startswith("inference.") and (name == ONNX_FILE) != (args.format == "onnx"):
            raise console.InputError(f"--output_path {path}: holds {name}, which is not of --format {args.format}; "
                                     "name another folder")


def main() -> None:
    args = parse_args()
    check_folder(args)
    if args.format == "onnx":
        check_packages()
    cli.announce(argparse.Namespace(device="cpu"), f"{args.params_path} to {args.output_path}")

    from checkpoint import new_folder
    from deploy.python.predictor import Predictor, export_graph
    from loading import load_model, write_record
    from model import encode, set_device

    set_device("cpu")
    model, tokenizer, record = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    export, run = {"paddle": (export_graph, Predictor), "onnx": (export_onnx, OnnxPredictor)}[args.format]
    with new_folder(args.output_path) as folder:
        export(model, folder)
        # By this a server knows the indexes that are of this model.
        digest = model_digest(args.params_path, args.model_name_or_path, args.output_emb_size)
        write_record(folder, {**record, "model": digest}, tokenizer)
        predictor = run(folder)
        dynamic, static = (encode(network, tokenizer, CHECK_TEXTS, 64, 2) for network in (model, predictor))
        if not (difference := abs(dynamic - static).max()) <= TOLERANCE:
            raise console.InputError(f"the exported graph differs from the dynamic one by {difference:.2g}, "
                                     f"more than {TOLERANCE:g}; nothing was written")
    console.log(f"exported {args.params_path} to {args.output_path}; largest difference to the dynamic graph "
                f"{difference:.2g}")


if __name__ == "__main__":
    console.run(main)
