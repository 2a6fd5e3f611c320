"""Embeddings of texts.

    python inference.py --device cpu --params_path checkpoints/model_900 --text 一句话 --text 另一句话
    python inference.py --device cpu --params_path checkpoints/model_900 --input_file texts.txt --output_file texts.npy
    zcat texts.gz | python inference.py --device cpu --params_path ... --input_file - --format jsonl

Without --output_file and --format prints the shape and the embeddings; lines of stdin are answered as they come.
"""

import argparse

import data
from simcse import console, flags
from simcse.files import STDIN, arriving, save_embeddings


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="append", type=flags.nonempty_text, default=[],
                        help="a text; may be given several times. Without --text and --input_file: "
                        f"{flags.README_TEXT}")
    flags.add_lines_argument(parser, "--input_file", "texts, one a line")
    parser.add_argument("--output_file", type=npy_file, default=None,
                        help="write the embeddings there, .npy, float32 [texts, embedding size]; None: print them")
    flags.add_format_argument(parser, "how embeddings are printed, a line a text. tsv: text, tab, numbers with blanks "
                              'between them; jsonl: {"text", "embedding"}; None: shape and matrix, of stdin tsv')
    flags.add_model_arguments(parser, params_path=flags.DEFAULT_PARAMS)
    flags.add_encode_arguments(parser)
    args = flags.check_encode_arguments(parser, parser.parse_args())
    if args.text and args.input_file == STDIN:
        parser.error("--text and texts of stdin: one of them, please")
    if args.output_file and args.format:
        parser.error("--format is how embeddings are printed; --output_file writes .npy instead")
    return args


def npy_file(path: str) -> str:
    """Check the name of a file of embeddings."""
    if not path.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"{path}: the name has to end in .npy")
    return path


def given_texts(args: argparse.Namespace) -> list[str]:
    """The texts of --text, then those of --input_file; the README's where there are none."""
    texts = list(args.text)
    if args.input_file:
        texts += data.read_texts(args.input_file, "--input_file", args.strict_data)
    return texts or [flags.README_TEXT]


def main() -> None:
    args = parse_args()
    streams = args.input_file == STDIN and not args.output_file
    texts = [] if streams else given_texts(args)
    flags.announce(args, args.params_path, "texts of stdin" if streams else flags.count(texts, "text"))

    from model import encode, load_engine

    engine, tokenizer = load_engine(args)
    blocks = [texts]
    if streams:
        blocks = arriving(text for (text,) in data.read_rows(STDIN, 1, "--input_file", args.strict_data))
    for block in blocks:
        embeddings = encode(engine, tokenizer, block, args.max_seq_length, args.batch_size)
        if args.output_file:
            save_embeddings(args.output_file, embeddings)
        elif args.format or streams:
            console.write(console.embedding_line(args.format or "tsv", text, embedding.tolist())
                          for text, embedding in zip(block, embeddings))
        else:
            print(list(embeddings.shape))
            print(embeddings)


if __name__ == "__main__":
    console.run(main)
