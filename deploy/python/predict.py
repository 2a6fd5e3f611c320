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
import signal
import sys
import time
import timeit
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # Windows cannot
if __name__ == "__main__" and CAN_BLOCK:
    # Until `main` receives them: numpy makes an ImportError of Ctrl-C. Its threads keep the mask, so that `predictor`
    # can hold the signals back while it imports paddle.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

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
        find_graph,
        first_line,
        load_predictor,
        read_record,
    )
    from rows import Row, one_line, part, print_results, read_rows
except ModuleNotFoundError as error:
    print(f"predict.py: error: {error.name} is not installed for {sys.executable}; pip install -r requirements.txt",
          file=sys.stderr)
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


def nonempty_text(value: str) -> str:
    text = one_line(value)
    if not text:
        raise argparse.ArgumentTypeError("an empty text")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the shell's that are not UTF-8
        raise argparse.ArgumentTypeError(f"not UTF-8: {value!a}") from None
    return text


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors on stderr, no log lines")
    group = parser.add_argument_group("texts")
    group.add_argument("--text", action="append", type=nonempty_text, default=[],
                       help="a text; may be given several times")
    group.add_argument("--input_file", help="file of texts, one a line")
    group.add_argument("--output_file",
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
    group.add_argument("--input_type", choices=("query", "document"),
                       help="which prefix to put before --text and the lines of --input_file, if the model has one; a "
                       "pair is a query and a document (default: document)")
    group = parser.add_argument_group("model")
    group.add_argument("--model_dir", default="./output",
                       help="folder that export_model.py wrote (default: %(default)s)")
    group.add_argument("--max_seq_length", type=int,
                       help="tokens of a text, [CLS] and [SEP] included; longer texts are cut (default: the length of "
                       f"training, {DEFAULT_LENGTH} if the folder does not record it)")
    group.add_argument("--batch_size", type=int,
                       help="texts of a batch (default: as many as fill 2,048 tokens on a CPU, 65,536 on a GPU)")
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=("cpu", "gpu"), default="gpu",
                       help="device to run on (default: %(default)s)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16", "int8"), default="auto",
                       help="number format of the matrix products; auto: int8 if the folder was exported in it, bf16 "
                       "on a CPU that is faster in it, else fp32 (default: %(default)s)")
    group.add_argument("--cpu_threads", type=int, default=0,
                       help="math threads on a CPU; 0: all cores (default: %(default)s)")
    group.add_argument("--use_tensorrt", type=boolean, nargs="?", const=True, default=False,
                       help=f"run on TensorRT, in batches of --batch_size or {DEFAULT_BATCH}; needs --device gpu and a "
                       "graph that paddle 2 exported")
    group.add_argument("--enable_mkldnn", type=boolean, nargs="?", const=True,
                       help="run Paddle Inference with oneDNN (default: on a CPU)")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--benchmark", type=boolean, nargs="?", const=True, default=False,
                       help=f"measure latency and throughput too, at batch 1 and --batch_size or {DEFAULT_BATCH}")
    group.add_argument("--save_log_path", default="./log_output/",
                       help="folder for the benchmark's log (default: %(default)s)")
    args = parser.parse_args()
    try:
        check_args(args)
        choose_length(args)
    except InputError as error:
        parser.error(str(error))
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for a flag that is out of range or would do nothing."""
    if args.output_file and os.path.isdir(args.output_file):
        raise InputError(f"argument --output_file: {args.output_file}: is a folder")
    if args.output_file and args.text_pair_file and not (args.text or args.input_file):
        raise InputError("--output_file is for embeddings of --text or --input_file; --text_pair_file prints cosines")
    if args.input_type and args.text_pair_file and not (args.text or args.input_file):
        raise InputError("--input_type is for --text and --input_file; a pair is a query and a document")
    for flag in ("input_file", "text_pair_file"):
        path = getattr(args, flag)
        is_both = args.output_file and path and os.path.isfile(args.output_file) and os.path.isfile(path)
        if is_both and os.path.samefile(args.output_file, path):
            raise InputError(f"--output_file {args.output_file}: is the same file as --{flag} {path}; name another "
                             "file")
    for flag, minimum in (("max_seq_length", 3), ("batch_size", 1), ("cpu_threads", 0)):
        value = getattr(args, flag)
        if value is not None and value < minimum:
            raise InputError(f"--{flag}: expected an integer >= {minimum}, got {value}")
    if args.use_tensorrt and args.device != "gpu":
        raise InputError("--use_tensorrt needs --device gpu")
    graph = find_graph(args.model_dir)
    runtime = PREDICTORS.get(graph, PaddlePredictor)
    for flag in ("use_tensorrt", "enable_mkldnn"):
        if getattr(args, flag) and runtime is not PaddlePredictor:
            raise InputError(f"--{flag}: --model_dir {args.model_dir} holds {graph}, which Paddle Inference does not "
                             "run")


def choose_length(args: argparse.Namespace) -> None:
    """Set --max_seq_length where it is not given; warn of one that does not suit the model."""
    record = read_record(args.model_dir)
    trained_at = record.get("max_seq_length")
    whitened_at = record.get("whitened_at")
    args.max_seq_length = length = args.max_seq_length or trained_at or DEFAULT_LENGTH
    if length > record.get("max_positions", length):
        raise InputError(f"--max_seq_length {length}: the encoder has {record['max_positions']} positions")
    if whitened_at and length > whitened_at:
        warn(f"--max_seq_length {length}: {args.model_dir} was whitened at {whitened_at} tokens, and does not suit "
             "longer texts; whiten it (train.py --whiten) at the length that you use")
    elif trained_at and length != trained_at:
        warn(f"--max_seq_length {length}: {args.model_dir} was trained with {trained_at}; embeddings of texts that are "
             "cut differ")


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
    texts = read_texts(args)
    pairs = read_pairs(args)
    is_example = not (texts or pairs)
    if is_example:
        texts = [Row("README", [README_TEXT])]
        pairs = [Row("README", pair) for pair in README_PAIRS]
    predictor = load(args)
    tokenizer = Tokenizer(args.model_dir)
    announce(args, predictor, texts, pairs)
    if texts:
        embeddings = encode_rows(args, predictor, tokenizer, texts)[:, 0]
        write_embeddings(args, texts, embeddings)
    if pairs:
        embeddings = encode_rows(args, predictor, tokenizer, pairs)
        cosines = (embeddings[:, 0] * embeddings[:, 1]).sum(axis=1).clip(-1, 1)  # rounding may go beyond 1
        if is_example and not args.format:
            print(cosines.tolist())
        else:
            print_results(args.format, ("query", "title", "cosine"), pairs, cosines.tolist())
    if args.benchmark:
        benchmark(args, predictor, tokenizer, texts or pairs)


def read_texts(args: argparse.Namespace) -> list[Row]:
    """Return the texts of --text and --input_file."""
    rows = [Row("--text", [text]) for text in args.text]
    if args.input_file:
        rows += read_rows(args.input_file, 1, strict=args.strict_data)
    return rows


def read_pairs(args: argparse.Namespace) -> list[Row]:
    """Return the pairs of --text_pair_file."""
    if not args.text_pair_file:
        return []
    return read_rows(args.text_pair_file, 2, strict=args.strict_data)


def load(args: argparse.Namespace) -> Predictor:
    """Load the graph of --model_dir."""
    onednn_shapes = 0 if args.enable_mkldnn is False else 10
    tensorrt = TensorRtShape(args.batch_size or DEFAULT_BATCH, args.max_seq_length) if args.use_tensorrt else None
    return load_predictor(args.model_dir, device=args.device, precision=args.precision, cpu_threads=args.cpu_threads,
                          onednn_shapes=onednn_shapes, tensorrt=tensorrt)


def announce(args: argparse.Namespace, predictor: Predictor, texts: list[Row], pairs: list[Row]) -> None:
    """Log what is about to run."""
    device = args.device
    if device == "cpu":
        device = f"cpu, {count(args.cpu_threads or CPU_CORES, 'thread')}"
    good_texts = count(sum(row.problem is None for row in texts), "text")
    good_pairs = count(sum(row.problem is None for row in pairs), "pair")
    precision = f"{predictor.precision} {predictor.calibration}".rstrip()
    log(args, f"predict.py: {device}, {precision}; {args.model_dir}; {good_texts}; {good_pairs}")


def find_prefixes(args: argparse.Namespace, texts_per_row: int) -> list[str]:
    """Return the prefix of each text of a row, as the model records them: of a text, or of a query and a document."""
    if texts_per_row == 1:
        input_types = [args.input_type or "document"]
    elif texts_per_row == 2:
        input_types = ["query", "document"]
    else:
        raise ValueError(texts_per_row)
    record = read_record(args.model_dir)
    prefixes = []
    for input_type in input_types:
        name = f"{input_type}_prefix"
        prefix = record.get(name, "")
        if not isinstance(prefix, str) or any("\ud800" <= character <= "\udfff" for character in prefix):
            raise InputError(f"--model_dir {args.model_dir}: simcse_config.json: {name}: expected a string of valid "
                             f"Unicode, got {ascii(prefix)}")
        prefixes.append(prefix)
    return prefixes


def encode_rows(args: argparse.Namespace, predictor: Predictor, tokenizer: Tokenizer, rows: list[Row]) -> np.ndarray:
    """Encode rows; warn of texts that the encoder does not see all of.

    Returns:
        float32 [rows, texts of a row, embedding_size], NaN for a row with a problem.

    Raises:
        InputError: with --strict_data, in place of the warning.
    """
    is_good = [row.problem is None for row in rows]
    texts = [text for row in rows if row.problem is None for text in row.texts]
    places = [row.place for row in rows if row.problem is None for _ in row.texts]
    prefixes = find_prefixes(args, len(rows[0].texts)) * sum(is_good)  # texts are in the order of their rows
    try:
        encoded = encode(predictor, tokenizer, texts, args.max_seq_length, args.batch_size, prefixes)
    except ValueError as error:
        raise InputError(f"--model_dir {args.model_dir}: {error}") from None
    if not np.isfinite(encoded.embeddings).all():
        raise InputError(f"--model_dir {args.model_dir}: embeddings contain NaN or Inf; training diverged or the "
                         "export is damaged")
    warn_texts(args, f"longer than {args.max_seq_length} tokens and cut; raise --max_seq_length, in "
               "training too, to encode more of them", encoded.truncated, places)
    warn_texts(args, "all [UNK] to the encoder, so that the cosine with any text is 0", encoded.unknown, places)
    embeddings = np.full((len(rows), len(rows[0].texts), predictor.embedding_size), np.nan, "float32")
    embeddings[is_good] = encoded.embeddings.reshape(-1, *embeddings.shape[1:])
    return embeddings


def warn_texts(args: argparse.Namespace, what: str, numbers: list[int], places: list[str]) -> None:
    """Warn of the texts of these numbers; with --strict_data raise InputError."""
    if not numbers:
        return
    examples = dict.fromkeys(places[number] for number in numbers[:3])
    message = f"{part(len(numbers), len(places), 'text')} {what}: {', '.join(examples)}"
    if args.strict_data:
        raise InputError(f"{message} (--strict_data)")
    warn(message)


def write_embeddings(args: argparse.Namespace, rows: list[Row], embeddings: np.ndarray) -> None:
    """Write embeddings, float32 [rows, embedding_size], to --output_file, or print them."""
    if args.output_file:
        with written(args.output_file, "--output_file"):
            os.makedirs(os.path.dirname(args.output_file) or ".", exist_ok=True)
            save_array(args.output_file, embeddings)
        log(args, f"wrote {len(embeddings)} x {embeddings.shape[1]} float32 to {args.output_file}")
    elif args.format:
        print_results(args.format, ("text", "embedding"), rows, embeddings.tolist())
    else:
        print(embeddings.shape)
        print(embeddings)


@contextlib.contextmanager
def written(path: str, flag: str) -> Iterator[None]:
    """Raise InputError, with path and flag, where a file cannot be written within the context."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


def save_array(path: str, array: np.ndarray) -> None:
    """Write an array to a file, which has the whole array or stays as it was; a device is written to as it is."""
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            np.save(file, array)
        return
    path = os.path.realpath(path)  # of a link, what it leads to
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ----------------------------------------------------------------------------------------------------------- benchmark
def benchmark(args: argparse.Namespace, predictor: Predictor, tokenizer: Tokenizer, rows: list[Row]) -> None:
    """Measure text to embedding, tokenizing included; log the results and write them to --save_log_path."""
    texts = [text for row in rows if row.problem is None for text in row.texts]
    results = []
    for batch_size in sorted({1, args.batch_size or DEFAULT_BATCH}):
        batch = (texts * batch_size)[:batch_size]
        figures = {"batch_size": batch_size, **measure(args, predictor, tokenizer, batch)}
        log(args, "benchmark: " + ", ".join(f"{name} {figure}" for name, figure in figures.items()))
        results.append(figures)
    settings = {**vars(args), "precision": predictor.precision}
    content = {"machine": platform.platform(), "cores": CPU_CORES, "settings": settings, "results": results}
    path = os.path.join(args.save_log_path, f"benchmark_{time.strftime('%Y%m%d_%H%M%S')}.json")
    with written(path, "--save_log_path"):
        os.makedirs(args.save_log_path, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
    log(args, f"wrote {path}")


def measure(args: argparse.Namespace, predictor: Predictor, tokenizer: Tokenizer,
            batch: list[str]) -> dict[str, float]:
    """Return percentiles of the milliseconds that a batch takes, and texts per second, over 50 runs after 10 others."""
    def run() -> None:
        encode(predictor, tokenizer, batch, args.max_seq_length, len(batch))

    seconds = sorted(timeit.repeat(run, "gc.enable()", number=1, repeat=60)[10:])
    figures = {f"p{percentile}_ms": round(1000 * seconds[50 * percentile // 100], 3) for percentile in (50, 95, 99)}
    figures["texts_per_second"] = round(len(batch) * 50 / sum(seconds), 1)
    return figures


def main() -> int:
    """Run the script; return its exit code: 2 for a mistake in a flag or a file, 130 for Ctrl-C, 143 for SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout.reconfigure(encoding="utf-8")  # results are UTF-8, whatever the locale
    try:
        if CAN_BLOCK:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        predict(parse_args())
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of stdout (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        warn("predict.py: interrupted")
        return 130
    except (InputError, OSError) as error:
        message = first_line(error)
    except MemoryError as error:
        message = f"out of memory: {first_line(error)}; a lower --batch_size or --max_seq_length takes less"
    warn(f"predict.py: error: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
