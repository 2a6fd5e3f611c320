"""Export a checkpoint as a static graph for Paddle Inference.

    python export_model.py --params_path checkpoints/model_900 --output_path ./output

Writes the graph, its weights, the tokenizer and simcse_config.json; deploy/python/predict.py needs nothing else. The
exported graph is run against the dynamic one before the folder appears.
"""

import argparse
import os

import cli
import console

# Short, long, more than one batch and more than one length: what the dynamic axes of the graph have to bear.
CHECK_TEXTS = ["语义索引", cli.README_TEXT, "SimCSE", cli.README_TEXT * 3, "中西方语言与文化的差异"]
TOLERANCE = 1e-5


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_model_arguments(parser, params_path=cli.DEFAULT_PARAMS)
    parser.add_argument("--output_path", default="./output",
                        help="folder to write; files of the same names are replaced")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if os.path.exists(args.output_path) and not os.path.isdir(args.output_path):
        raise console.InputError(f"--output_path {args.output_path}: exists and is not a folder")
    cli.announce(argparse.Namespace(device="cpu"), f"{args.params_path} to {args.output_path}")

    from deploy.python.predictor import Predictor, export_graph
    from model import encode, load_model, new_folder, set_device, write_record

    set_device("cpu")
    model, tokenizer, record = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    with new_folder(args.output_path) as folder:
        export_graph(model, folder)
        write_record(folder, record, tokenizer)
        predictor = Predictor(folder)
        dynamic, static = (encode(network, tokenizer, CHECK_TEXTS, 64, 2) for network in (model, predictor))
        if not (difference := abs(dynamic - static).max()) <= TOLERANCE:
            raise console.InputError(f"the exported graph differs from the dynamic one by {difference:.2g}, "
                                     f"more than {TOLERANCE:g}; nothing was written")
    console.log(f"exported {args.params_path} to {args.output_path}; largest difference to the dynamic graph "
                f"{difference:.2g}")


if __name__ == "__main__":
    console.run(main)
