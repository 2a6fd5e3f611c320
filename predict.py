"""Cosine similarity of text pairs.

    python predict.py --device cpu --params_path checkpoints/model_900 --text_pair_file recall/test.csv

Prints one cosine a line, in input order, and nothing else, to stdout. The contrastive loss of the pairs, each pair
against the others of its batch, goes to stderr.
"""

import argparse

import cli
import console
import data


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text_pair_file", type=cli.readable_file, required=True,
                        help="two texts, tab-separated, a pair a line")
    cli.add_model_arguments(parser)
    cli.add_encode_arguments(parser)
    parser.add_argument("--margin", type=cli.natural_float, default=0.0, help="margin of the loss, in cosine")
    parser.add_argument("--scale", type=cli.positive_float, default=20, help="factor on the cosines in the loss")
    return cli.check_encode_arguments(parser, parser.parse_args())


def main() -> None:
    args = parse_args()
    pairs = data.read_text_pairs(args.text_pair_file, "--text_pair_file", args.strict_data)
    cli.announce(args, args.params_path, cli.count(pairs, "pair"))

    from deploy.python.predictor import load_engine
    from model import encode_pairs, mean_loss

    engine, tokenizer = load_engine(args)
    query, title = encode_pairs(engine, tokenizer, pairs, args.max_seq_length, args.batch_size)
    for cosine in (query * title).sum(axis=1).tolist():
        print(cosine)
    batch_size = args.batch_size or 32
    loss = mean_loss(query, title, batch_size, args.margin, args.scale)
    console.log(f"{len(pairs)} pairs, contrastive loss in batches of {batch_size}: {loss:.6f} "
                f"(margin {args.margin:g}, scale {args.scale:g})")


if __name__ == "__main__":
    console.run(main)
