"""An exported folder run by Paddle Inference or, where it holds ONNX, by onnxruntime: from texts to embeddings.

This folder stands alone: copied to a server beside an exported folder it needs numpy, tokenizers, and paddlepaddle or
onnxruntime (requirements.txt), which are imported by what needs them.
"""

import json
import os
import re
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 dies in inflateReset2 if its own zlib is loaded before Python's
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIG_FILE, ONNX_FILE, TOKENIZER_FILE = "simcse_config.json", "inference.onnx", "tokenizer.json"
# What `paddle.jit.save` writes: paddle 3 .json, paddle 2 .pdmodel; the last is what the original exported.
GRAPH_FILES = ("inference.json", "inference.pdmodel", "inference.get_pooled_embedding.pdmodel")
# Tokens of a batch, padding included, that keep a processor busy, by whether it is a CPU.
BATCH_TOKENS = {True: 2048, False: 65536}
WINDOW = 16384  # texts tokenized and sorted by length at a time: enough for batches of even length, in little memory
LENGTH_MULTIPLE = 4  # batches are padded to a multiple of so many tokens, so that kernels are made for few shapes


class InputError(Exception):
    """A mistake in a flag or an input file: reported in one line, exit code 2, no traceback."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, for one-line reports."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# -------------------------------------------------------------------------------------------------------- the machine
def _processor() -> str:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read(4096)
    except OSError:
        return ""


PROCESSOR = _processor()
AMD, AMX = "AuthenticAMD" in PROCESSOR, " amx_bf16" in PROCESSOR
CPU_HAS_BF16 = AMX or " avx512_bf16" in PROCESSOR
if AMD and " avx2" in PROCESSOR:  # else paddle's MKL runs AMD's processors on SSE; 5 is AVX2, 7 AVX-512
    wide = all(f" {part}" in PROCESSOR for part in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if wide else "5")
os.environ.setdefault("GLOG_minloglevel", "2")  # paddle's C++ notes and warnings say nothing that a user can act on
warnings.filterwarnings("ignore", message="No ccache found|Setuptools is replacing distutils")


def default_threads() -> int:
    """Math threads where none are asked for: all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_precision(device: str, onednn: bool = True) -> str:
    """What precision "auto" is: bf16 on a CPU that is faster in it (AMX, or AMD's AVX-512 BF16), else fp32."""
    return "bf16" if device == "cpu" and onednn and CPU_HAS_BF16 and (AMX or AMD) else "fp32"


# ---------------------------------------------------------------------------------------------------------- the graph
def read_record(model_dir: str) -> dict:
    """What export_model.py says of a folder, with `embedding_size` and `max_positions`; the latter alone where the
    folder has no record."""
    path = os.path.join(model_dir, CONFIG_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        record = {}
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    encoder = record.get("encoder_config", {})
    size = record.get("output_emb_size") or encoder.get("hidden_size")
    return {"embedding_size": size, "max_positions": encoder.get("max_position_embeddings", 512), **record}


def holds_onnx(model_dir: str) -> bool:
    """Whether an exported folder is for onnxruntime."""
    return os.path.isfile(os.path.join(model_dir, ONNX_FILE))


class _Predictor:
    """The facts of an exported folder, by which `encode` makes its batches."""

    batch_tokens = BATCH_TOKENS[True]
    precision = "fp32"

    def _read_facts(self, model_dir: str) -> None:
        record = read_record(model_dir)
        self.max_positions = record["max_positions"]
        self.embedding_size = record["embedding_size"] or self.embed(*[np.ones([1, 3], "int64")] * 2).shape[1]


class OnnxPredictor(_Predictor):
    """An exported folder with inference.onnx, run by onnxruntime on a CPU.

    Args:
        model_dir: what `export_model.py --format onnx` wrote.
        cpu_threads: math threads; 0: all cores.

    Raises:
        InputError: no onnxruntime, or the graph is damaged.
    """

    def __init__(self, model_dir: str, cpu_threads: int = 0) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise InputError(f"ONNX: {error.name} is not installed; pip install -r requirements-onnx.txt") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_threads or default_threads()
        options.log_severity_level = 3  # errors alone
        path = os.path.join(model_dir, ONNX_FILE)
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own have no common base
            raise InputError(f"--model_dir {model_dir}: {ONNX_FILE} cannot be run: {first_line(error)}") from None
        self._read_facts(model_dir)

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, length] twice to float32 [batch, embedding_size], L2-normalized."""
        return self.session.run(None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]


class Predictor(_Predictor):
    """An exported folder run by Paddle Inference.

    Args:
        model_dir: what export_model.py wrote.
        device: "cpu", "gpu" or "xpu".
        cpu_threads: math threads on a CPU; 0: all cores.
        enable_mkldnn: oneDNN kernels on a CPU.
        use_tensorrt: TensorRT on a GPU, for up to max_batch_size x max_seq_length tokens.
        precision: "fp32", "bf16", "fp16" (GPU), "int8" (TensorRT), or "auto": see `auto_precision`.
        shapes: how many shapes of batches oneDNN keeps kernels for, each with a copy of the weights: ERNIE-base's are
            333 MB in fp32, 170 MB in bf16, and take tenths of a second to make.

    Raises:
        InputError: no exported graph in `model_dir`, or a damaged one; the device or precision is not there.
    """

    def __init__(self, model_dir: str, device: str = "cpu", cpu_threads: int = 0, enable_mkldnn: bool = True,
                 use_tensorrt: bool = False, precision: str = "fp32", max_batch_size: int = 32,
                 max_seq_length: int = 128, shapes: int = 10) -> None:
        import paddle

        config = paddle.inference.Config(*_graph_files(model_dir, paddle.__version__))
        config.disable_glog_info()
        self.batch_tokens, self.shapes = BATCH_TOKENS[device == "cpu"], shapes
        self.precision = auto_precision(device, enable_mkldnn) if precision == "auto" else precision
        if device == "gpu":
            if not (paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
                raise InputError("--device gpu: no GPU that this paddlepaddle can use; run with --device cpu, or "
                                 "install paddlepaddle-gpu (requirements-gpu.txt)")
            self._use_gpu(config, paddle.inference.PrecisionType, use_tensorrt, max_batch_size, max_seq_length)
        elif device == "xpu":
            if not paddle.device.is_compiled_with_xpu():
                raise InputError("--device xpu: this paddlepaddle has no XPU support")
            config.enable_xpu()
        else:
            self._use_cpu(config, cpu_threads or default_threads(), enable_mkldnn)
        try:
            self.predictor = paddle.inference.create_predictor(config)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"--model_dir {model_dir}: the graph cannot be run: {first_line(error)}") from None
        self.inputs = [self.predictor.get_input_handle(name) for name in self.predictor.get_input_names()]
        self.output = self.predictor.get_output_handle(self.predictor.get_output_names()[0])
        self._read_facts(model_dir)

    def _use_cpu(self, config: Any, threads: int, enable_mkldnn: bool) -> None:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        if self.precision == "bf16" and not CPU_HAS_BF16:
            raise InputError("--precision bf16: this processor has neither AVX-512 BF16 nor AMX")
        if enable_mkldnn:
            config.set_mkldnn_cache_capacity(self.shapes)
            config.enable_mkldnn()
        elif hasattr(config, "disable_mkldnn"):  # paddle 3 has it on by itself
            config.disable_mkldnn()
        if self.precision == "bf16":
            config.enable_mkldnn_bfloat16()

    def _use_gpu(self, config: Any, types: Any, use_tensorrt: bool, max_batch_size: int, max_seq_length: int) -> None:
        kind = {"fp32": types.Float32, "bf16": types.Bfloat16, "fp16": types.Half, "int8": types.Int8}[self.precision]
        config.enable_use_gpu(100, 0, types.Float32 if use_tensorrt else kind)
        if use_tensorrt:
            config.enable_tensorrt_engine(workspace_size=1 << 30, max_batch_size=max_batch_size, min_subgraph_size=5,
                                          precision_mode=kind, use_static=False, use_calib_mode=False)
            shapes = [{name: list(shape) for name in ("input_ids", "token_type_ids")}
                      for shape in ((1, 1), (max_batch_size, max_seq_length), (max_batch_size, max_seq_length))]
            config.set_trt_dynamic_shape_info(*shapes)

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, length] twice to float32 [batch, embedding_size], L2-normalized."""
        for handle, array in zip(self.inputs, (input_ids, token_type_ids)):
            handle.copy_from_cpu(array)
        self.predictor.run()
        return self.output.copy_to_cpu().astype("float32", copy=False)


def _graph_files(model_dir: str, version: str) -> tuple[str, str]:
    """The graph and the weights in an exported folder, for a version of paddle."""
    graph = next((path for name in GRAPH_FILES if os.path.isfile(path := os.path.join(model_dir, name))), None)
    if graph is None or not os.path.isfile(params := os.path.splitext(graph)[0] + ".pdiparams"):
        raise InputError(f"--model_dir {model_dir}: no exported graph ({GRAPH_FILES[0]} or {GRAPH_FILES[1]}, and "
                         "inference.pdiparams); make one with export_model.py")
    if graph.endswith(".json") and version.startswith("2."):
        raise InputError(f"{graph} was exported by paddle 3; paddle {version} cannot run it: export the checkpoint "
                         "again here")
    return graph, params


# --------------------------------------------------------------------------------------------------------- from texts
class Tokenizer:
    """The tokenizer that export_model.py wrote to a folder.

    Raises:
        InputError: the folder has none, or a damaged one.
    """

    def __init__(self, model_dir: str) -> None:
        import tokenizers

        path = os.path.join(model_dir, TOKENIZER_FILE)
        if not os.path.isfile(path):
            raise InputError(f"--model_dir {model_dir}: no {TOKENIZER_FILE}; export the checkpoint again with "
                             "export_model.py")
        try:
            self._rust = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"{path}: not a tokenizer: {first_line(error)}") from None
        self.pad_token_id = self._rust.token_to_id("[PAD]")

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> list[list[int]]:
        """Token ids of each text, [CLS] and [SEP] included, cut to `max_seq_length`."""
        self._rust.enable_truncation(max_seq_length)
        room = max_seq_length - 2
        # A han character is a token and ends the one before it, so what follows the last that has room is cut anyway.
        enough = re.compile(f"(?:[^\u4e00-\u9fff]*[\u4e00-\u9fff]){{{room}}}").match
        texts = [found[0] if len(text) > room and (found := enough(text)) else text for text in texts]
        return [encoding.ids for encoding in self._rust.encode_batch_fast(texts)]


def encode(predictor: Any, tokenizer: Tokenizer, texts: Sequence[str], max_seq_length: int,
           batch_size: int | None = None) -> np.ndarray:
    """Embeddings, float32 [len(texts), embedding_size], in the order of `texts`; texts of like length are batched.

    Args:
        batch_size: texts per batch; None: as many as fill the predictor's `batch_tokens`, padding included.

    Raises:
        InputError: texts of `max_seq_length` tokens have more positions than the encoder.
    """
    if max_seq_length > predictor.max_positions:
        raise InputError(f"--max_seq_length {max_seq_length}: the encoder has {predictor.max_positions} positions")
    embeddings = np.empty((len(texts), predictor.embedding_size), "float32")
    for start in range(0, len(texts), WINDOW):
        ids, window = tokenizer(texts[start : start + WINDOW], max_seq_length), embeddings[start : start + WINDOW]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        longest = len(ids[order[0]])
        while order:
            length = min(longest, -(-len(ids[order[0]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
            size = batch_size or max(1, predictor.batch_tokens // length)
            rows, order = order[:size], order[size:]
            input_ids = np.full((len(rows), length), tokenizer.pad_token_id, "int64")
            for line, row in zip(input_ids, rows):
                line[: len(ids[row])] = ids[row]
            window[rows] = predictor.embed(input_ids, np.zeros_like(input_ids))
    return embeddings
