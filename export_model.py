"""Export a checkpoint as a static graph for Paddle Inference or onnxruntime.

    python export_model.py --params_path checkpoints/model_900 --output_path ./output
    python export_model.py --params_path checkpoints/model_900 --output_path ./output_onnx --format onnx

Writes the graph with its weights, the tokenizer and simcse_config.json: all that deploy/python/predict.py needs; of
pooling first_avg a table as well, with which deploy/serving answers sooner.
The exported graph is run against the dynamic one before the folder appears.
"""

import argparse
import importlib.util
import os

from data import WordPiece, make_batches
from simcse import console, flags
from simcse.weights import ONNX_FILE, OPSET

# Short, long, more than one batch and more than one length: what the dynamic axes of the graph have to bear.
CHECK_TEXTS = ["语义索引", flags.README_TEXT, "SimCSE", flags.README_TEXT * 3, "中西方语言与文化的差异"]
TOLERANCE = 1e-5


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_model_arguments(parser, params_path=flags.DEFAULT_PARAMS)
    parser.add_argument("--output_path", default="./output",
                        help="folder to write; files of the same names are replaced")
    parser.add_argument("--format", choices=("paddle", "onnx"), default="paddle",
                        help=f"paddle: inference.json and inference.pdiparams; onnx: {ONNX_FILE} instead, float32, "
                        f"opset {OPSET} (requirements-onnx.txt, paddlepaddle 3)")
    return parser.parse_args()


def check_output(args: argparse.Namespace) -> None:
    """Before any work: refuse an output path where the export would be no folder, or one of two graphs, and ONNX
    without what writes and runs it."""
    path = args.output_path
    if os.path.exists(path) and not os.path.isdir(path):
        raise console.InputError(f"--output_path {path}: exists and is not a folder")
    for name in os.listdir(path) if os.path.isdir(path) else ():
        if name.startswith("inference.") and (name == ONNX_FILE) != (args.format == "onnx"):
            raise console.InputError(f"--output_path {path}: holds {name}, which is not of --format {args.format}; "
                                     "name another folder")
    for name in ("paddle2onnx", "onnxruntime") if args.format == "onnx" else ():
        if importlib.util.find_spec(name) is None:
            raise console.InputError(f"ONNX: {name} is not installed; pip install -r requirements-onnx.txt")


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


def main() -> None:
    args = parse_args()
    check_output(args)
    flags.announce(argparse.Namespace(device="cpu"), f"{args.params_path} to {args.output_path}")

    from model import load_model
    from simcse import engine
    from simcse.files import new_folder
    from simcse.ranks import set_device
    from simcse.weights import model_digest, write_record

    set_device("cpu")
    model, tokenizer, record = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    # By its digest a server knows the indexes that are of this model.
    record["model"] = model_digest(args.params_path, args.model_name_or_path)
    with new_folder(args.output_path) as folder:
        if args.format == "onnx":
            engine.export_onnx(model, folder)
            graph = engine.onnx_graph(folder)
        else:
            engine.export_graph(model, folder)
            record["table"] = engine.TableEngine.write(model, folder)
            graph = engine.CpuEngine(folder).embed
        write_record(folder, record, tokenizer)
        if isinstance(tokenizer, WordPiece):
            tokenizer.save_rust(folder)
        else:
            console.warn("the encoder's tokenizer is not ERNIE's or BERT's: deploy/python cannot read it; "
                         "deploy/serving can")
        difference = check_graph(model, tokenizer, graph)
    console.log(f"exported {args.params_path} to {args.output_path}; largest difference to the dynamic graph "
                f"{difference:.2g}")


if __name__ == "__main__":
    console.run(main)
