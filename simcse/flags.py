"""Command-line flags: the kinds of their values, those that several scripts share, and what is refused."""

import argparse
import contextlib
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from simcse import console
from simcse.encoder.weights import CONFIG_FILE, DEFAULT_MODEL, STATE_RECORD, newest_resumable, read_record
from simcse.files import STDIN, read_json
from simcse.machine import CPU_THREADS, RANK, RANKS, auto_precision

ENCODE_LENGTH, TRAIN_LENGTH = 64, 128  # --max_seq_length where no checkpoint records one
DEFAULT_PARAMS = "checkpoints/model_20000/model_state.pdparams"
COLLECTION = "simcse"  # of Milvus
FUSED = 100  # documents that a ranking brings to a fusion, or as many as are asked for, if that is more
TRAIN_PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
AUTO_ON_GPU = "on a GPU bf16 from compute capability 8.0 on, fp16 on 7.x"
README_TEXT = "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in every help text, no abbreviations, and usage errors in one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.add_argument("--quiet", action="store_true", help="no log lines and no progress on stderr, only warnings "
                          "and errors")

    def parse_known_args(self, args=None, namespace=None):
        # argparse checks default values, which may name files, before it reports a flag that it does not know.
        for word in sys.argv[1:] if args is None else args:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"no such flag: {flag}" + (f"; did you mean {close[0]}?" if close else ""))
        known, unknown = super().parse_known_args(args, namespace)
        console.settings.quiet = known.quiet
        console.settings.strict = getattr(known, "strict_data", False)
        console.settings.plain_text = getattr(known, "plain_text", False)
        console.settings.memory_flags = [flag for flag in ("--batch_size", "--chunk_size", "--max_seq_length")
                                         if flag in self._option_string_actions]
        return known, unknown

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _kind(complaint: str, accepts: Callable[[Any], Any], convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """The type of a flag, which converts its text and complains about one that cannot be, or is not accepted then."""
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(complaint.format(text))

    return parse


positive_int = _kind("{!r} is not a whole number from 1 up", lambda v: v >= 1, int)
natural_int = _kind("{!r} is not a whole number from 0 up", lambda v: v >= 0, int)
probability = _kind("{!r} is not a number from 0 up to, not including, 1", lambda v: 0 <= v < 1, float)
proportion = _kind("{!r} is not a number from 0 to 1", lambda v: 0 <= v <= 1, float)
positive_float = _kind("{!r} is not a number above 0", lambda v: 0 < v < math.inf, float)
natural_float = _kind("{!r} is not a number from 0 up", lambda v: 0 <= v < math.inf, float)
port = _kind("{!r} is not a port from 0 to 65535", lambda v: 0 <= v < 65536, int)
hnsw_links = _kind("{!r} is not a whole number from 2 up", lambda v: v >= 2, int)
sequence_length = _kind("{!r} is not a whole number from 3 up ([CLS], a token, [SEP])", lambda v: v >= 3, int)
folder = _kind("{}: no such folder", os.path.isdir)
npy_file = _kind("{}: the name has to end in .npy", lambda path: path.endswith(".npy"))


def readable_file(path: str) -> str:
    """Check, before anything heavy is imported, that `path` is a file that can be opened."""
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {(error.strerror or str(error)).lower()}") from None


class _SetIfGiven(argparse.Action):
    """A positional argument that is another way to say what a flag says."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values is not None:
            setattr(namespace, self.dest, values)


def add_lines_argument(parser: argparse.ArgumentParser, flag: str, what: str, required: bool = False) -> None:
    """`flag` FILE, or - for stdin, with the flag or without it."""
    def lines_file(path: str) -> str:
        return path if path == STDIN else readable_file(path)

    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(flag, type=lines_file, default=None, help=f"{what}; -: from stdin, answered as they come")
    group.add_argument(flag.removeprefix("--"), nargs="?", metavar="FILE", type=lines_file, action=_SetIfGiven,
                       help=f"the same as {flag} FILE")


def model_name(text: str) -> str:
    """A hub name, or a folder that exists: a mistyped folder must not be looked up on the hub."""
    if text.startswith((".", "/", "~")) or text.endswith("/") or os.path.isdir(os.path.dirname(text)):
        folder(text)
    if os.path.isfile(os.path.join(text, CONFIG_FILE)):
        raise argparse.ArgumentTypeError(f"{text} is a SimCSE checkpoint, not an encoder; give it as a checkpoint")
    return text


def checkpoint_file(path: str) -> str:
    """The file of weights named by `path`, which may also be the folder that holds it."""
    if os.path.isdir(path):
        names = ("model_state.safetensors", "model_state.pdparams")
        path = next((each for name in names if os.path.isfile(each := os.path.join(path, name))), f"{path}/{names[1]}")
    return readable_file(path)


def milvus_uri(text: str) -> str:
    """A server's address, or a path that Milvus Lite takes."""
    if text.startswith(("http://", "https://")):
        return text
    if not text.endswith(".db") or "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is neither http://host:port nor a path that ends in .db")
    folder(os.path.dirname(text) or ".")
    return text


def add_model_arguments(parser: argparse.ArgumentParser, params_path: str | None = None) -> None:
    """The flags by which every later stage finds a trained checkpoint."""
    add = parser.add_argument
    add("--params_path", type=checkpoint_file, default=params_path, required=params_path is None,
        help="checkpoint to load: model_state.pdparams, model_state.safetensors or the folder that holds it")
    add("--model_name_or_path", type=model_name, help="encoder (hub name or folder) of a checkpoint that has no "
        f"simcse_config.json beside it; None: what the checkpoint records, else {DEFAULT_MODEL}")
    add("--output_emb_size", type=natural_int, help="size of the embedding; None: read off the checkpoint. A value "
        "that contradicts the checkpoint is an error")


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every stage that turns texts into embeddings."""
    add = parser.add_argument
    add("--max_seq_length", type=sequence_length, help="tokens per text, [CLS] and [SEP] included, others are cut. "
        f"None: as many as the checkpoint was trained with, {ENCODE_LENGTH} where it records none")
    add("--batch_size", type=positive_int,
        help="texts per batch; None: as many as fill 2,048 tokens on a CPU, 65,536 on a GPU")
    add_data_arguments(parser)
    add_device_arguments(parser)
    add("--precision", choices=(*TRAIN_PRECISIONS, "int8"), default="auto",
        help="number format of the matrix products; auto: bf16 on a CPU that is faster in it (AMX, or AMD's AVX-512 "
        f"BF16), {AUTO_ON_GPU}, else fp32. tf32 and fp16 need --device gpu; int8 --device cpu and "
        "requirements-openvino.txt")
    add_calibration_argument(parser)


def add_calibration_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration_file", type=readable_file, help="texts, one a line, of which some hundred set "
                        "the ranges of --precision int8, once for a checkpoint; None: those that are encoded first")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace,
                    length: int = ENCODE_LENGTH) -> argparse.Namespace:
    """Refuse what would do nothing on the device asked for, and texts longer than the encoder, where a flag names a
    folder that describes it; returns `args`. Where no --max_seq_length is given it is the one that the checkpoint
    records, else `length`."""
    if args.precision in ("tf32", "fp16") and args.device != "gpu":
        parser.error(f"--precision {args.precision} needs --device gpu")
    if args.precision == "int8" and args.device != "cpu":
        parser.error("--precision int8 needs --device cpu")
    if vars(args).get("calibration_file") and args.precision != "int8":
        parser.error("--calibration_file needs --precision int8")
    if args.cpu_threads and args.device != "cpu":
        parser.error("--cpu_threads needs --device cpu")
    named = vars(args)
    weights, given = named.get("params_path") or named.get("init_from_ckpt"), named.get("max_seq_length")
    checkpoint = os.path.dirname(weights) or "." if weights else named.get("resume") or ""
    record = read_record(checkpoint) if checkpoint else {}
    recorded, whitened_at = record.get("max_seq_length"), record.get("whitened_at")
    args.max_seq_length = given or recorded or length
    if whitened_at and args.max_seq_length > whitened_at and not RANK:
        console.warn(f"--max_seq_length {args.max_seq_length}: {checkpoint} was whitened at {whitened_at} tokens, and "
                     "does not suit longer texts; whiten it (train.py --whiten) at the length that you use")
    elif recorded and args.max_seq_length != recorded and not RANK:
        console.warn(f"--max_seq_length {given}: {checkpoint} was trained with {recorded}; embeddings of texts that "
                     "are cut differ")
    for path in filter(None, (named.get("model_name_or_path"), checkpoint)):
        config = read_record(path).get("encoder_config") or read_json(os.path.join(path, "config.json"))
        if positions := config.get("max_position_embeddings"):
            if args.max_seq_length > positions:
                parser.error(f"--max_seq_length {args.max_seq_length}: the encoder has {positions} positions")
            break
    return args


def nonempty_text(text: str) -> str:
    """Check that a text given on the command line is one."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"not UTF-8: {ascii(text)}")
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text")
    return text


def given_text(text: str) -> str:
    """A text given on the command line, on one line as those of files are."""
    return console.one_line(nonempty_text(text))


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu", help="device to run on")
    parser.add_argument("--cpu_threads", type=natural_int, default=0, help="math threads on a CPU; 0: all cores")


def add_strict_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict_data", action="store_true",
                        help="stop at the first malformed line instead of skipping and reporting it")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """How text files are read."""
    add_strict_argument(parser)
    parser.add_argument("--plain_text", action="store_true", help="a file's lines are texts, and tabs alone part "
                        "columns, though it looks like CSV, JSON lines, labels or a header, which are refused")


def add_targets_argument(parser: argparse._ActionsContainer, flag: str = "--similar_text_pair") -> None:
    """What the second column of the file that `flag` names is."""
    parser.add_argument("--targets", choices=("text", "id"), default="text", help=f"what the second column of {flag} "
                        "is: the text of a document, or its id in a corpus that has them")


def add_target_texts_arguments(parser: argparse._ActionsContainer, flag: str) -> None:
    """The same, and where the texts of ids stand."""
    add_targets_argument(parser, flag)
    parser.add_argument("--corpus_file", type=readable_file, help="an id, a tab and a text a line, for --targets id")


def check_target_texts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse ids without a corpus, and a corpus without ids."""
    if (args.targets == "id") != bool(args.corpus_file):
        parser.error("--targets id and --corpus_file go together")


def announce(args: argparse.Namespace, *parts: str) -> None:
    """Say, before anything takes time, what is about to happen: on what, in what precision, and `parts`, the model
    first."""
    named = {"cpu_threads": 0, "precision": "fp32", **vars(args)}
    threads = named["cpu_threads"] or CPU_THREADS
    precision = auto_precision(args.device) if named["precision"] == "auto" else named["precision"]
    what = [args.device, *[f"{threads} thread{'s' * (threads > 1)}"] * (args.device == "cpu"), precision,
            *[f"{RANKS} processes"] * (RANKS > 1)]
    if not RANK:
        console.log(f"{console.PROGRAM}: " + "; ".join([", ".join(what), *parts]))


def count(items: Sequence[Any], noun: str) -> str:
    """How many there are, as in "1,000 texts"."""
    return f"{len(items):,} {noun}{'s' * (len(items) != 1)}"


# ---------------------------------------------------------------------------------------------------------- training
def add_optimization_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags by which a network is trained, whatever its loss is."""
    add = group.add_argument
    add("--batch_size", type=positive_int, default=32, help="texts per batch and device")
    add("--learning_rate", type=positive_float, default=5e-5, help="highest learning rate of AdamW")
    add("--weight_decay", type=natural_float, default=0.0, help="weight decay of AdamW, not on biases and norms")
    add("--epochs", type=natural_int, default=1,
        help="passes over the training texts; 0: save and evaluate the untrained network")
    add("--warmup_proportion", type=proportion, default=0.0,
        help="part of the steps over which the learning rate rises, before it falls linearly to 0")
    add("--warmup_proption", dest="warmup_proportion", type=proportion, help=argparse.SUPPRESS)
    add("--max_grad_norm", type=positive_float, help="scale gradients down to this norm; None: leave them as they are")
    add("--dropout", type=probability, default=0.1, help="hidden and attention dropout rate")
    add("--max_seq_length", type=sequence_length, help="tokens per text, [CLS] and [SEP] included, others are cut. "
        f"None: that of the checkpoint that training goes on from, else {TRAIN_LENGTH}")
    add("--seed", type=natural_int, default=1000, help="random seed")
    add("--precision", choices=TRAIN_PRECISIONS, default="auto",
        help=f"number format of the matrix products; auto: {AUTO_ON_GPU}, else fp32, or that of the run that --resume "
        "goes on with. tf32, bf16 and fp16, with loss scaling, need --device gpu")


def add_run_arguments(device: argparse._ArgumentGroup, output: argparse._ArgumentGroup) -> None:
    """Where a training run computes, where it writes, and what it goes on from."""
    add_device_arguments(device)
    add = output.add_argument
    add("--resume", nargs="?", const="auto", help="go on from a checkpoint folder, with its optimizer, schedule and "
        "place in the data, as if there had been no break; auto: from the newest in --save_dir, or from the start "
        "where there is none")
    add("--keep_checkpoints", type=natural_int, default=0,
        help="how many of the newest checkpoints to keep; 0: all. Only the newest can be gone on from")
    add("--save_dir", default="./checkpoints", help="folder of the checkpoints")
    add("--save_steps", type=positive_int, default=10000, help="steps between checkpoints")
    add("--visualdl_dir", default="./log", help="folder of the VisualDL log")


def check_run_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, start: argparse._ArgumentGroup,
                        *learning: argparse._ArgumentGroup) -> argparse.Namespace:
    """Refuse training flags that contradict the device, the encoder, or each other; returns `args`, with the names of
    the flags of `learning`, which a resumed run has to share, and with those of `start` before them."""
    if args.precision not in ("auto", "fp32") and args.device != "gpu":
        parser.error(f"--precision {args.precision} needs --device gpu: paddle has no such training on a CPU")
    if args.resume not in (None, "auto") and not os.path.isfile(os.path.join(args.resume, STATE_RECORD)):
        parser.error(f"argument --resume: {args.resume}: no checkpoint folder that training can go on from (it has no "
                     f"{STATE_RECORD}); --init_from_ckpt starts anew from a checkpoint's weights")
    args.learns_by = list(dict.fromkeys(action.dest for group in learning for action in group._group_actions))
    args.hyper_parameters = [action.dest for action in start._group_actions] + args.learns_by
    return check_arguments(parser, args, TRAIN_LENGTH)


def training_precision(device: str, resumed: str | None) -> str:
    """What `--precision auto` is in training: on a GPU that of the run that left the checkpoint folder `resumed`, if
    any; on a CPU fp32, as paddle has no other."""
    if device != "gpu":
        return "fp32"
    run = read_json(os.path.join(resumed, STATE_RECORD)).get("run", {}) if resumed else {}
    return run.get("precision") or auto_precision(device)


def announce_training(args: argparse.Namespace, start: str, texts: str) -> None:
    """Find the checkpoint that --resume auto means, and what --precision auto is, and announce the run: from where,
    else `start`, on which texts."""
    if args.resume == "auto":
        args.resume = newest_resumable(args.save_dir)
    if args.precision == "auto":
        args.precision = training_precision(args.device, args.resume)
    announce(args, args.resume or start, texts, f"{args.epochs} epochs in batches of {args.batch_size}")
