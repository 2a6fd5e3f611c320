"""Command-line flags: the kinds of their values, those that several scripts share, and what is refused."""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from simcse import console
from simcse.files import STDIN
from simcse.machine import RANK, RANKS, auto_precision, default_threads

DEFAULT_MODEL = "rocketqa-zh-base-query-encoder"
POOLINGS = ("pooler", "mean", "first_last_avg")  # see model.py
DEFAULT_PARAMS = "checkpoints/model_20000/model_state.pdparams"
COLLECTION = "simcse"  # of Milvus
README_TEXT = "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in every help text, no abbreviations, and usage errors in one line."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.add_argument("--quiet", action="store_true",
                          help="no log lines and no progress on stderr, only warnings and errors")

    def parse_known_args(self, args=None, namespace=None):
        # argparse checks default values, which may name files, before it reports a flag that it does not know.
        for word in sys.argv[1:] if args is None else args:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"no such flag: {flag}" + (f"; did you mean {close[0]}?" if close else ""))
        known, unknown = super().parse_known_args(args, namespace)
        console.be_quiet(known.quiet)
        return known, unknown

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _number(kind: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


positive_int = _number(int, lambda v: v >= 1, "a whole number from 1 up")
natural_int = _number(int, lambda v: v >= 0, "a whole number from 0 up")
probability = _number(float, lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")
proportion = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
positive_float = _number(float, lambda v: 0 < v < math.inf, "a number above 0")
natural_float = _number(float, lambda v: 0 <= v < math.inf, "a number from 0 up")
port = _number(int, lambda v: 0 <= v < 65536, "a port from 0 to 65535")
hnsw_links = _number(int, lambda v: v >= 2, "a whole number from 2 up")
sequence_length = _number(int, lambda v: v >= 3, "a whole number from 3 up ([CLS], a token, [SEP])")


def readable_file(path: str) -> str:
    """Check, before anything heavy is imported, that `path` is a file that can be opened."""
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def file_or_stdin(path: str) -> str:
    """A file that can be opened, or `-`: stdin."""
    return path if path == STDIN else readable_file(path)


class _SetIfGiven(argparse.Action):
    """A positional argument that is another way to say what a flag says."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values is not None:
            setattr(namespace, self.dest, values)


def add_lines_argument(parser: argparse.ArgumentParser, flag: str, what: str, required: bool = False) -> None:
    """`flag` FILE, or - for stdin, with the flag or without it."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(flag, type=file_or_stdin, default=None, help=f"{what}; -: from stdin, answered as they come")
    group.add_argument(flag.removeprefix("--"), nargs="?", metavar="-", choices=[STDIN], action=_SetIfGiven,
                       help=f"the same as {flag} -")


def add_format_argument(parser: argparse.ArgumentParser, what: str, default: str | None = None) -> None:
    parser.add_argument("--format", choices=("tsv", "jsonl"), default=default, help=what)


def folder(path: str) -> str:
    """Check that `path` is a folder."""
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return path


def model_name(text: str) -> str:
    """A hub name, or a folder that exists: a mistyped folder must not be looked up on the hub."""
    looks_local = text.startswith((".", "/", "~")) or text.endswith("/") or os.path.isdir(os.path.dirname(text))
    if looks_local and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    if os.path.isfile(os.path.join(text, "simcse_config.json")):
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
    parser.add_argument("--params_path", type=checkpoint_file, default=params_path, required=params_path is None,
                        help="checkpoint to load: model_state.pdparams, model_state.safetensors or the folder that "
                        "holds it")
    parser.add_argument("--model_name_or_path", type=model_name, default=None,
                        help="encoder (hub name or folder) of a checkpoint that has no simcse_config.json beside it; "
                        f"None: what the checkpoint records, else {DEFAULT_MODEL}")
    parser.add_argument("--output_emb_size", type=natural_int, default=None,
                        help="size of the embedding; None: read off the checkpoint. A value that contradicts the "
                        "checkpoint is an error")


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every stage that turns texts into embeddings."""
    parser.add_argument("--max_seq_length", type=sequence_length, default=64,
                        help="tokens per text, [CLS] and [SEP] included; longer texts are cut")
    parser.add_argument("--batch_size", type=positive_int, default=None,
                        help="texts per batch; None: as many as fill 2,048 tokens on a CPU, 65,536 on a GPU")
    add_strict_argument(parser)
    add_device_argument(parser)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="number format of the matrix products; auto: bf16 on a CPU that is faster in it (AMX, "
                        "or AMD's AVX-512 BF16), else fp32. fp16 needs --device gpu")
    parser.add_argument("--cpu_threads", type=natural_int, default=0, help="math threads on a CPU; 0: all cores")


def check_positions(parser: argparse.ArgumentParser, max_seq_length: int, folders: Iterable[str | None]) -> None:
    """Refuse texts longer than the encoder whose config is the first to be found in `folders`; a hub name has none."""
    for path, key in ((os.path.join(folder, name), key) for folder in folders if folder
                      for name, key in (("simcse_config.json", "encoder_config"), ("config.json", None))):
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            positions = (config[key] if key else config)["max_position_embeddings"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if max_seq_length > positions:
            parser.error(f"--max_seq_length {max_seq_length}: the encoder has {positions} positions")
        return


def check_device_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse `precision` and `cpu_threads` that would do nothing on the device asked for."""
    if args.precision == "fp16" and args.device != "gpu":
        parser.error("--precision fp16 needs --device gpu")
    if args.cpu_threads and args.device != "cpu":
        parser.error("--cpu_threads needs --device cpu")


def check_encode_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse flags of `add_encode_arguments` that would do nothing on the device asked for; returns `args`."""
    check_device_arguments(parser, args)
    named = vars(args)
    check_positions(parser, args.max_seq_length, (
        named.get("model_name_or_path"), os.path.dirname(named.get("params_path") or "")))
    return args


def nonempty_text(text: str) -> str:
    """Check that a text given on the command line is one."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"not UTF-8: {ascii(text)}")
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text")
    return text


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu", help="device to run on")


def add_strict_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict_data", action="store_true",
                        help="stop at the first malformed line instead of skipping and reporting it")


def announce(args: argparse.Namespace, *parts: str) -> None:
    """Say, before anything takes time, what is about to happen: on what, in what precision, with which files.

    Args:
        args: with `device`; also `precision` and `cpu_threads` where the script has them.
        parts: what else there is to say, the model first.
    """
    named, what = vars(args), [args.device]
    if args.device == "cpu":
        threads = named.get("cpu_threads") or default_threads()
        what.append(f"{threads} thread{'s' * (threads > 1)}")
    precision = named.get("precision", "fp32")
    what.append(auto_precision(args.device) if precision == "auto" else precision)
    if RANKS > 1:
        what.append(f"{RANKS} processes")
    if not RANK:
        console.log(f"{os.path.basename(sys.argv[0])}: " + "; ".join([", ".join(what), *parts]))


def count(items: Sequence[Any], noun: str) -> str:
    """How many there are, as in "1,000 texts"."""
    return f"{len(items):,} {noun}{'s' * (len(items) != 1)}"


# ---------------------------------------------------------------------------------------------------------- training
def names_of(*groups: argparse._ArgumentGroup) -> list[str]:
    """The names that the flags of some groups have in the parsed arguments."""
    return list(dict.fromkeys(action.dest for group in groups for action in group._group_actions))


def add_optimization_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags by which a network is trained, whatever its loss is."""
    group.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch and device")
    group.add_argument("--learning_rate", type=positive_float, default=5e-5, help="highest learning rate of AdamW")
    group.add_argument("--weight_decay", type=natural_float, default=0.0,
                       help="weight decay of AdamW, not on biases and norms")
    group.add_argument("--epochs", type=natural_int, default=1,
                       help="passes over the training texts; 0: save and evaluate the untrained network")
    group.add_argument("--warmup_proportion", type=proportion, default=0.0,
                       help="part of the steps over which the learning rate rises, before it falls linearly to 0")
    group.add_argument("--warmup_proption", dest="warmup_proportion", type=proportion, help=argparse.SUPPRESS)
    group.add_argument("--max_grad_norm", type=positive_float, default=None,
                       help="scale gradients down to this norm; None: leave them as they are")
    group.add_argument("--dropout", type=probability, default=0.1, help="hidden and attention dropout rate")
    group.add_argument("--seed", type=natural_int, default=1000, help="random seed")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                       help="number format of the matrix products; bf16 and fp16, with loss scaling, need --device gpu")


def add_run_arguments(device: argparse._ArgumentGroup, output: argparse._ArgumentGroup) -> None:
    """Where a training run computes, where it writes, and what it goes on from."""
    add_device_argument(device)
    device.add_argument("--cpu_threads", type=natural_int, default=0, help="math threads on a CPU; 0: all cores")
    output.add_argument("--resume", nargs="?", const="auto", default=None,
                        help="go on from a checkpoint folder, with its optimizer, schedule and place in the data, as "
                        "if there had been no break; auto: from the newest in --save_dir, or from the start where "
                        "there is none")
    output.add_argument("--keep_checkpoints", type=natural_int, default=0,
                        help="how many of the newest checkpoints to keep; 0: all. Only the newest can be gone on from")
    output.add_argument("--save_dir", default="./checkpoints", help="folder of the checkpoints")
    output.add_argument("--save_steps", type=positive_int, default=10000, help="steps between checkpoints")
    output.add_argument("--visualdl_dir", default="./log", help="folder of the VisualDL log")


def check_run_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace,
                        folders: Iterable[str | None]) -> None:
    """Refuse training flags that contradict the device, the encoder in one of `folders`, or each other."""
    if args.precision != "fp32" and args.device != "gpu":
        parser.error(f"--precision {args.precision} needs --device gpu: paddle has no such training on a CPU")
    check_device_arguments(parser, args)
    check_positions(parser, args.max_seq_length, [*folders, args.resume])
    if args.resume not in (None, "auto") and not os.path.isfile(os.path.join(args.resume, "training_state.json")):
        parser.error(f"argument --resume: {args.resume}: no checkpoint folder that training can go on from (it has no "
                     "training_state.json); --init_from_ckpt starts anew from a checkpoint's weights")
