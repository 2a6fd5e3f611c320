"""Embeddings and pair scores from an exported folder, by Paddle Inference or, where it holds ONNX, onnxruntime.

    python deploy/python/predict.py --model_dir=./output --device cpu
    python deploy/python/predict.py --model_dir=./output --device cpu --input_file texts.txt --output_file texts.npy
    python deploy/python/predict.py --model_dir=./output --device cpu --text_pair_file recall/test.csv

Without texts or pairs it takes the README's. Needs the folder that export_model.py wrote, and no checkpoint.
"""

import argparse
import json
import os
import platform
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import cli
import console
import data
import results
import tokenizing
from deploy.python.onnx_predictor import ONNX_FILE, OnnxPredictor, holds_onnx

README_PAIRS = [("中西方语言与文化的差异", "中西方文化差异以及语言体现中西方文化,差异,语言体现"),
                ("中西方语言与文化的差异", "飞桨致力于让深度学习技术的创新与应用更简单")]


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("texts")
    cli.add_text_arguments(group)
    group.add_argument("--text_pair_file", type=cli.readable_file, default=None,
                       help="two texts, tab-separated, a pair a line; prints one cosine a line")
    group = parser.add_argument_group("model")
    group.add_argument("--model_dir", type=cli.folder, default="./output", help="what export_model.py wrote")
    cli.add_encode_arguments(group, max_seq_length=128, devices=("cpu", "gpu", "xpu"),
                              precisions=("auto", "fp32", "bf16", "fp16", "int8"))
    group = parser.add_argument_group("device")
    group.add_argument("--use_tensorrt", type=cli.boolean, nargs="?", const=True, default=False,
                       help="run on TensorRT; needs --device gpu")
    group.add_argument("--enable_mkldnn", type=cli.boolean, nargs="?", const=True, default=None,
                       help="use oneDNN; None: on a CPU")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--benchmark", type=cli.boolean, nargs="?", const=True, default=False,
                       help="also measure latency and throughput, at batch 1 and 32, or --batch_size")
    group.add_argument("--save_log_path", default="./log_output/", help="folder of the benchmark's log")
    args = parser.parse_args()
    if args.format and args.output_file and not args.text_pair_file and (args.text or args.input_file):
        parser.error("--format is how results are printed; --output_file writes .npy instead")
    check_onnx(parser, args)
    check_device(parser, cli.check_encode_arguments(parser, args))
    return args


def check_onnx(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what onnxruntime would not do, where --model_dir holds its graph."""
    if not holds_onnx(args.model_dir):
        return
    for flag, given in (("--use_tensorrt", args.use_tensorrt), ("--enable_mkldnn", args.enable_mkldnn),
                        (f"--device {args.device}", args.device != "cpu"),
                        (f"--precision {args.precision}", args.precision not in ("auto", "fp32"))):
        if given:
            parser.error(f"{flag}: --model_dir {args.model_dir} holds {ONNX_FILE}, which runs with --device cpu, in "
                         "fp32, without TensorRT and oneDNN")
    args.enable_mkldnn = False


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing on the device asked for."""
    if args.use_tensorrt and args.device != "gpu":
        parser.error("--use_tensorrt needs --device gpu")
    if args.precision == "int8" and not args.use_tensorrt:
        parser.error("--precision int8 needs --use_tensorrt")
    if args.enable_mkldnn is None:
        args.enable_mkldnn = args.device == "cpu"
    if args.enable_mkldnn and args.device != "cpu":
        parser.error("--enable_mkldnn needs --device cpu")
    if args.precision == "bf16" and (args.device == "xpu" or args.device == "cpu" and not args.enable_mkldnn):
        parser.error("--precision bf16 needs --device gpu, or --device cpu with oneDNN (--enable_mkldnn True)")


def benchmark(embed_texts, texts: list[str], args: argparse.Namespace) -> None:
    """Time text to embedding, tokenizing included; figures to stderr and, as JSON, to --save_log_path."""
    rows = []
    for batch_size in sorted({1, args.batch_size or 32}):
        batch = (texts * batch_size)[:batch_size]
        seconds = []
        for turn in range(60):
            start = time.perf_counter()
            embed_texts(batch)
            seconds += [time.perf_counter() - start] if turn >= 10 else []  # the first ones warm up
        seconds.sort()
        p50, p95, p99 = (1000 * seconds[int(len(seconds) * part)] for part in (0.5, 0.95, 0.99))
        rows.append({"batch_size": batch_size, "p50_ms": round(p50, 3), "p95_ms": round(p95, 3),
                     "p99_ms": round(p99, 3), "texts_per_second": round(batch_size * len(seconds) / sum(seconds), 1)})
        console.log("benchmark: " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    settings = {key: value for key, value in vars(args).items() if key in (
        "device", "precision", "cpu_threads", "enable_mkldnn", "use_tensorrt", "max_seq_length")}
    path = os.path.join(args.save_log_path, f"benchmark_{time.strftime('%Y%m%d_%H%M%S')}.json")
    with data.new_file(path) as file:
        json.dump({"machine": platform.platform(), "cores": os.cpu_count(), "settings": settings, "results": rows},
                  file, indent=2)
    console.log(f"wrote {path}")


def load_predictor(args: argparse.Namespace):
    """What runs the graph in --model_dir."""
    if holds_onnx(args.model_dir):
        return OnnxPredictor(args.model_dir, args.cpu_threads)
    from deploy.python.predictor import Predictor

    return Predictor(args.model_dir, args.device, args.cpu_threads, args.enable_mkldnn, args.use_tensorrt,
                     args.precision, args.batch_size or 32, args.max_seq_length)


def main() -> None:
    args = parse_args()
    pairs = []
    if args.text_pair_file:
        pairs = data.read_text_pairs(args.text_pair_file, "--text_pair_file", args.strict_data)
    texts = [] if pairs and not (args.text or args.input_file) else cli.given_texts(args)
    bare = not (args.text or args.input_file or pairs)
    cli.announce(args, args.model_dir, cli.count(texts, "text"), cli.count(pairs, "pair"))

    from model import encode, encode_pairs

    predictor = load_predictor(args)
    tokenizer = tokenizing.load_tokenizer(args.model_dir)
    if texts:
        embeddings = encode(predictor, tokenizer, texts, args.max_seq_length, args.batch_size)
        if args.output_file:
            data.save_embeddings(args.output_file, embeddings)
        elif args.format:
            results.write(results.embedding_line(args.format, text, embedding.tolist())
                          for text, embedding in zip(texts, embeddings))
        else:
            print(embeddings.shape)
            print(embeddings)
    if pairs or bare:
        pairs = pairs or README_PAIRS
        first, second = encode_pairs(predictor, tokenizer, pairs, args.max_seq_length, args.batch_size)
        cosines = (first * second).sum(axis=1).tolist()
        if bare and not args.format:
            print(cosines)
        else:
            results.write(results.pair_line(args.format, *pair, cosine) for pair, cosine in zip(pairs, cosines))
    if args.benchmark:
        benchmark(lambda batch: encode(predictor, tokenizer, batch, args.max_seq_length, len(batch)),
                  texts or [text for pair in pairs for text in pair], args)


if __name__ == "__main__":
    console.run(main)
