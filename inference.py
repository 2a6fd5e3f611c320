"""Embeddings of texts.

    python inference.py --device cpu --params_path checkpoints/model_900 --text 一句话 --text 另一句话
    python inference.py --device cpu --params_path checkpoints/model_900 --input_file texts.txt --output_file texts.npy
    zcat texts.gz | python inference.py --device cpu --params_path ... --input_file - --format jsonl

Without --output_file and --format prints the shape and the embeddings; lines of stdin are answered as they come. A line
of input that is blank or malformed has a row of NaN, in tsv an empty field, in jsonl null.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from simcse import console, flags
from simcse.files import STDIN, new_file, read_ahead
from simcse.text import formats, textfile

import numpy as np


class Line(NamedTuple):
    place: str  # as file:line
    text: str  # all of a line that is not good
    good: bool = True
    id: str | None = None


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", action="append", type=flags.given_text, default=[], help="a text; may be given several times. "
        f"Without --text and --input_file: {flags.README_TEXT}")
    flags.add_lines_argument(parser, "--input_file", "texts, one a line, in a file also an id, a tab and the text, as "
                             "most lines are; a blank or malformed one has no embedding: a row of NaN, in tsv an empty "
                             "field, in jsonl null")
    add("--output_file", type=flags.npy_file,
        help="write the embeddings there, .npy, float32 [texts, embedding size]; None: print them")
    add("--format", choices=("tsv", "jsonl"), help="how embeddings are printed, a line a text. tsv: text, tab, numbers "
        'with blanks between them; jsonl: {"text", "embedding"}, between them "id" where there is one; None: shape and '
        "matrix, of stdin tsv")
    flags.add_model_arguments(parser, params_path=flags.DEFAULT_PARAMS)
    flags.add_encode_arguments(parser)
    args = flags.check_arguments(parser, parser.parse_args())
    if args.text and args.input_file == STDIN:
        parser.error("--text and texts of stdin: one of them, please")
    if args.output_file and args.format:
        parser.error("--format is how embeddings are printed; --output_file writes .npy instead")
    return args


def lines_of(path: str) -> tuple[Iterator[Line], bool]:
    """The lines of --input_file, and whether ids stand before their texts, as most of a file's first lines have it."""
    found = textfile.count_columns(path, "--input_file", formats.CORPUS_COLUMNS) if os.path.isfile(path) else None
    columns, name = found or 1, "stdin" if path == STDIN else path

    def lines() -> Iterator[Line]:
        for row in textfile.read_rows(path, columns, "--input_file", keep_malformed=True, check_format=not found):
            place = f"{name}:{row.line_number}"
            if row.problem is not None:
                yield Line(place, "\t".join(row.fields), good=False)
            elif columns == 2:
                yield Line(place, row.fields[1], id=row.fields[0])
            else:
                yield Line(place, row.fields[0])

    return lines(), columns == 2


def main() -> None:
    args = parse_args()
    streams = args.input_file == STDIN and not args.output_file
    texts = [Line("--text", text) for text in args.text]
    lines, has_ids = lines_of(args.input_file) if args.input_file else (iter(()), False)
    if not streams:
        texts += lines
    if not texts and not streams:
        texts = [Line("README", flags.README_TEXT)]
    first = [line.text for line in texts if line.good]
    flags.announce(args, args.params_path,
                   "texts of stdin" if streams else console.count(len(first), "text") + " with ids" * has_ids)

    from model import load_encoder_for

    encoder = load_encoder_for(args, first)
    for block in read_ahead(lines) if streams else [texts]:
        good = [line.good for line in block]
        complete = list(itertools.compress(block, good))
        embeddings = encoder.encode([line.text for line in complete], places=[line.place for line in complete])
        if not all(good):
            encoded, embeddings = embeddings, np.full((len(good), encoder.embedding_size), np.nan, "float32")
            embeddings[good] = encoded
        if args.output_file:
            with new_file(args.output_file, "wb") as file:
                np.save(file, embeddings)
            console.log(f"wrote {embeddings.shape[0]} x {embeddings.shape[1]} float32 to {args.output_file}")
        elif args.format or streams:
            for line, vector in zip(block, embeddings):
                id = {"id": line.id} if line.id and args.format == "jsonl" else {}
                numbers = vector.tolist() if line.good else None
                print(console.line(args.format or "tsv", text=line.text, **id, embedding=numbers), end="")
            sys.stdout.flush()
        else:
            print(list(embeddings.shape))
            print(embeddings)


if __name__ == "__main__":
    console.run(main)
