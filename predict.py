"""Cosine similarity of text pairs.

    python predict.py --device cpu --params_path checkpoints/model_900 --text_pair_file recall/test.csv
    tail -n 9 recall/test.csv | python predict.py --device cpu --params_path ... --text_pair_file - --format jsonl

Prints one cosine for each line of input, in its order, and nothing else, to stdout. With stdin each line is answered
when it arrives. A blank or malformed line has the cosine nan (in tsv an empty field, in jsonl null). The contrastive
loss of a file's well-formed pairs, with in-batch negatives, goes to stderr.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

from simcse import console, flags
from simcse.files import STDIN, stream_blocks
from simcse.text import textfile
from simcse.text.textfile import Row

import numpy as np

LOSS_BATCH = 32  # pairs that are each other's negatives in the loss, without --batch_size


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_lines_argument(parser, "--text_pair_file", "pairs to score, a pair a line: two texts, tab-separated; a "
                             "blank or malformed line has the cosine nan (tsv: empty, jsonl: null)", required=True)
    parser.add_argument("--format", choices=("tsv", "jsonl"), help="what a line of output has. tsv: query, title, "
                        'cosine; jsonl: {"query", "title", "cosine"} (default: the cosine only)')
    flags.add_target_texts_arguments(parser, "--text_pair_file")
    flags.add_model_arguments(parser)
    flags.add_encode_arguments(parser)
    # The loss is for comparing checkpoints, so that its settings are not read from the checkpoint.
    parser.add_argument("--margin", type=flags.non_negative_float, default=0.0,
                        help="margin of the loss, in cosine, whatever the checkpoint was trained with")
    parser.add_argument("--scale", type=flags.positive_float, default=20,
                        help="factor on the cosines in the loss, whatever the checkpoint was trained with")
    args = parser.parse_args()
    flags.set_max_seq_length(args)
    flags.check_arguments(parser, args)
    flags.check_target_texts(parser, args)
    changes_loss = any(getattr(args, name) != parser.get_default(name) for name in ("margin", "scale"))
    if args.text_pair_file == STDIN and changes_loss:
        parser.error("--margin and --scale: the loss is computed of a file, not of stdin; remove them")
    return args


def main() -> None:
    args = parse_args()
    rows = textfile.read_targets(args.text_pair_file, "--text_pair_file", args.corpus_file, keep_malformed=True)
    if args.text_pair_file == STDIN:
        score_stdin(args, rows)
    else:
        score_file(args, list(rows))


def score_stdin(args: argparse.Namespace, rows: Iterator[Row]) -> None:
    """Print the cosines of pairs as they arrive."""
    flags.announce(args, args.params_path, "pairs of stdin")

    from model import load_encoder_for

    encoder = load_encoder_for(args)
    for block in stream_blocks(rows):
        first, second = encode_rows(encoder, block, "stdin")
        print_cosines(block, first, second, args.format)


def score_file(args: argparse.Namespace, rows: list[Row]) -> None:
    """Print the cosines of a file's pairs, and log their contrastive loss."""
    pairs = [row.fields for row in rows if row.problem is None]
    flags.announce(args, args.params_path, console.count(len(pairs), "pair"))

    from model import load_encoder_for, mean_loss
    from simcse.encoder.int8_check import TextSource

    encoder = load_encoder_for(args, [TextSource(args.text_pair_file, pairs)])
    first, second = encode_rows(encoder, rows, args.text_pair_file)
    print_cosines(rows, first, second, args.format)
    batch_size = args.batch_size or LOSS_BATCH
    loss = mean_loss(first, second, batch_size, args.margin, args.scale)
    console.log(f"{console.count(len(pairs), 'pair')}, contrastive loss in batches of {batch_size}: {loss:.6f} "
                f"(margin {args.margin:g}, scale {args.scale:g})")


def encode_rows(encoder, rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings of both sides, each float32 [pairs, embedding_size], of the rows without a problem.

    Args:
        name: of the file, for warnings.
    """
    complete = [row for row in rows if row.problem is None]
    places = [f"{name}:{row.line_number}" for row in complete]
    return encoder.encode_pairs([row.fields for row in complete], places=places)


def print_cosines(rows: Sequence[Row], first: np.ndarray, second: np.ndarray, kind: str | None) -> None:
    """Print a line for every row.

    Args:
        first, second: embeddings of the rows without a problem; the others have no cosine.
        kind: of line, a --format; None: its cosine only.
    """
    cosines = iter((first * second).sum(axis=1).clip(-1, 1).tolist())  # rounding may go beyond 1
    for row in rows:
        cosine = next(cosines) if row.problem is None else None
        if kind:
            line = console.line(kind, query=row.fields[0], title="\t".join(row.fields[1:]), cosine=cosine)
        else:
            line = f"{math.nan if cosine is None else cosine}\n"
        print(line, end="")
    sys.stdout.flush()


if __name__ == "__main__":
    console.run(main)
