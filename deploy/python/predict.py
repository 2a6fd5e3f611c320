"""Embeddings and pair scores from an exported folder, by Paddle Inference, onnxruntime or OpenVINO, by what it holds.

    python deploy/python/predict.py --model_dir=./output --device cpu
    python deploy/python/predict.py --model_dir=./output --device cpu --input_file texts.txt --output_file texts.npy
    python deploy/python/predict.py --model_dir=./output --device cpu --text_pair_file recall/test.csv

Without texts or pairs it takes the README's. A line of a file that is blank or malformed has an embedding of NaN and
the cosine nan, in tsv an empty field, in jsonl null. Needs the folder that export_model.py wrote, and nothing of the
project.
"""

import argparse
import contextlib
import difflib
import json
import os
import platform
import re
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any

NOT_INSTALLED = f"is not installed for {sys.executable}; pip install -r requirements.txt"
try:
    import numpy as np
    import predictor as p
except ModuleNotFoundError as error:
    print(f"predict.py: error: {error.name} {NOT_INSTALLED}", file=sys.stderr)
    sys.exit(2)

README_TEXT = "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据"
README_PAIRS = [["中西方语言与文化的差异", "中西方文化差异以及语言体现中西方文化,差异,语言体现"],
                ["中西方语言与文化的差异", "飞桨致力于让深度学习技术的创新与应用更简单"]]
Row = tuple[str, list[str]]  # where it stands, as file:line, and its fields


class ArgumentParser(argparse.ArgumentParser):
    """argparse with usage errors in one line, of which an unknown flag is the first."""

    def parse_known_args(self, args=None, namespace=None):
        for flag in (word.split("=")[0] for word in sys.argv[1:]):
            if flag.startswith("--") and flag not in self._option_string_actions:
                close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"no such flag: {flag}" + (f"; did you mean {close[0]}?" if close else ""))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def flag_type(complaint: str, accepts: Callable[[Any], Any], convert: Callable[[str], Any] = str) -> Callable:
    """The type of a flag, which converts its text and complains about one that cannot be, or is not accepted then."""
    def parse(given: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(value := convert(given)):
                return value
        raise argparse.ArgumentTypeError(complaint.format(given))

    return parse


def one_line(given: str) -> str:
    """The text with a blank for every run of tabs and of whatever any program takes for the end of a line."""
    return re.sub(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+", " ", given).strip()


BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
boolean = flag_type("{!r} is neither true nor false", lambda value: value is not None,
                    lambda given: BOOLEANS.get(given.lower()))
natural_int = flag_type("{!r} is not a whole number from 0 up", lambda count: count >= 0, int)
positive_int = flag_type("{!r} is not a whole number from 1 up", lambda count: count >= 1, int)
sequence_length = flag_type("{!r} is not a whole number from 3 up ([CLS], a token, [SEP])", lambda size: size >= 3, int)
folder = flag_type("{}: no such folder", os.path.isdir)
npy_file = flag_type("{}: the name has to end in .npy", lambda path: path.endswith(".npy"))
utf8 = flag_type("not UTF-8: {!a}", re.compile("[^\ud800-\udfff]*").fullmatch)
text = flag_type("an empty text", str.strip, lambda given: one_line(utf8(given)))


def readable_file(path: str) -> str:
    """The type of a flag that names a file that can be opened."""
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="no log lines on stderr, only warnings and errors")
    switch = {"type": boolean, "nargs": "?", "const": True}
    add = parser.add_argument_group("texts").add_argument
    add("--text", action="append", type=text, default=[],
        help=f"a text; may be given several times. Without --text and --input_file: {README_TEXT}")
    add("--input_file", type=readable_file, help="texts, one a line; a blank or malformed one has no embedding: a row "
        "of NaN, in tsv an empty field, in jsonl null")
    add("--output_file", type=npy_file,
        help="write the embeddings there, .npy, float32 [texts, embedding size]; None: print them")
    add("--format", choices=("tsv", "jsonl"),
        help="how results are printed, a line each. tsv: text, tab, numbers with blanks between them; query, title, "
        'cosine; jsonl: {"text", "embedding"}; {"query", "title", "cosine"}; None: shape and matrix; the cosine alone')
    add("--text_pair_file", type=readable_file,
        help="two texts, tab-separated, a pair a line; prints one cosine a line, for a blank or malformed one nan, in "
        "tsv an empty field, in jsonl null")
    add("--strict_data", action="store_true",
        help="stop at the first blank or malformed line instead of reporting it")
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", type=folder, default="./output", help="what export_model.py wrote")
    add("--max_seq_length", type=sequence_length, help="tokens per text, [CLS] and [SEP] included; longer texts are "
        "cut; None: as many as the checkpoint was trained with, 64 where that is not recorded")
    add("--batch_size", type=positive_int,
        help="texts per batch; None: as many as fill 2,048 tokens on a CPU, 65,536 on a GPU")
    add = parser.add_argument_group("device").add_argument
    add("--device", choices=("cpu", "gpu", "xpu"), default="gpu", help="device to run on")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16", "int8"), default="auto",
        help="number format of the matrix products; auto: int8 of a folder exported in it, bf16 on a CPU that is "
        "faster in it, else fp32")
    add("--cpu_threads", type=natural_int, default=0, help="math threads on a CPU; 0: all cores")
    add("--use_tensorrt", **switch, default=False, help="run on TensorRT, in batches of --batch_size, or "
        "32; needs --device gpu, and a graph that paddle 2 exported")
    add("--enable_mkldnn", **switch, help="use oneDNN; None: on a CPU")
    add = parser.add_argument_group("benchmark").add_argument
    add("--benchmark", **switch, default=False,
        help="also measure latency and throughput, at batch 1 and 32, or --batch_size")
    add("--save_log_path", default="./log_output/", help="folder of the benchmark's log")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing, or what cannot be done, on the device asked for or with the folder given."""
    cpu, gpu, graph = args.device == "cpu", args.device == "gpu", p.other_format(args.model_dir)
    record = p.read_record(args.model_dir)
    positions, recorded, given = record["max_positions"], record.get("max_seq_length"), args.max_seq_length
    args.max_seq_length, whitened_at = given or recorded or 64, record.get("whitened_at")
    if whitened_at and args.max_seq_length > whitened_at:
        print(f"--max_seq_length {args.max_seq_length}: {args.model_dir} was whitened at {whitened_at} tokens, and "
              "does not suit longer texts; whiten it (train.py --whiten) at the length that you use", file=sys.stderr)
    elif recorded and recorded != args.max_seq_length:
        print(f"--max_seq_length {given}: {args.model_dir} was trained with {recorded}; embeddings of texts that are "
              "cut differ", file=sys.stderr)
    if args.enable_mkldnn is None:
        args.enable_mkldnn = cpu and not graph
    only = f"--model_dir {args.model_dir} holds {graph}, which runs without TensorRT, and not by Paddle's oneDNN"
    for refused, message in (
            (args.format and args.output_file and (args.text or args.input_file) and not args.text_pair_file,
             "--format is how results are printed; --output_file writes .npy instead"),
            (graph and args.use_tensorrt, f"--use_tensorrt: {only}"),
            (graph and args.enable_mkldnn, f"--enable_mkldnn: {only}"),
            (args.use_tensorrt and not gpu, "--use_tensorrt needs --device gpu"),
            (args.precision == "fp16" and not gpu, "--precision fp16 needs --device gpu"),
            (args.cpu_threads and not cpu, "--cpu_threads needs --device cpu"),
            (args.enable_mkldnn and not cpu, "--enable_mkldnn needs --device cpu"),
            (args.precision == "bf16" and not (gpu or graph or args.enable_mkldnn),
             "--precision bf16 needs --device gpu, or --device cpu with oneDNN (--enable_mkldnn True)"),
            (args.max_seq_length > positions,
             f"--max_seq_length {args.max_seq_length}: the encoder has {positions} positions")):
        if refused:
            parser.error(message)
    try:
        args.precision = p.choose_precision(args.model_dir, args.device, args.precision, args.enable_mkldnn)
    except p.InputError as error:
        parser.error(str(error))


def decode(line: bytes, where: str) -> str:
    """A line of a UTF-8 file; InputError says what it looks like instead."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            cause = "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
        elif line[:2] in (b"\x1f\x8b", b"PK"):
            cause = "it is compressed, or a workbook: unpack it, or save it as text"
        else:  # which encoding it is would be a guess, and a wrong one gives other texts without an error
            cause = "iconv -f ENCODING -t UTF-8 FILE > NEW converts it from the encoding in which it was written"
        raise p.InputError(f"{where}: not UTF-8 at byte {error.start + 1} of the line; {cause}") from None


def read_rows(args: argparse.Namespace, flag: str, columns: int) -> list[Row]:
    """The rows of a tab-separated UTF-8 file, of none no rows; blank and malformed ones, which `complete` tells apart,
    are reported on stderr. InputError: not UTF-8; such a row with --strict_data; more than half of the rows malformed;
    no complete row."""
    if not (path := getattr(args, flag)):
        return []
    with open(path, "rb") as file:
        lines = file.read().splitlines()  # of bytes: at \n, \r\n and \r, nowhere else
    where, rows, bad, blank = f"--{flag} {path}", [], [], 0
    first = next(filter(bytes.strip, lines), b"").strip()
    if re.fullmatch(rb'\{".*\}|\[\{.*|"[^"]*"(,"[^"]*")+', first):
        raise p.InputError(f"{where}: JSON or CSV, and not texts with tabs between them")
    for number, line in enumerate(lines, 1):
        given = decode(line, f"{where}:{number}").replace("\ufeff", "")  # BOMs, wherever files were joined
        row = [field.strip() for field in given.split("\t")]
        rows.append((f"{path}:{number}", row))
        if complete(row, columns):
            continue
        complaint = "an empty field" if len(row) == columns else f"columns: {len(row)} instead of {columns}"
        if not any(row):
            blank, complaint = blank + 1, "blank"
        if args.strict_data:
            raise p.InputError(f"{where}:{number}: {complaint} (--strict_data)")
        bad.append(f"{path}:{number} ({complaint})")
    report = f"{len(bad)} of {len(rows)} lines are blank or malformed: {', '.join(bad[:3])}"
    good = len(rows) - len(bad)
    if not good or len(bad) - blank > good:
        raise p.InputError(f"{where}: {report if len(bad) > blank else 'the file holds no text'}")
    if bad:
        print(f"{where}: no result (NaN, empty or null); {report}; mend them or take them out", file=sys.stderr)
    return rows


def complete(row: Sequence[str], columns: int) -> bool:
    """Whether a row is neither blank nor malformed."""
    return len(row) == columns and all(row)


def embed_rows(args: argparse.Namespace, embed: Callable, rows: Sequence[Row], columns: int) -> np.ndarray:
    """The embeddings of rows of so many texts, float32 [rows, columns, embedding_size], NaN where one is not complete.
    Warns of texts that are cut or not seen, with their places; with --strict_data that is an InputError."""
    good = [complete(row, columns) for _, row in rows]
    texts = [given for _, row in compress(rows, good) for given in row]
    places = [place for place, _ in compress(rows, good)]

    def complain(remark: str, which: list[int]) -> None:
        message = (f"{len(which):,} of {len(texts):,} texts {remark}: "
                   f"{', '.join(dict.fromkeys(places[text // columns] for text in which[:3]))}")
        if args.strict_data:
            raise p.InputError(f"{message} (--strict_data)")
        print(message, file=sys.stderr)

    found = embed(texts, complain=complain)
    found = found.reshape(-1, columns, found.shape[1])
    if all(good):
        return found
    embeddings = np.full((len(rows), *found.shape[1:]), np.nan, "float32")
    embeddings[good] = found
    return embeddings


def write_whole(path: str, write: Callable[[Any], Any]) -> None:
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


def print_rows(form: str | None, names: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A line a row: "tsv", with blanks between the numbers of an embedding, empty where that is NaN; "jsonl", null
    where that is NaN; None: the last field alone."""
    for *texts, result in rows:
        missing = np.isnan(result).any()
        if form == "jsonl":  # json leaves these three as they are, and str.splitlines ends a line there
            line = json.dumps(dict(zip(names, (*texts, None if missing else result))), ensure_ascii=False)
            print(line.translate({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}))
        elif form:
            numbers = " ".join(map(str, result)) if isinstance(result, list) else str(result)
            print(*map(one_line, texts), "" if missing else numbers, sep="\t")
        else:
            print(result)


def log(args: argparse.Namespace, message: str) -> None:
    """Print one line to stderr, unless --quiet; stdout is for results."""
    if not args.quiet:
        print(message, file=sys.stderr, flush=True)


def benchmark(args: argparse.Namespace, embed: Callable, texts: list[str]) -> None:
    """Time text to embedding, tokenizing included; figures to stderr and, as JSON, to --save_log_path."""
    rows = []
    for size in sorted({1, args.batch_size or 32}):
        work = partial(embed, (texts * size)[:size], batch_size=size)
        seconds = sorted(timeit.repeat(work, "gc.enable()", number=1, repeat=60)[10:])  # the first ones warm up
        latencies = {f"p{part}_ms": round(1000 * seconds[50 * part // 100], 3) for part in (50, 95, 99)}
        rows.append({"batch_size": size, **latencies, "texts_per_second": round(size * 50 / sum(seconds), 1)})
        log(args, "benchmark: " + ", ".join(f"{key} {figure}" for key, figure in rows[-1].items()))
    settings = {flag: getattr(args, flag) for flag in (
        "max_seq_length", "device", "precision", "cpu_threads", "use_tensorrt", "enable_mkldnn")}
    path = os.path.join(args.save_log_path, f"benchmark_{time.strftime('%Y%m%d_%H%M%S')}.json")
    content = {"machine": platform.platform(), "cores": os.cpu_count(), "settings": settings, "results": rows}
    write_whole(path, lambda file: file.write(json.dumps(content, indent=2).encode()))
    log(args, f"wrote {path}")


def predict(args: argparse.Namespace) -> None:
    """Do what the flags ask for."""
    pairs = read_rows(args, "text_pair_file", 2)
    texts = [("--text", [given]) for given in args.text] + read_rows(args, "input_file", 1)
    bare = not (texts or pairs)
    texts = [("README", [README_TEXT])] if bare else texts
    threads = args.cpu_threads or p.CPU_CORES
    on_cpu = f", {threads} thread{'s' * (threads > 1)}" if args.device == "cpu" else ""
    sizes = {"text": sum(complete(row, 1) for _, row in texts), "pair": sum(complete(row, 2) for _, row in pairs)}
    counts = "; ".join(f"{size:,} {noun}{'s' * (size != 1)}" for noun, size in sizes.items())
    log(args, f"predict.py: {args.device}{on_cpu}, {args.precision}; {args.model_dir}; {counts}")
    predictor = p.Predictor(args.model_dir, args.device, threads, args.precision, 10 if args.enable_mkldnn else 0,
                            (args.batch_size or 32, args.max_seq_length) if args.use_tensorrt else ())
    embed = partial(p.encode, predictor, p.Tokenizer(args.model_dir), max_seq_length=args.max_seq_length,
                    batch_size=args.batch_size)
    if texts:
        embeddings = embed_rows(args, embed, texts, 1)[:, 0]
        if args.output_file:
            write_whole(args.output_file, lambda file: np.save(file, embeddings))
            log(args, f"wrote {len(embeddings)} x {embeddings.shape[1]} float32 to {args.output_file}")
        elif args.format:
            print_rows(args.format, ("text", "embedding"),
                       (("\t".join(row), embedding) for (_, row), embedding in zip(texts, embeddings.tolist())))
        else:
            print(embeddings.shape, embeddings, sep="\n")
    if pairs or bare:
        pairs = pairs or [("README", pair) for pair in README_PAIRS]
        cosines = embed_rows(args, embed, pairs, 2).prod(axis=1).sum(axis=1).clip(-1, 1).tolist()
        if bare and not args.format:
            print(cosines)
        else:
            print_rows(args.format, ("query", "title", "cosine"),
                       ((pair[0], "\t".join(pair[1:]), cosine) for (_, pair), cosine in zip(pairs, cosines)))
    if args.benchmark:
        benchmark(args, embed, [given for _, row in texts or pairs for given in row if given])


def main() -> int:
    """Run; the exit code: 2 for a mistake in a flag or a file, 130 for Ctrl-C."""
    try:
        predict(parse_args())
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of stdout (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("predict.py: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        message = f"{error.name} {NOT_INSTALLED}"
    except (p.InputError, OSError) as error:
        message = p.first_line(error)
    except MemoryError as error:
        message = f"out of memory: {p.first_line(error)}; a lower --batch_size or --max_seq_length takes less"
    except RuntimeError as error:
        message = p.first_line(error)
        if "dynamic library" not in message:  # of CUDA's, which paddle opens when it needs them
            raise
    print(f"predict.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
