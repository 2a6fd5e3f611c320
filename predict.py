"""Cosine similarity of text pairs.

    python predict.py --device cpu --params_path checkpoints/model_900 --text_pair_file recall/test.csv
    tail -n 9 recall/test.csv | python predict.py --device cpu --params_path ... --text_pair_file - --format jsonl

Prints one cosine a line of input, in its order, and nothing else, to stdout; pairs of stdin are answered as they come.
A line that is blank or malformed has the cosine nan, in tsv an empty field, in jsonl null. The contrastive loss of a
file's other pairs, each against the others of its batch, goes to stderr.
"""

import argparse
import math
import sys

from simcse import console, flags
from simcse.files import STDIN, read_ahead
from simcse.text import textfile


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_lines_argument(parser, "--text_pair_file", "two texts, tab-separated, a pair a line; a blank or "
                             "malformed one has no cosine: nan, in tsv an empty field, in jsonl null", required=True)
    parser.add_argument("--format", choices=("tsv", "jsonl"), help="what is printed, a line a pair. tsv: query, title, "
                        'cosine; jsonl: {"query", "title", "cosine"}; None: the cosine alone')
    flags.add_target_texts_arguments(parser, "--text_pair_file")
    flags.add_model_arguments(parser)
    flags.add_encode_arguments(parser)
    parser.add_argument("--margin", type=flags.natural_float, default=0.0, help="margin of the loss, in cosine")
    parser.add_argument("--scale", type=flags.positive_float, default=20, help="factor on the cosines in the loss")
    args = flags.check_arguments(parser, parser.parse_args())
    flags.check_target_texts(parser, args)
    if args.text_pair_file == STDIN and (args.margin, args.scale) != (0, 20):
        parser.error("--margin and --scale are of the loss, which is of a file's pairs, not of stdin's")
    return args


def main() -> None:
    args = parse_args()
    streams = args.text_pair_file == STDIN
    rows = textfile.read_targets(args.text_pair_file, "--text_pair_file", args.corpus_file, keep_malformed=True)
    blocks = read_ahead(rows) if streams else [list(rows)]
    pairs = [] if streams else [row.fields for row in blocks[0] if row.problem is None]
    flags.announce(args, args.params_path, "pairs of stdin" if streams else console.count(len(pairs), "pair"))

    from model import load_encoder_for, mean_loss

    encoder = load_encoder_for(args, pairs)
    for block in blocks:
        good = [row for row in block if row.problem is None]
        pairs = [row.fields for row in good]
        places = [f"{'stdin' if streams else args.text_pair_file}:{row.line_number}" for row in good]
        first, second = encoder.encode_pairs(pairs, places=places)
        cosines = iter((first * second).sum(axis=1).clip(-1, 1).tolist())
        for row in block:
            cosine = next(cosines) if row.problem is None else None
            if args.format:
                line = console.line(args.format, query=row.fields[0], title="\t".join(row.fields[1:]), cosine=cosine)
            else:
                line = f"{math.nan if cosine is None else cosine}\n"
            print(line, end="")
        sys.stdout.flush()
    if streams:
        return
    batch_size = args.batch_size or 32
    loss = mean_loss(first, second, batch_size, args.margin, args.scale)
    console.log(f"{len(pairs)} pairs, contrastive loss in batches of {batch_size}: {loss:.6f} "
                f"(margin {args.margin:g}, scale {args.scale:g})")


if __name__ == "__main__":
    console.run(main)
