"""Embeddings of texts.

    python inference.py --device cpu --params_path checkpoints/model_900 --text 一句话 --text 另一句话
    python inference.py --device cpu --params_path checkpoints/model_900 --input_file texts.txt --output_file texts.npy
    zcat texts.gz | python inference.py --device cpu --params_path ... --input_file - --format jsonl

Without --output_file and --format prints the shape and the embeddings; lines of stdin are answered as they come. A line
of input that is blank or malformed has a row of NaN, in tsv an empty field, in jsonl null.
"""

import argparse
import itertools
import sys

import data
from simcse import console, flags
from simcse.files import STDIN, arriving, new_file

import numpy as np


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", action="append", type=flags.given_text, default=[], help="a text; may be given several times. "
        f"Without --text and --input_file: {flags.README_TEXT}")
    flags.add_lines_argument(parser, "--input_file", "texts, one a line; a blank or malformed one has no embedding: a "
                             "row of NaN, in tsv an empty field, in jsonl null")
    add("--output_file", type=flags.npy_file,
        help="write the embeddings there, .npy, float32 [texts, embedding size]; None: print them")
    add("--format", choices=("tsv", "jsonl"), help="how embeddings are printed, a line a text. tsv: text, tab, numbers "
        'with blanks between them; jsonl: {"text", "embedding"}; None: shape and matrix, of stdin tsv')
    flags.add_model_arguments(parser, params_path=flags.DEFAULT_PARAMS)
    flags.add_encode_arguments(parser)
    args = flags.check_arguments(parser, parser.parse_args())
    if args.text and args.input_file == STDIN:
        parser.error("--text and texts of stdin: one of them, please")
    if args.output_file and args.format:
        parser.error("--format is how embeddings are printed; --output_file writes .npy instead")
    return args


def main() -> None:
    args = parse_args()
    streams = args.input_file == STDIN and not args.output_file
    texts = [("--text", [text]) for text in args.text]
    rows = data.read_rows(args.input_file, 1, "--input_file", every=True)
    name = "stdin" if args.input_file == STDIN else args.input_file
    lines = ((f"{name}:{number}", row) for number, row in rows)
    if args.input_file and not streams:
        texts += lines
    if not texts and not streams:
        texts = [("README", [flags.README_TEXT])]
    first = [row for _, row in texts if data.complete(row, 1)]
    flags.announce(args, args.params_path, "texts of stdin" if streams else flags.count(first, "text"))

    from model import encode, load_engine

    engine, tokenizer = load_engine(args, first)
    for block in arriving(lines) if streams else [texts]:
        good = [data.complete(row, 1) for _, row in block]
        places = [place for place, _ in itertools.compress(block, good)]
        complete = [text for _, (text,) in itertools.compress(block, good)]
        embeddings = encode(engine, tokenizer, complete, args.max_seq_length, args.batch_size, places.__getitem__)
        if not all(good):
            encoded, embeddings = embeddings, np.full((len(good), engine.embedding_size), np.nan, "float32")
            embeddings[good] = encoded
        if args.output_file:
            with new_file(args.output_file, "wb") as file:
                np.save(file, embeddings)
            console.log(f"wrote {embeddings.shape[0]} x {embeddings.shape[1]} float32 to {args.output_file}")
        elif args.format or streams:
            for (_, row), vector, is_good in zip(block, embeddings, good):
                numbers = vector.tolist() if is_good else None
                print(console.line(args.format or "tsv", text="\t".join(row), embedding=numbers), end="")
            sys.stdout.flush()
        else:
            print(list(embeddings.shape))
            print(embeddings)


if __name__ == "__main__":
    console.run(main)
