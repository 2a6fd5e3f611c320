"""Embeddings of texts.

    python inference.py --device cpu --params_path checkpoints/model_900 --text 一句话 --text 另一句话
    python inference.py --device cpu --params_path checkpoints/model_900 --input_file texts.txt --output_file texts.npy
    zcat texts.gz | python inference.py --device cpu --params_path checkpoints/model_900 - --format jsonl

Without --output_file and --format prints the shape and the embeddings; lines of stdin are answered as they come.
"""

import argparse

import cli
import console
import data
import results


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_text_arguments(parser, stdin=True)
    cli.add_model_arguments(parser, params_path=cli.DEFAULT_PARAMS)
    cli.add_encode_arguments(parser)
    args = cli.check_encode_arguments(parser, parser.parse_args())
    if args.text and args.input_file == data.STDIN:
        parser.error("--text and texts of stdin: one of them, please")
    if args.output_file and args.format:
        parser.error("--format is how embeddings are printed; --output_file writes .npy instead")
    return args


def main() -> None:
    args = parse_args()
    streams = args.input_file == data.STDIN and not args.output_file
    texts = [] if streams else cli.given_texts(args)
    cli.announce(args, args.params_path, "texts of stdin" if streams else cli.count(texts, "text"))

    from deploy.python.predictor import load_engine
    from model import encode

    engine, tokenizer = load_engine(args)
    blocks = [texts]
    if streams:
        blocks = data.arriving(text for (text,) in data.read_rows(data.STDIN, 1, "--input_file", args.strict_data))
    for block in blocks:
        embeddings = encode(engine, tokenizer, block, args.max_seq_length, args.batch_size)
        if args.output_file:
            data.save_embeddings(args.output_file, embeddings)
        elif args.format or streams:
            results.write(results.embedding_line(args.format or "tsv", text, embedding.tolist())
                          for text, embedding in zip(block, embeddings))
        else:
            print(list(embeddings.shape))
            print(embeddings)


if __name__ == "__main__":
    console.run(main)
