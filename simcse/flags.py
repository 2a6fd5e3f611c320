"""Command-line flags: the types of their values, the groups that several scripts share, and their checks.

This file is above the rooms of simcse/: it may import their tables of names, and they import nothing from here. Parsing
must not import paddle.
"""

import argparse
import difflib
import math
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

from simcse import console
from simcse.encoder.pooling import POOLINGS
from simcse.encoder.sentence_transformers import read_length
from simcse.encoder.weights import CONFIG_FILE, DEFAULT_MODEL, WEIGHT_FILES, read_record
from simcse.files import STDIN, read_json
from simcse.hub_layout import MODULES_FILE, find_encoder, is_hugging_face
from simcse.machine import CPU_THREADS, ENCODE_PRECISIONS, RANK, RANKS, TRAIN_PRECISIONS, auto_precision
from simcse.text.prefixes import INPUT_TYPES
from simcse.training.checkpoints import STATE_RECORD, newest_resumable

# --max_seq_length where neither the flag nor the checkpoint says it.
ENCODE_LENGTH = 64
TRAIN_LENGTH = 128
DEFAULT_PARAMS = "checkpoints/model_20000/model_state.pdparams"
COLLECTION = "simcse"  # of Milvus
AUTO_ON_GPU = "on a GPU bf16 from compute capability 8.0 on, fp16 on 7.x"
README_TEXT = "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据"  # of the original README


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add "(default: ...)" to every help text, except where it would say None or False.

    Such a flag says in its own help text what happens without it.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser with --quiet, defaults in the help texts, no abbreviated flags, and usage errors in one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.add_argument("--quiet", action="store_true",
                          help="print only warnings and errors to stderr, no log lines and no progress")

    def parse_known_args(self, args=None, namespace=None):
        # argparse checks default values, which may name files, before it reports a flag that it does not know.
        self._check_flag_names(sys.argv[1:] if args is None else args)
        known, unknown = super().parse_known_args(args, namespace)
        console.settings.quiet = known.quiet
        console.settings.strict_data = getattr(known, "strict_data", False)
        console.settings.plain_text = getattr(known, "plain_text", False)
        console.settings.memory_flags = [flag for flag in ("--batch_size", "--chunk_size", "--max_seq_length")
                                         if flag in self._option_string_actions]
        return known, unknown

    def _check_flag_names(self, words: list[str]) -> None:
        for word in words:
            flag = word.split("=")[0]
            if not flag.startswith("--") or flag in self._option_string_actions:
                continue
            similar = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            self.error(f"no such flag: {flag}{hint}")

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


# ---------------------------------------------------------------------------------------------------- types of values
# The functions for type= of a flag. Each takes the text that the user gave and returns the value, or raises
# ArgumentTypeError, whose message argparse prints after "argument --flag:".
MAX_INT = 2**31 - 1  # the largest that paddle and numpy take everywhere


def _number(expected: str, convert: type, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return the type of a flag that takes a number of some range.

    Args:
        expected: the range, for the error message.
        convert: int or float.
        accepts: returns whether a number is in the range.
    """
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        if convert is int and value > MAX_INT:
            raise argparse.ArgumentTypeError(f"expected an integer <= {MAX_INT}, got {text!r}")
        return value

    return parse


positive_int = _number("an integer >= 1", int, lambda value: value >= 1)
non_negative_int = _number("an integer >= 0", int, lambda value: value >= 0)
sequence_length = _number("an integer >= 3 ([CLS], a token, [SEP])", int, lambda value: value >= 3)
port = _number("a port in [0, 65535]", int, lambda value: 0 <= value <= 65535)
positive_float = _number("a number > 0", float, lambda value: 0 < value < math.inf)
non_negative_float = _number("a number >= 0", float, lambda value: 0 <= value < math.inf)
fraction_below_one = _number("a number in [0, 1)", float, lambda value: 0 <= value < 1)
fraction = _number("a number in [0, 1]", float, lambda value: 0 <= value <= 1)


def folder(path: str) -> str:
    """Return `path` if it is a folder."""
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return path


def npy_file(path: str) -> str:
    """Return `path` if its name ends in .npy, as that of a file to write has to."""
    if not path.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"{path}: the name has to end in .npy")
    return path


def readable_file(path: str) -> str:
    """Return `path` if the file can be opened: a mistyped name is an error before anything heavy is imported."""
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise argparse.ArgumentTypeError(f"{path}: {reason}") from None


def readable_file_or_stdin(path: str) -> str:
    """Return `path` if it is -, which means stdin, or a file that can be opened."""
    return path if path == STDIN else readable_file(path)


def model_name(text: str) -> str:
    """Return `text` if it can be an encoder: a name on the hub, or a folder.

    What looks like a folder has to exist, so that a mistyped folder is not looked up on the hub.
    """
    if text.startswith((".", "/", "~")) or text.endswith("/") or os.path.isdir(os.path.dirname(text)):
        folder(text)
    if os.path.isfile(os.path.join(text, CONFIG_FILE)):
        raise argparse.ArgumentTypeError(f"{text} is a SimCSE checkpoint, not an encoder; give it as a checkpoint")
    return text


def checkpoint_file(path: str) -> str:
    """Return `path` if it is a file that can be opened; if it is a folder, the file of weights in it."""
    if not os.path.isdir(path):
        return readable_file(path)
    for name in WEIGHT_FILES:
        file = os.path.join(path, name)
        if os.path.isfile(file):
            return readable_file(file)
    if is_hugging_face(path):
        raise argparse.ArgumentTypeError(f"{path} is an encoder, not a checkpoint; train.py --epochs 0 "
                                         f"--model_name_or_path {path} makes one of it")
    return readable_file(f"{path}/{WEIGHT_FILES[-1]}")  # raises, and names the usual file


def milvus_uri(text: str) -> str:
    """Return `text` if it is the address of a Milvus server, or a file of Milvus Lite in a folder that exists.

    It must have no credentials: it is logged.
    """
    if "://" in text and "@" in text:
        raise argparse.ArgumentTypeError("give user:password in the environment as MILVUS_TOKEN, not in the address")
    if text.startswith(("http://", "https://")):
        _check_address(text)
        return text
    if not text.endswith(".db") or "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is neither http://host:port nor a path that ends in .db")
    folder(os.path.dirname(text) or ".")
    return text


def _check_address(text: str) -> None:
    """Raise ArgumentTypeError if an http address has no host or a wrong port."""
    try:
        address = urllib.parse.urlsplit(text)
        port_is_zero = address.port == 0
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if port_is_zero or not address.hostname or not address.hostname.isascii():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form http://host:port")


def nonempty_text(text: str) -> str:
    """Return `text` if it is UTF-8 and not blank."""
    if not console.is_unicode(text):
        raise argparse.ArgumentTypeError(f"not UTF-8: {ascii(text)}")
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text")
    return text


def prefix(text: str) -> str:
    """Return `text` if it is UTF-8; it may be empty, and end in a blank or a line feed."""
    return nonempty_text(text) if text.strip() else text


def given_text(text: str) -> str:
    """Return a text that is not blank, on one line, as the texts of files are."""
    return console.one_line(nonempty_text(text))


# ------------------------------------------------------------------------------------------- flags that scripts share
class _StoreIfGiven(argparse.Action):
    """Store the value of an optional positional argument only where there is one.

    argparse's own "store" also stores None for a positional that is not given, over the value of the flag of that name.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        if values is not None:
            setattr(namespace, self.dest, values)


def add_lines_argument(parser: argparse.ArgumentParser, flag: str, description: str, required: bool = False) -> None:
    """Add a flag that takes a file of lines, or - for stdin, and the positional argument that does the same."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(flag, type=readable_file_or_stdin,
                       help=f"{description}; -: stdin, streamed: each line is answered when it arrives")
    group.add_argument(flag.removeprefix("--"), nargs="?", metavar="FILE", type=readable_file_or_stdin,
                       action=_StoreIfGiven, help=f"the same as {flag} FILE")


def add_model_arguments(parser: argparse._ActionsContainer, params_path: str | None = None) -> None:
    """Add the flags with which the stages after training find a checkpoint.

    Args:
        params_path: the default of --params_path; None: the flag is required.
    """
    add = parser.add_argument
    add("--params_path", type=checkpoint_file, default=params_path, required=params_path is None,
        help="checkpoint to load: model_state.pdparams, model_state.safetensors or the folder that holds it")
    add("--model_name_or_path", type=model_name, help="encoder (hub name or folder) of a checkpoint without "
        f"simcse_config.json (default: the one that the checkpoint records, or {DEFAULT_MODEL})")
    add("--output_emb_size", type=non_negative_int,
        help="size of the embedding; it must agree with the checkpoint (default: as in the checkpoint)")


def add_encode_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags of every stage that encodes texts."""
    add = parser.add_argument
    add("--max_seq_length", type=sequence_length, help="tokens per text, with [CLS] and [SEP]; longer texts are cut "
        f"(default: as in training, or {ENCODE_LENGTH} where the checkpoint does not record it)")
    add("--batch_size", type=positive_int,
        help="texts per batch (default: as many as fill 2,048 tokens on a CPU, 65,536 on a GPU)")
    add_prefix_arguments(parser, "that of the checkpoint")
    add_data_arguments(parser)
    add_device_arguments(parser)
    add("--precision", choices=ENCODE_PRECISIONS, default="auto",
        help="number format of the matrix products; auto: bf16 on a CPU that is faster in it (AMX, or AMD's AVX-512 "
        f"BF16), {AUTO_ON_GPU}, else fp32. tf32 and fp16 need --device gpu; int8 needs --device cpu and "
        "requirements-openvino.txt")
    add_calibration_argument(parser)


def add_prefix_arguments(parser: argparse._ActionsContainer, default: str) -> None:
    """Add the flags of what is put before texts that are encoded; `default` says what they are without them."""
    for side in INPUT_TYPES:
        parser.add_argument(f"--{side}_prefix", type=prefix, metavar="TEXT",
                            help=f"put this before each {side} that is encoded; words are searched, and results "
                            f'written, without it; "": nothing (default: {default})')


def add_calibration_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--calibration_file", type=readable_file, help="a text a line, or its id, a tab and the "
                        "text; the first time that a checkpoint is used with --precision int8, up to 128 of them "
                        "calibrate the quantization ranges (default: the texts that are encoded first)")


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu", help="device to run on")
    parser.add_argument("--cpu_threads", type=non_negative_int, default=0, help="math threads on a CPU; 0: all cores")


def add_strict_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--strict_data", action="store_true",
                        help="stop at the first malformed line instead of skipping and reporting it")


def add_data_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say how text files are read."""
    add_strict_argument(parser)
    parser.add_argument("--plain_text", action="store_true", help="read every line as text with tabs between columns, "
                        "even if the file looks like CSV, JSON lines, labels or a header, which are errors otherwise")


def add_targets_argument(parser: argparse._ActionsContainer, flag: str = "--similar_text_pair") -> None:
    """Add the flag that says what the second column of the file that `flag` names is."""
    parser.add_argument("--targets", choices=("text", "id"), default="text", help=f"what the second column of {flag} "
                        "is: the text of a document, or its id in a corpus that has them")


def add_target_texts_arguments(parser: argparse._ActionsContainer, flag: str) -> None:
    """Add --targets, and the corpus in which the ids are looked up."""
    add_targets_argument(parser, flag)
    parser.add_argument("--corpus_file", type=readable_file, help="an id, a tab and a text a line, for --targets id")


# ------------------------------------------------------------------------------------------------------------- checks
def check_target_texts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse --targets id without --corpus_file, and the reverse."""
    if (args.targets == "id") != bool(args.corpus_file):
        parser.error("--targets id and --corpus_file go together")


def set_max_seq_length(args: argparse.Namespace, default: int = ENCODE_LENGTH) -> None:
    """Set `args.max_seq_length`, where the flag is not given, to what the checkpoint records, else what a new run's
    encoder does, else to `default`."""
    given = getattr(args, "max_seq_length", None)  # export_model.py has no such flag
    args.max_seq_length = (given or read_checkpoint_record(args).get("max_seq_length")
                           or read_encoder_length(args) or default)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict the device or the encoder, and warn of a length that does not suit the checkpoint.

    Args:
        args: of a script with `add_device_arguments` and a --precision; `max_seq_length` is set.
    """
    check_device(parser, args)
    warn_of_other_length(args)
    check_length(parser, args)


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a precision that the device does not have, and flags that would do nothing on it."""
    if args.precision in ("tf32", "fp16") and args.device != "gpu":
        parser.error(f"--precision {args.precision} needs --device gpu")
    if args.precision == "int8" and args.device != "cpu":
        parser.error("--precision int8 needs --device cpu")
    if getattr(args, "calibration_file", None) and args.precision != "int8":
        parser.error("--calibration_file needs --precision int8")
    if args.cpu_threads and args.device != "cpu":
        parser.error("--cpu_threads needs --device cpu")


def checkpoint_folder(args: argparse.Namespace) -> str | None:
    """Return the folder of the checkpoint that a flag names, or that --resume auto finds; None where there is none."""
    for flag in ("params_path", "init_from_ckpt"):
        weights = getattr(args, flag, None)
        if weights:
            return os.path.dirname(weights) or "."
    resume = getattr(args, "resume", None)
    return newest_resumable(args.save_dir) if resume == "auto" else resume


def read_checkpoint_record(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the checkpoint that a flag names records of itself; {} where there is none."""
    checkpoint = checkpoint_folder(args)
    return read_record(checkpoint) if checkpoint else {}


def read_encoder_length(args: argparse.Namespace) -> int | None:
    """Return the length that the folder of a new run's encoder names; None: no folder does.

    transformers' own folders name none that is meant: theirs is the number of positions.
    """
    name = getattr(args, "model_name_or_path", None)
    if name is None or checkpoint_folder(args) or not os.path.isfile(os.path.join(name, MODULES_FILE)):
        return None
    return read_length(find_encoder(name))


def warn_of_other_length(args: argparse.Namespace) -> None:
    """Warn where --max_seq_length differs from the checkpoint's, or is more than it was whitened at.

    Passages are split, not cut, so that theirs may differ.
    """
    if RANK:
        return
    checkpoint = checkpoint_folder(args)
    record = read_checkpoint_record(args)
    trained_at = record.get("max_seq_length")
    whitened_at = record.get("whitened_at")
    if whitened_at and args.max_seq_length > whitened_at:
        console.warn(f"--max_seq_length {args.max_seq_length}: {checkpoint} was whitened at {whitened_at} tokens, and "
                     "does not suit longer texts; whiten it (train.py --whiten) at the length that you use")
    elif trained_at and args.max_seq_length != trained_at and not getattr(args, "passages", False):
        console.warn(f"--max_seq_length {args.max_seq_length}: {checkpoint} was trained with {trained_at}; embeddings "
                     "of texts that are cut differ")


def check_length(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a --max_seq_length that is more than the encoder's positions, as far as they are known."""
    positions = find_positions(args)
    if positions and args.max_seq_length > positions:
        parser.error(f"--max_seq_length {args.max_seq_length}: the encoder has {positions} positions")


def find_positions(args: argparse.Namespace) -> int | None:
    """Return how many positions the encoder has; None where no flag names a folder that tells."""
    for path in (getattr(args, "model_name_or_path", None), checkpoint_folder(args)):
        if not path:
            continue
        config = read_record(path).get("encoder_config") or read_json(os.path.join(path, "config.json"))
        positions = config.get("max_position_embeddings")
        if isinstance(positions, int):
            return positions
    return None


def choose_precision(args: argparse.Namespace) -> str:
    """Return the number format that --precision names, and for "auto" the one that is taken."""
    precision = getattr(args, "precision", "fp32")
    if precision != "auto":
        return precision
    pooling = POOLINGS.get(read_checkpoint_record(args).get("pooling"))
    if args.device == "cpu" and pooling and pooling.removes_layers:
        return "fp32"  # a `TableEngine` has no other
    return auto_precision(args.device)


def announce(args: argparse.Namespace, *parts: str) -> None:
    """Log, before anything takes time, what the script is about to do.

    Args:
        args: the script's flags; those of the device are part of the line.
        parts: what else the line says, the model first.
    """
    if RANK:
        return
    machine = [args.device]
    if args.device == "cpu":
        machine.append(console.count(getattr(args, "cpu_threads", 0) or CPU_THREADS, "thread"))
    machine.append(choose_precision(args))
    if RANKS > 1:
        machine.append(f"{RANKS} processes")
    console.log(f"{console.PROGRAM}: " + "; ".join([", ".join(machine), *parts]))


# ---------------------------------------------------------------------------------------------------------- training
# Three tables say what a run that goes on by --resume does with each flag of train.py and scripts/pretrain.py. Every
# flag is in one of them; `check_resume_tables` raises where one is not.
# START_FLAGS choose the weights of a new run. A resumed run does not look at them: it has those of its checkpoint.
START_FLAGS = ("model_name_or_path", "init_from_ckpt", "output_emb_size")
# SHARED_FLAGS are recorded in the checkpoint, and a resumed run has to share them. Where a checkpoint is older than a
# flag, its run counts as one with the flag's default.
SHARED_FLAGS = (
    "pooling", "infer_with_fc_pooler", "output_dropout", "margin", "scale", "mlm_probability", "batch_size",
    "learning_rate", "weight_decay", "epochs", "warmup_proportion", "max_grad_norm", "dropout", "max_seq_length",
    "seed", "precision", "crop_rate", "query_prefix", "document_prefix", "cross_device_negatives",
    "keep_duplicate_negatives", "chunk_size")
# FREE_FLAGS may be changed by a resumed run. (The training file may have moved; its content is compared.)
FREE_FLAGS = (
    "quiet", "train_set_file", "test_set_file", "strict_data", "plain_text", "device", "cpu_threads", "resume",
    "keep_checkpoints", "save_dir", "save_steps", "visualdl_dir", "eval_steps", "save_best", "early_stopping", "whiten",
    "visualdl_embeddings")


def check_resume_tables(names: Iterable[str]) -> None:
    """Raise ValueError where a flag is in none of the tables above, or in several of them."""
    for name in names:
        tables = [table for table in (START_FLAGS, SHARED_FLAGS, FREE_FLAGS) if name in table]
        if len(tables) != 1:
            raise ValueError(f"--{name} has to be in one of START_FLAGS, SHARED_FLAGS and FREE_FLAGS of "
                             f"simcse/flags.py, which say what --resume does with it; it is in {len(tables)}")


def add_optimization_arguments(group: argparse._ActionsContainer) -> None:
    """Add the flags by which a network is trained, whatever its loss is."""
    add = group.add_argument
    add("--batch_size", type=positive_int, default=32, help="texts per batch and device")
    add("--learning_rate", type=positive_float, default=5e-5, help="highest learning rate of AdamW")
    add("--weight_decay", type=non_negative_float, default=0.0,
        help="weight decay of AdamW; biases and norms do not decay")
    add("--epochs", type=non_negative_int, default=1,
        help="passes over the training texts; 0: save and evaluate the untrained network")
    add("--warmup_proportion", type=fraction, default=0.0,
        help="fraction of the steps over which the learning rate rises, before it falls linearly to 0")
    add("--warmup_proption", dest="warmup_proportion", type=fraction, help=argparse.SUPPRESS)
    add("--max_grad_norm", type=positive_float, help="clip gradients to this norm (default: no clipping)")
    add("--dropout", type=fraction_below_one, default=0.1, help="hidden and attention dropout rate")
    add("--max_seq_length", type=sequence_length, help="tokens per text, with [CLS] and [SEP]; longer texts are cut "
        f"(default: the length of the checkpoint that training starts from, or {TRAIN_LENGTH})")
    add("--seed", type=non_negative_int, default=1000, help="random seed")
    add("--precision", choices=TRAIN_PRECISIONS, default="auto",
        help=f"number format of the matrix products; auto: {AUTO_ON_GPU}, else fp32; with --resume the format of the "
        "resumed run. tf32, bf16 and fp16 (with loss scaling) need --device gpu")


def add_run_arguments(device: argparse._ActionsContainer, output: argparse._ActionsContainer) -> None:
    """Add the flags that say where a run computes, where it writes, and which run it resumes."""
    add_device_arguments(device)
    add = output.add_argument
    add("--resume", nargs="?", const="auto", help="resume the run that left this checkpoint folder, with its "
        "optimizer, schedule and place in the data, as if it had not been interrupted; auto (or no value): the newest "
        "checkpoint in --save_dir, or a new run if there is none")
    add("--keep_checkpoints", type=non_negative_int, default=0,
        help="how many of the newest checkpoints model_<step> to keep; 0: all. Only the newest can be resumed")
    add("--save_dir", default="./checkpoints", help="folder of the checkpoints")
    add("--save_steps", type=positive_int, default=10000, help="steps between checkpoints")
    add("--visualdl_dir", default="./log", help="folder of the VisualDL log")


def parse_training_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the flags of a training script, checked.

    Returns:
        The flags, and as `shared_defaults` the defaults of its SHARED_FLAGS, by name.
    """
    args = parser.parse_args()
    check_resume_tables(vars(args))
    if args.precision not in ("auto", "fp32") and args.device != "gpu":
        parser.error(f"--precision {args.precision} needs --device gpu: paddle has no such training on a CPU")
    if args.resume not in (None, "auto") and not os.path.isfile(os.path.join(args.resume, STATE_RECORD)):
        parser.error(f"argument --resume: {args.resume}: no checkpoint folder that training can go on from (it has no "
                     f"{STATE_RECORD}); --init_from_ckpt starts a new run from a checkpoint's weights")
    set_max_seq_length(args, TRAIN_LENGTH)
    check_arguments(parser, args)
    shared_defaults = {name: parser.get_default(name) for name in SHARED_FLAGS if name in args}
    return argparse.Namespace(**vars(args), shared_defaults=shared_defaults)


def resolve_training(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags with each "auto" replaced.

    In --resume a checkpoint folder replaces it, or None where there is none; in --precision a number format.
    """
    resume = newest_resumable(args.save_dir) if args.resume == "auto" else args.resume
    precision = training_precision(args.device, resume) if args.precision == "auto" else args.precision
    return argparse.Namespace(**{**vars(args), "resume": resume, "precision": precision})


def training_precision(device: str, resumed: str | None) -> str:
    """Return the number format that `--precision auto` means in training.

    On a CPU that is fp32, since paddle has no other. On a GPU it is that of the run that is resumed, if there is one.

    Args:
        device: "cpu" or "gpu".
        resumed: folder of the checkpoint that the run resumes from.
    """
    if device != "gpu":
        return "fp32"
    run = read_json(os.path.join(resumed, STATE_RECORD)).get("run", {}) if resumed else {}
    return run.get("precision") or auto_precision(device)


def announce_training(args: argparse.Namespace, start: str, texts: str) -> None:
    """Log what is about to be trained.

    Args:
        args: as `resolve_training` returns them.
        start: the encoder or checkpoint that a new run starts from.
        texts: how many training texts there are, in words.
    """
    epochs = console.count(args.epochs, "epoch")
    announce(args, args.resume or start, texts, f"{epochs} in batches of {args.batch_size}")


def hyper_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that have an effect on what a run learns, by name."""
    return {name: value for name, value in vars(args).items() if name in START_FLAGS or name in SHARED_FLAGS}
