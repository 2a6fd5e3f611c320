"""Print the embeddings of texts, or the cosines of text pairs, by an exported folder.

    python deploy/python/predict.py --model_dir=./output --device cpu
    python deploy/python/predict.py --model_dir=./output --device cpu --input_file texts.txt --output_file texts.npy
    python deploy/python/predict.py --model_dir=./output --device cpu --text_pair_file recall/test.csv

Without texts or pairs it takes those of the README. A blank or malformed line of a file gives NaN, in tsv an empty
field, in jsonl null. The script needs this folder and the one that export_model.py wrote, nothing else of the project.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from typing import BinaryIO

NOT_INSTALLED = f"is not installed for {sys.executable}; pip install -r requirements.txt"
try:
    import numpy as np
    from encoder import Tokenizer, encode
    from predictor import (
        CPU_CORES,
        PREDICTORS,
        InputError,
        PaddlePredictor,
        Predictor,
        TensorRtShape,
        choose_precision,
        find_graph,
        first_line,
        load_predictor,
        read_record,
    )
    from rows import Row, one_line, print_results, read_rows
except ModuleNotFoundError as error:
    print(f"predict.py: error: {error.name} {NOT_INSTALLED}", file=sys.stderr)
    sys.exit(2)

README_TEXT = "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据"
README_PAIRS = [["中西方语言与文化的差异", "中西方文化差异以及语言体现中西方文化,差异,语言体现"],
                ["中西方语言与文化的差异", "飞桨致力于让深度学习技术的创新与应用更简单"]]
DEFAULT_LENGTH = 64  # tokens, where the folder does not record its training's
DEFAULT_BATCH = 32  # texts, of the benchmark and of TensorRT


# --------------------------------------------------------------------------------------------------------------- flags
class ArgumentParser(argparse.ArgumentParser):
    """argparse with usage errors in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def boolean(value: str) -> bool:
    if value.lower() in ("true", "yes", "on", "1"):
        return True
    if value.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither true nor false")


def int_from(minimum: int) -> Callable[[str], int]:
    """Return the type of a flag that takes integers from `minimum` up."""
    def parse(value: str) -> int:
        with contextlib.suppress(ValueError):
            if int(value) >= minimum:
                return int(value)
        raise argparse.ArgumentTypeError(f"expected an integer >= {minimum}, got {value!r}")

    return parse


def folder(path: str) -> str:
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return path


def npy_file(path: str) -> str:
    if not path.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"{path}: the name has to end in .npy")
    return path


def nonempty_text(value: str) -> str:
    if re.search("[\ud800-\udfff]", value):  # bytes of the shell's that are not UTF-8
        raise argparse.ArgumentTypeError(f"not UTF-8: {value!a}")
    text = one_line(value)
    if not text:
        raise argparse.ArgumentTypeError("an empty text")
    return text


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors on stderr, no log lines")
    group = parser.add_argument_group("texts")
    group.add_argument("--text", action="append", type=nonempty_text, default=[],
                       help="a text; may be given several times")
    group.add_argument("--input_file", help="file of texts, one a line")
    group.add_argument("--output_file", type=npy_file,
                       help="write the embeddings to this .npy file, float32 [texts, embedding size], instead of "
                       "printing them")
    group.add_argument("--text_pair_file",
                       help="file of two texts a line, tab-separated; print the cosine of each pair")
    group.add_argument("--format", choices=("tsv", "jsonl"),
                       help="how to print results, a line for each. tsv: the texts, and the cosine or the numbers with "
                       'blanks between them; jsonl: {"text", "embedding"} or {"query", "title", "cosine"}; without '
                       "--format: the cosines, or the matrix of embeddings and its shape")
    group.add_argument("--strict_data", action="store_true",
                       help="stop at the first blank or malformed line, and at texts that are cut or unknown")
    group = parser.add_argument_group("model")
    group.add_argument("--model_dir", type=folder, default="./output", help="folder that export_model.py wrote")
    group.add_argument("--max_seq_length", type=int_from(3),
                       help="tokens of a text, [CLS] and [SEP] included; longer texts are cut; by default the length "
                       f"of training, or {DEFAULT_LENGTH} where the folder does not record it")
    group.add_argument("--batch_size", type=int_from(1),
                       help="texts of a batch; by default as many as fill 2,048 tokens on a CPU, 65,536 on a GPU")
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=PaddlePredictor.DEVICES, default="gpu", help="device to run on")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16", "int8"), default="auto",
                       help="number format of the matrix products; auto: int8 if the folder was exported in it, bf16 "
                       "on a CPU that is faster in it, else fp32")
    group.add_argument("--cpu_threads", type=int_from(0), default=0, help="math threads on a CPU; 0: all cores")
    group.add_argument("--use_tensorrt", type=boolean, nargs="?", const=True, default=False,
                       help=f"run on TensorRT, in batches of --batch_size or {DEFAULT_BATCH}; needs --device gpu and a "
                       "graph that paddle 2 exported")
    group.add_argument("--enable_mkldnn", type=boolean, nargs="?", const=True,
                       help="run Paddle Inference with oneDNN; by default on a CPU")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--benchmark", type=boolean, nargs="?", const=True, default=False,
                       help=f"measure latency and throughput too, at batch 1 and --batch_size or {DEFAULT_BATCH}")
    group.add_argument("--save_log_path", default="./log_output/", help="folder for the benchmark's log")
    args = parser.parse_args()
    try:
        choose_length(args)
        check_device(args)
        check_output(args)
    except InputError as error:
        parser.error(str(error))
    return args


def choose_length(args: argparse.Namespace) -> None:
    """Set --max_seq_length where it is not given; warn of one that does not suit the model."""
    record = read_record(args.model_dir)
    trained_at = record.get("max_seq_length")
    whitened_at = record.get("whitened_at")
    args.max_seq_length = length = args.max_seq_length or trained_at or DEFAULT_LENGTH
    if length > record["max_positions"]:
        raise InputError(f"--max_seq_length {length}: the encoder has {record['max_positions']} positions")
    if whitened_at and length > whitened_at:
        warn(f"--max_seq_length {length}: {args.model_dir} was whitened at {whitened_at} tokens, and does not suit "
             "longer texts; whiten it (train.py --whiten) at the length that you use")
    elif trained_at and length != trained_at:
        warn(f"--max_seq_length {length}: {args.model_dir} was trained with {trained_at}; embeddings of texts that are "
             "cut differ")


def check_device(args: argparse.Namespace) -> None:
    """Raise InputError for flags that the device or the folder's runtime does not support; choose the precision."""
    graph = find_graph(args.model_dir)
    by_paddle = PREDICTORS.get(graph, PaddlePredictor) is PaddlePredictor
    on_cpu = args.device == "cpu"
    on_gpu = args.device == "gpu"
    if args.enable_mkldnn is None:
        args.enable_mkldnn = on_cpu and by_paddle
    for flag in ("use_tensorrt", "enable_mkldnn"):
        if getattr(args, flag) and not by_paddle:
            raise InputError(f"--{flag}: --model_dir {args.model_dir} holds {graph}, which Paddle Inference does not "
                             "run")
    if args.use_tensorrt and not on_gpu:
        raise InputError("--use_tensorrt needs --device gpu")
    if args.enable_mkldnn and not on_cpu:
        raise InputError("--enable_mkldnn needs --device cpu")
    if args.cpu_threads and not on_cpu:
        raise InputError("--cpu_threads needs --device cpu")
    if args.precision == "fp16" and not on_gpu:
        raise InputError("--precision fp16 needs --device gpu")
    if args.precision == "bf16" and by_paddle and not (on_gpu or args.enable_mkldnn):
        raise InputError("--precision bf16 needs --device gpu, or --device cpu with oneDNN (--enable_mkldnn True)")
    args.precision = choose_precision(args.model_dir, args.device, args.precision, args.enable_mkldnn)


def check_output(args: argparse.Namespace) -> None:
    """Raise InputError where --format has nothing to print."""
    has_texts = args.text or args.input_file
    if args.format and args.output_file and has_texts and not args.text_pair_file:
        raise InputError("--format is how results are printed; --output_file writes .npy instead")


# -------------------------------------------------------------------------------------------------------------- stderr
def warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def log(args: argparse.Namespace, message: str) -> None:
    if not args.quiet:
        warn(message)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# ------------------------------------------------------------------------------------------------------------- predict
def predict(args: argparse.Namespace) -> None:
    """Encode the texts and pairs of the flags, or the README's; print or write the results."""
    texts = [Row("--text", [text]) for text in args.text]
    pairs = []
    if args.input_file:
        texts += read_rows(args.input_file, 1, "--input_file", strict=args.strict_data)
    if args.text_pair_file:
        pairs = read_rows(args.text_pair_file, 2, "--text_pair_file", strict=args.strict_data)
    is_example = not (texts or pairs)
    if is_example:
        texts = [Row("README", [README_TEXT])]
        pairs = [Row("README", pair) for pair in README_PAIRS]
    announce(args, texts, pairs)
    tensorrt = TensorRtShape(args.batch_size or DEFAULT_BATCH, args.max_seq_length) if args.use_tensorrt else None
    predictor = load_predictor(args.model_dir, device=args.device, precision=args.precision,
                               cpu_threads=args.cpu_threads, onednn_shapes=10 if args.enable_mkldnn else 0,
                               tensorrt=tensorrt)
    tokenizer = Tokenizer(args.model_dir)
    if texts:
        embeddings = encode_rows(args, predictor, tokenizer, texts)
        give_embeddings(args, texts, embeddings[:, 0])
    if pairs:
        embeddings = encode_rows(args, predictor, tokenizer, pairs)
        cosines = (embeddings[:, 0] * embeddings[:, 1]).sum(axis=1).clip(-1, 1)  # rounding may go beyond 1
        give_cosines(args, pairs, cosines.tolist(), as_list=is_example)
    if args.benchmark:
        benchmark(args, predictor, tokenizer, texts or pairs)


def announce(args: argparse.Namespace, texts: list[Row], pairs: list[Row]) -> None:
    """Log what is about to run."""
    device = args.device
    if device == "cpu":
        device = f"cpu, {count(args.cpu_threads or CPU_CORES, 'thread')}"
    good_texts = count(sum(row.problem is None for row in texts), "text")
    good_pairs = count(sum(row.problem is None for row in pairs), "pair")
    log(args, f"predict.py: {device}, {args.precision}; {args.model_dir}; {good_texts}; {good_pairs}")


def encode_rows(args: argparse.Namespace, predictor: Predictor, tokenizer: Tokenizer, rows: list[Row]) -> np.ndarray:
    """Encode rows, of which one at least has no problem; warn of texts that the encoder does not see all of.

    Returns:
        float32 [rows, texts of a row, embedding_size], NaN for a row with a problem.

    Raises:
        InputError: with --strict_data, in place of the warning.
    """
    good = [row for row in rows if row.problem is None]
    texts = [text for row in good for text in row.fields]
    places = [row.place for row in good for _ in row.fields]
    encoded = encode(predictor, tokenizer, texts, args.max_seq_length, args.batch_size)
    warn_texts(args, f"are longer than {args.max_seq_length} tokens and are cut; raise --max_seq_length, in "
               "training too, to encode more of them", encoded.truncated, places)
    warn_texts(args, "are all [UNK] to the encoder, so their cosine with any text is 0", encoded.unknown, places)
    found = encoded.embeddings.reshape(len(good), -1, predictor.embedding_size)
    if len(good) == len(rows):
        return found
    embeddings = np.full((len(rows), *found.shape[1:]), np.nan, "float32")
    embeddings[[row.problem is None for row in rows]] = found
    return embeddings


def warn_texts(args: argparse.Namespace, what: str, numbers: list[int], places: list[str]) -> None:
    """Warn of the texts of these numbers; with --strict_data raise InputError."""
    if not numbers:
        return
    examples = dict.fromkeys(places[number] for number in numbers[:3])
    message = f"{len(numbers):,} of {len(places):,} texts {what}: {', '.join(examples)}"
    if args.strict_data:
        raise InputError(f"{message} (--strict_data)")
    warn(message)


def give_embeddings(args: argparse.Namespace, rows: list[Row], embeddings: np.ndarray) -> None:
    """Write embeddings, float32 [rows, embedding_size], to --output_file, or print them."""
    if args.output_file:
        with new_file(args.output_file) as file:
            np.save(file, embeddings)
        log(args, f"wrote {len(embeddings)} x {embeddings.shape[1]} float32 to {args.output_file}")
    elif args.format:
        results = (("\t".join(row.fields), numbers) for row, numbers in zip(rows, embeddings.tolist()))
        print_results(args.format, ("text", "embedding"), results)
    else:
        print(embeddings.shape)
        print(embeddings)


def give_cosines(args: argparse.Namespace, rows: list[Row], cosines: list[float], as_list: bool) -> None:
    """Print the cosines of pairs, a line for each; without --format in one line, if `as_list`."""
    if as_list and not args.format:
        print(cosines)
        return
    results = ((row.fields[0], "\t".join(row.fields[1:]), cosine) for row, cosine in zip(rows, cosines))
    print_results(args.format, ("query", "title", "cosine"), results)


@contextlib.contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """Open a file to write; it appears complete or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ----------------------------------------------------------------------------------------------------------- benchmark
def benchmark(args: argparse.Namespace, predictor: Predictor, tokenizer: Tokenizer, rows: list[Row]) -> None:
    """Measure text to embedding, tokenizing included; log the results and write them to --save_log_path."""
    texts = [text for row in rows if row.problem is None for text in row.fields]
    results = []
    for batch_size in sorted({1, args.batch_size or DEFAULT_BATCH}):
        batch = (texts * batch_size)[:batch_size]
        results.append({"batch_size": batch_size, **measure(args, predictor, tokenizer, batch)})
        log(args, "benchmark: " + ", ".join(f"{name} {figure}" for name, figure in results[-1].items()))
    names = ("max_seq_length", "device", "precision", "cpu_threads", "use_tensorrt", "enable_mkldnn")
    settings = {name: getattr(args, name) for name in names}
    content = {"machine": platform.platform(), "cores": os.cpu_count(), "settings": settings, "results": results}
    path = os.path.join(args.save_log_path, f"benchmark_{time.strftime('%Y%m%d_%H%M%S')}.json")
    with new_file(path) as file:
        file.write(json.dumps(content, indent=2).encode())
    log(args, f"wrote {path}")


def measure(args: argparse.Namespace, predictor: Predictor, tokenizer: Tokenizer,
            batch: list[str]) -> dict[str, float]:
    """Return percentiles of the milliseconds that a batch takes, and texts per second, over 50 runs after 10 others."""
    def run() -> None:
        encode(predictor, tokenizer, batch, args.max_seq_length, len(batch))

    seconds = sorted(timeit.repeat(run, "gc.enable()", number=1, repeat=60)[10:])
    figures = {f"p{part}_ms": round(1000 * seconds[50 * part // 100], 3) for part in (50, 95, 99)}
    figures["texts_per_second"] = round(len(batch) * 50 / sum(seconds), 1)
    return figures


def main() -> int:
    """Run the script; return its exit code: 2 for a mistake in a flag or a file, 130 for Ctrl-C."""
    try:
        predict(parse_args())
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of stdout (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        warn("predict.py: interrupted")
        return 130
    except ModuleNotFoundError as error:
        message = f"{error.name} {NOT_INSTALLED}"
    except (InputError, OSError) as error:
        message = first_line(error)
    except MemoryError as error:
        message = f"out of memory: {first_line(error)}; a lower --batch_size or --max_seq_length takes less"
    except RuntimeError as error:
        message = first_line(error)
        if "dynamic library" not in message:  # one of CUDA's, which paddle opens when it needs it
            raise
    warn(f"predict.py: error: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
