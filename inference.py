"""Embeddings of texts.

    python inference.py --device cpu --params_path checkpoints/model_900 --text 一句话 --text 另一句话
    python inference.py --device cpu --params_path checkpoints/model_900 --input_file texts.txt --output_file texts.npy
    zcat texts.gz | python inference.py --device cpu --params_path ... --input_file - --format jsonl

Without --output_file and --format it prints the shape and the embeddings. With stdin each line is answered when it
arrives. A blank or malformed line has a row of NaN (in tsv an empty field, in jsonl null).
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from simcse import console, flags
from simcse.files import STDIN, check_not_input, check_writable, new_file, stream_blocks
from simcse.text import formats, textfile
from simcse.text.prefixes import DOCUMENT, INPUT_TYPES

import numpy as np


class Text(NamedTuple):
    """A text to embed.

    Attributes:
        place: where it stands, as file:line.
        text: the text; the whole line if it is blank or malformed.
        id: of the file; None: it has no ids.
        is_valid: False for a blank or malformed line.
    """

    place: str
    text: str
    id: str | None = None
    is_valid: bool = True


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", action="append", type=flags.given_text, default=[], help="a text; may be given several times "
        f"(default, without --input_file: {flags.README_TEXT})")
    flags.add_lines_argument(parser, "--input_file", "texts, one a line; in a file also an id, a tab and the text, if "
                             "most lines are so; a blank or malformed line has a row of NaN (tsv: empty, jsonl: null)")
    add("--output_file", type=flags.npy_file,
        help="write the embeddings there, .npy, float32 [texts, embedding size] (default: print them)")
    add("--format", choices=("tsv", "jsonl"), help="print a line for each text. tsv: text, tab, numbers with blanks "
        'between them; jsonl: {"text", "embedding"}, and "id" if there is one (default: shape and matrix; for stdin '
        "tsv)")
    add("--input_type", choices=INPUT_TYPES, default=DOCUMENT, help="which prefix to put before the texts, if "
        "the checkpoint has one")
    flags.add_model_arguments(parser, params_path=flags.DEFAULT_PARAMS)
    flags.add_encode_arguments(parser)
    args = parser.parse_args()
    flags.set_max_seq_length(args)
    flags.check_arguments(parser, args)
    if args.text and args.input_file == STDIN:
        parser.error("--text and --input_file - are mutually exclusive")
    if args.output_file and args.format:
        parser.error("--format is for printed embeddings, and --output_file writes .npy; remove one of them")
    return args


def main() -> None:
    args = parse_args()
    if args.input_file == STDIN and not args.output_file:
        embed_stdin(args)
    else:
        embed_texts(args)


def embed_stdin(args: argparse.Namespace) -> None:
    """Print the embeddings of lines as they arrive."""
    texts = read_texts(STDIN, columns=1)
    flags.announce(args, args.params_path, "texts of stdin")

    from model import load_encoder_for

    encoder = load_encoder_for(args)
    for block in stream_blocks(texts):
        print_lines(block, encode(encoder, block, args.input_type), args.format or "tsv")


def embed_texts(args: argparse.Namespace) -> None:
    """Write or print the embeddings of --text and --input_file."""
    if args.output_file:
        check_writable(args.output_file, "--output_file")
        check_not_input(args.output_file, "--output_file", {
            "--input_file": args.input_file, "--calibration_file": args.calibration_file,
            "--params_path": args.params_path})
    texts = [Text("--text", text) for text in args.text]
    columns = 1
    if args.input_file:
        columns = choose_columns(args.input_file)
        texts += read_texts(args.input_file, columns)
    if not texts:
        texts = [Text("README", flags.README_TEXT)]
    valid = [text.text for text in texts if text.is_valid]
    count = console.count(len(valid), "text")
    flags.announce(args, args.params_path, f"{count} with ids" if columns == 2 else count)

    from model import load_encoder_for
    from simcse.encoder.int8_check import TextSource

    encoder = load_encoder_for(args, [TextSource(args.input_file or "--text", valid)])
    embeddings = encode(encoder, texts, args.input_type)
    if args.output_file:
        with new_file(args.output_file, "wb", flag="--output_file") as file:
            np.save(file, embeddings)
        console.log(f"wrote {embeddings.shape[0]} x {embeddings.shape[1]} float32 to {args.output_file}")
    elif args.format:
        print_lines(texts, embeddings, args.format)
    else:
        print(list(embeddings.shape))
        print(embeddings)


def choose_columns(path: str) -> int:
    """Return 2 if most of a file's first lines have an id, a tab and a text, else 1; a pipe has 1."""
    if not os.path.isfile(path):
        return 1
    return textfile.choose_columns(path, "--input_file", formats.CORPUS_COLUMNS)


def read_texts(path: str, columns: int) -> Iterator[Text]:
    """Yield the texts of --input_file, blank and malformed lines among them.

    Args:
        columns: 1: a text a line; 2: an id, a tab and the text.
    """
    name = "stdin" if path == STDIN else path
    is_checked = os.path.isfile(path)  # `choose_columns` has looked at its format
    for row in textfile.read_rows(path, columns, "--input_file", keep_malformed=True, check_format=not is_checked):
        place = f"{name}:{row.line_number}"
        if row.problem is not None:
            yield Text(place, "\t".join(row.fields), is_valid=False)
        elif columns == 2:
            yield Text(place, row.fields[1], id=row.fields[0])
        else:
            yield Text(place, row.fields[0])


def encode(encoder, texts: Sequence[Text], input_type: str) -> np.ndarray:
    """Return the embeddings of texts, float32 [texts, embedding_size]; a blank or malformed line has NaN."""
    valid = [row for row, text in enumerate(texts) if text.is_valid]
    encoded = encoder.encode([texts[row].text for row in valid], input_type=input_type,
                             places=[texts[row].place for row in valid])
    if len(valid) == len(texts):
        return encoded
    embeddings = np.full((len(texts), encoder.embedding_size), np.nan, "float32")
    embeddings[valid] = encoded
    return embeddings


def print_lines(texts: Sequence[Text], embeddings: np.ndarray, kind: str) -> None:
    """Print a line of a `kind`, a --format, for each text."""
    for text, vector in zip(texts, embeddings):
        fields = {"text": text.text}
        if text.id and kind == "jsonl":
            fields["id"] = text.id
        fields["embedding"] = vector.tolist() if text.is_valid else None
        print(console.line(kind, **fields), end="")
    sys.stdout.flush()


if __name__ == "__main__":
    console.run(main)
