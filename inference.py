"""Embeddings of texts.

    python inference.py --device cpu --params_path checkpoints/model_900 --text 一句话 --text 另一句话
    python inference.py --device cpu --params_path checkpoints/model_900 --input_file texts.txt --output_file texts.npy

Without --output_file prints the shape and the embeddings.
"""

import argparse

import cli
import console
import data


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_text_arguments(parser)
    cli.add_model_arguments(parser, params_path=cli.DEFAULT_PARAMS)
    cli.add_encode_arguments(parser)
    return cli.check_encode_arguments(parser, parser.parse_args())


def main() -> None:
    args = parse_args()
    texts = cli.given_texts(args)
    cli.announce(args, args.params_path, cli.count(texts, "text"))

    from deploy.python.predictor import load_engine
    from model import encode

    engine, tokenizer = load_engine(args)
    embeddings = encode(engine, tokenizer, texts, args.max_seq_length, args.batch_size)
    if args.output_file:
        data.save_embeddings(args.output_file, embeddings)
    else:
        print(list(embeddings.shape))
        print(embeddings)


if __name__ == "__main__":
    console.run(main)
