"""Embeddings and pair scores from an exported folder, by Paddle Inference or, where it holds ONNX, onnxruntime.

    python deploy/python/predict.py --model_dir=./output --device cpu
    python deploy/python/predict.py --model_dir=./output --device cpu --input_file texts.txt --output_file texts.npy
    python deploy/python/predict.py --model_dir=./output --device cpu --text_pair_file recall/test.csv

Without texts or pairs it takes the README's. Needs the folder that export_model.py wrote, and nothing of the project.
"""

import argparse
import contextlib
import difflib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

try:
    import numpy as np
    import predictor as p
except ModuleNotFoundError as error:
    print(f"predict.py: error: {error.name} is not installed for {sys.executable}; pip install -r requirements.txt",
          file=sys.stderr)
    sys.exit(2)

README_TEXT = "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据"
README_PAIRS = [("中西方语言与文化的差异", "中西方文化差异以及语言体现中西方文化,差异,语言体现"),
                ("中西方语言与文化的差异", "飞桨致力于让深度学习技术的创新与应用更简单")]


# ------------------------------------------------------------------------------------------------------------- flags
class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in every help text, no abbreviations, and usage errors in one line."""

    def __init__(self) -> None:
        super().__init__(description=__doc__.splitlines()[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        for flag in (word.split("=")[0] for word in sys.argv[1:]):
            if flag.startswith("--") and flag not in self._option_string_actions:
                close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"no such flag: {flag}" + (f"; did you mean {close[0]}?" if close else ""))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def at_least(least: int, why: str = "") -> Callable[[str], int]:
    """The type of a flag that takes a whole number from `least` up, for the reason `why`."""
    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if (number := int(text)) >= least:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up{why}")

    return parse


def boolean(text: str) -> bool:
    """Parse True/False, yes/no, on/off, 1/0 in any case; argparse reports anything else."""
    for value, names in ((True, ("true", "yes", "on", "1")), (False, ("false", "no", "off", "0"))):
        if text.lower() in names:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def readable_file(path: str) -> str:
    """Check that `path` is a file that can be opened."""
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def folder(path: str) -> str:
    """Check that `path` is a folder."""
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return path


def text(given: str) -> str:
    """Check that a text given on the command line is one."""
    if any("\ud800" <= character <= "\udfff" for character in given):
        raise argparse.ArgumentTypeError(f"not UTF-8: {ascii(given)}")
    if not given.strip():
        raise argparse.ArgumentTypeError("an empty text")
    return given


def npy_file(path: str) -> str:
    """Check the name of a file of embeddings."""
    if not path.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"{path}: the name has to end in .npy")
    return path


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser()
    parser.add_argument("--quiet", action="store_true", help="no log lines on stderr, only warnings and errors")
    group = parser.add_argument_group("texts")
    group.add_argument("--text", action="append", type=text, default=[],
                       help=f"a text; may be given several times. Without --text and --input_file: {README_TEXT}")
    group.add_argument("--input_file", type=readable_file, default=None, help="texts, one a line")
    group.add_argument("--output_file", type=npy_file, default=None,
                       help="write the embeddings there, .npy, float32 [texts, embedding size]; None: print them")
    group.add_argument("--format", choices=("tsv", "jsonl"), default=None,
                       help="how results are printed, a line each. tsv: text, tab, numbers with blanks between them; "
                       'query, title, cosine; jsonl: {"text", "embedding"}; {"query", "title", "cosine"}; None: shape '
                       "and matrix; the cosine alone")
    group.add_argument("--text_pair_file", type=readable_file, default=None,
                       help="two texts, tab-separated, a pair a line; prints one cosine a line")
    group.add_argument("--strict_data", action="store_true",
                       help="stop at the first malformed line instead of skipping and reporting it")
    group = parser.add_argument_group("model")
    group.add_argument("--model_dir", type=folder, default="./output", help="what export_model.py wrote")
    group.add_argument("--max_seq_length", type=at_least(3, " ([CLS], a token, [SEP])"), default=128,
                       help="tokens per text, [CLS] and [SEP] included; longer texts are cut")
    group.add_argument("--batch_size", type=at_least(1), default=None,
                       help="texts per batch; None: as many as fill 2,048 tokens on a CPU, 65,536 on a GPU")
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=("cpu", "gpu", "xpu"), default="gpu", help="device to run on")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16", "int8"), default="auto",
                       help="number format of the matrix products; auto: bf16 on a CPU that is faster in it, else fp32")
    group.add_argument("--cpu_threads", type=at_least(0), default=0, help="math threads on a CPU; 0: all cores")
    group.add_argument("--use_tensorrt", type=boolean, nargs="?", const=True, default=False,
                       help="run on TensorRT; needs --device gpu")
    group.add_argument("--enable_mkldnn", type=boolean, nargs="?", const=True, default=None,
                       help="use oneDNN; None: on a CPU")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--benchmark", type=boolean, nargs="?", const=True, default=False,
                       help="also measure latency and throughput, at batch 1 and 32, or --batch_size")
    group.add_argument("--save_log_path", default="./log_output/", help="folder of the benchmark's log")
    args = parser.parse_args()
    if args.format and args.output_file and not args.text_pair_file and (args.text or args.input_file):
        parser.error("--format is how results are printed; --output_file writes .npy instead")
    check_onnx(parser, args)
    check_device(parser, args)
    positions = p.read_record(args.model_dir)["max_positions"]
    if args.max_seq_length > positions:
        parser.error(f"--max_seq_length {args.max_seq_length}: the encoder has {positions} positions")
    return args


def check_onnx(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what onnxruntime would not do, where --model_dir holds its graph."""
    if not p.holds_onnx(args.model_dir):
        return
    for flag, given in (("--use_tensorrt", args.use_tensorrt), ("--enable_mkldnn", args.enable_mkldnn),
                        (f"--device {args.device}", args.device != "cpu"),
                        (f"--precision {args.precision}", args.precision not in ("auto", "fp32"))):
        if given:
            parser.error(f"{flag}: --model_dir {args.model_dir} holds {p.ONNX_FILE}, which runs with --device cpu, in "
                         "fp32, without TensorRT and oneDNN")
    args.enable_mkldnn = False


def check_device(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing on the device asked for."""
    cpu = args.device == "cpu"
    if args.enable_mkldnn is None:
        args.enable_mkldnn = cpu
    for refused, message in (
            (args.use_tensorrt and args.device != "gpu", "--use_tensorrt needs --device gpu"),
            (args.precision == "int8" and not args.use_tensorrt, "--precision int8 needs --use_tensorrt"),
            (args.precision == "fp16" and args.device != "gpu", "--precision fp16 needs --device gpu"),
            (args.cpu_threads and not cpu, "--cpu_threads needs --device cpu"),
            (args.enable_mkldnn and not cpu, "--enable_mkldnn needs --device cpu"),
            (args.precision == "bf16" and args.device != "gpu" and not args.enable_mkldnn,
             "--precision bf16 needs --device gpu, or --device cpu with oneDNN (--enable_mkldnn True)")):
        if refused:
            parser.error(message)


# ------------------------------------------------------------------------------------------------------------- files
def decode(line: bytes, where: str) -> str:
    """A line of a UTF-8 file; InputError says what it looks like instead."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        cause = "the file is damaged or not text"
        if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            cause = "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
        else:
            with contextlib.suppress(UnicodeDecodeError):
                line.decode("gb18030")
                cause = "it looks like GBK; convert it: iconv -f GB18030 -t UTF-8"
        raise p.InputError(f"{where}: not UTF-8 at byte {error.start + 1} of the line; {cause}") from None


def read_rows(path: str, columns: int, flag: str, strict: bool) -> list[list[str]]:
    """The rows of a tab-separated UTF-8 file; malformed ones are skipped and reported on stderr.

    Raises:
        InputError: not UTF-8; a malformed row where `strict`; more than half of the rows malformed; no row at all.
    """
    with open(path, "rb") as file:
        lines = file.read().removeprefix(b"\xef\xbb\xbf").splitlines()  # of bytes: at \n, \r\n and \r, nowhere else
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        row = [field.strip() for field in decode(line, f"{flag} {path}:{number}").split("\t")]
        if not any(row):
            continue
        if len(row) == columns and all(row):
            rows.append(row)
            continue
        complaint = "an empty field" if len(row) == columns else f"columns: {len(row)} instead of {columns}"
        if strict:
            raise p.InputError(f"{flag} {path}:{number}: {complaint} (--strict_data)")
        bad.append(f"{path}:{number} ({complaint})")
    report = f"{len(bad)} of {len(bad) + len(rows)} lines are malformed: {', '.join(bad[:3])}"
    if len(bad) > len(rows) or not rows:
        raise p.InputError(f"{flag} {path}: {report if bad else 'the file holds no text'}")
    if bad:
        print(f"{flag} {path}: skipped; {report}", file=sys.stderr)
    return rows


def write_whole(path: str, write: Callable[[Any], None]) -> None:
    """Have `write` fill a file, which appears complete or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ----------------------------------------------------------------------------------------------------------- the work
def log(args: argparse.Namespace, message: str) -> None:
    """Print one line to stderr, unless --quiet; stdout is for results."""
    if not args.quiet:
        print(message, file=sys.stderr, flush=True)


def announce(args: argparse.Namespace, texts: Sequence, pairs: Sequence) -> None:
    """Say, before anything takes time, what is about to happen."""
    device = [args.device]
    if args.device == "cpu":
        threads = args.cpu_threads or p.default_threads()
        device.append(f"{threads} thread{'s' * (threads > 1)}")
    device.append(p.auto_precision(args.device, args.enable_mkldnn) if args.precision == "auto" else args.precision)
    counts = [f"{len(each):,} {noun}{'s' * (len(each) != 1)}" for each, noun in ((texts, "text"), (pairs, "pair"))]
    log(args, f"predict.py: {'; '.join([', '.join(device), args.model_dir, *counts])}")


def benchmark(embed_texts: Callable, texts: list[str], args: argparse.Namespace) -> None:
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
        log(args, "benchmark: " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    settings = {key: value for key, value in vars(args).items() if key in (
        "device", "precision", "cpu_threads", "enable_mkldnn", "use_tensorrt", "max_seq_length")}
    path = os.path.join(args.save_log_path, f"benchmark_{time.strftime('%Y%m%d_%H%M%S')}.json")
    content = {"machine": platform.platform(), "cores": os.cpu_count(), "settings": settings, "results": rows}
    write_whole(path, lambda file: file.write(json.dumps(content, indent=2).encode()))
    log(args, f"wrote {path}")


def print_embeddings(args: argparse.Namespace, texts: list[str], embeddings: np.ndarray) -> None:
    """To --output_file, or to stdout as --format says."""
    if args.output_file:
        write_whole(args.output_file, lambda file: np.save(file, embeddings))
        log(args, f"wrote {len(embeddings)} x {embeddings.shape[1]} float32 to {args.output_file}")
    elif args.format is None:
        print(embeddings.shape)
        print(embeddings)
    for given, embedding in zip(texts, embeddings.tolist()) if args.format and not args.output_file else ():
        print(f"{given}\t{' '.join(map(str, embedding))}" if args.format == "tsv" else
              json.dumps({"text": given, "embedding": embedding}, ensure_ascii=False))


def print_cosines(args: argparse.Namespace, pairs: list, cosines: list[float]) -> None:
    """To stdout as --format says."""
    for (query, title), cosine in zip(pairs, cosines):
        if args.format == "jsonl":
            print(json.dumps({"query": query, "title": title, "cosine": cosine}, ensure_ascii=False))
        else:
            print(f"{query}\t{title}\t{cosine}" if args.format else cosine)


def predict(args: argparse.Namespace) -> None:
    """Do what the flags ask for."""
    pairs, texts = [], list(args.text)
    if args.text_pair_file:
        pairs = read_rows(args.text_pair_file, 2, "--text_pair_file", args.strict_data)
    if args.input_file:
        texts += [given for (given,) in read_rows(args.input_file, 1, "--input_file", args.strict_data)]
    bare = not (texts or pairs)
    texts = [README_TEXT] if bare else texts
    announce(args, texts, pairs)
    if p.holds_onnx(args.model_dir):
        predictor = p.OnnxPredictor(args.model_dir, args.cpu_threads)
    else:
        predictor = p.Predictor(args.model_dir, args.device, args.cpu_threads, args.enable_mkldnn, args.use_tensorrt,
                                args.precision, args.batch_size or 32, args.max_seq_length)
    tokenizer = p.Tokenizer(args.model_dir)

    def embed(some: Sequence[str], batch_size: int | None = args.batch_size) -> np.ndarray:
        return p.encode(predictor, tokenizer, some, args.max_seq_length, batch_size)

    if texts:
        print_embeddings(args, texts, embed(texts))
    if pairs or bare:
        pairs = pairs or README_PAIRS
        first, second = np.split(embed([given for side in zip(*pairs) for given in side]), 2)
        cosines = (first * second).sum(axis=1).tolist()
        if bare and not args.format:
            print(cosines)
        else:
            print_cosines(args, pairs, cosines)
    if args.benchmark:
        benchmark(lambda batch: embed(batch, len(batch)), texts or [given for pair in pairs for given in pair], args)


def main() -> int:
    """Run; the exit code: 2 for a mistake in a flag or a file, 130 for Ctrl-C."""
    try:
        predict(parse_args())
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of stdout (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (p.InputError, OSError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"predict.py: error: {error.name} is not installed for {sys.executable}; pip install -r requirements.txt",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("predict.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
