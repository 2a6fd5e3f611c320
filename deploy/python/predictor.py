"""An exported folder run by Paddle Inference, onnxruntime or OpenVINO, by what it holds: from texts to embeddings.

This folder stands alone: copied to a server beside an exported folder it needs numpy, tokenizers, and paddlepaddle,
onnxruntime or openvino (requirements.txt), which are imported by what needs them.
"""

import contextlib
import glob
import importlib.util
import json
import os
import re
import sys
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 dies in inflateReset2 if its own zlib is loaded before Python's
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

ONNX_FILE, OPENVINO_FILE = "inference.onnx", "inference.xml"
# What `paddle.jit.save` writes: paddle 3 .json, paddle 2 .pdmodel; the last is what the original exported.
GRAPH_FILES = ("inference.json", "inference.pdmodel", "inference.get_pooled_embedding.pdmodel")
WINDOW = 16384  # texts tokenized and sorted by length at a time: enough for batches of even length, in little memory
WASTE = re.compile("([0-9A-Za-z]{101})[0-9A-Za-z]+|( ) +")  # what a long text has more of than makes a difference
LENGTH_MULTIPLE = 4  # batches are padded to a multiple of so many tokens, so that kernels are made for few shapes

CPU_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PROCESSOR = ""  # what Linux says of the first one
with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
    PROCESSOR = cpuinfo.read(4096)
AMD, AMX = "AuthenticAMD" in PROCESSOR, " amx_bf16" in PROCESSOR
CPU_HAS_BF16 = AMX or " avx512_bf16" in PROCESSOR
if AMD and " avx2" in PROCESSOR:  # else paddle's MKL runs AMD's processors on SSE; 5 is AVX2, 7 AVX-512
    wide = all(f" {part}" in PROCESSOR for part in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if wide else "5")
os.environ.setdefault("GLOG_minloglevel", "2")  # paddle's C++ notes and warnings say nothing that a user can act on
# The last is the GPU build without a GPU: with --device cpu nothing is wrong, and with --device gpu it is an error.
warnings.filterwarnings("ignore", message="No ccache found|Setuptools is replacing distutils|You are using GPU version")


class InputError(Exception):
    """A mistake in a flag or an input file: reported in one line, exit code 2, no traceback."""


def first_line(error: BaseException) -> str:
    """What an error says, of one of paddle's on a GPU what follows the C++ traceback, in one line."""
    _, traceback, message = str(error).rpartition("Error Message Summary:")
    message = message.lstrip("-\n ") if traceback else message.strip()
    return re.sub(r"^\(\w+\)\s+", "", message).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def reported(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """An error of these kinds becomes an InputError of one line: `what` is wrong, and the message's first line."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {first_line(error)}") from None


def auto_precision(device: str, onednn: bool = True) -> str:
    """What precision "auto" is: bf16 on a CPU that is faster in it (AMX, or AMD's AVX-512 BF16), else fp32."""
    return "bf16" if device == "cpu" and onednn and CPU_HAS_BF16 and (AMX or AMD) else "fp32"


def read_record(model_dir: str) -> dict:
    """What export_model.py says of a folder; `max_positions` is in it even where the folder has no record."""
    path, record = os.path.join(model_dir, "simcse_config.json"), {}
    if os.path.exists(path):
        with reported(f"{path}: not valid JSON", ValueError), open(path, encoding="utf-8") as file:
            record = json.load(file)
    return {"max_positions": record.get("encoder_config", {}).get("max_position_embeddings", 512), **record}


def other_format(model_dir: str) -> str | None:
    """The graph of an exported folder that is not for Paddle Inference: ONNX_FILE, OPENVINO_FILE or None."""
    return next((name for name in (ONNX_FILE, OPENVINO_FILE) if os.path.isfile(os.path.join(model_dir, name))), None)


def choose_precision(model_dir: str, device: str, precision: str, onednn: bool = True) -> str:
    """What an exported folder runs in where `precision` is asked for; InputError where it cannot run so."""
    graph, made_in = other_format(model_dir), read_record(model_dir).get("precision", "fp32")
    holds = f"--model_dir {model_dir} holds {graph}, which runs with --device cpu"
    if graph and device != "cpu":
        raise InputError(f"--device {device}: {holds}")
    if graph == ONNX_FILE and precision not in ("auto", "fp32"):
        raise InputError(f"--precision {precision}: {holds}, in fp32")
    if precision != "auto" and (precision == "int8") != (made_in == "int8"):
        raise InputError(f"--precision {precision}: --model_dir {model_dir} was exported in {made_in}; int8 is what "
                         "export_model.py --format openvino --precision int8 writes")
    if precision != "auto":
        return precision
    known = "fp32" if graph == ONNX_FILE else "int8" if made_in == "int8" else None
    return known or auto_precision(device, onednn or graph == OPENVINO_FILE)


class Predictor:
    """An exported folder run by Paddle Inference or, on a CPU, by onnxruntime in fp32 or by OpenVINO. `embed` takes
    input_ids and token_type_ids, int64 [batch, length] each, to float32 [batch, embedding_size], L2-normalized.

    Args:
        device: "cpu", "gpu" or "xpu".
        cpu_threads: math threads; 0: all cores.
        precision: "fp32", "bf16", "fp16" (GPU), "int8" (of a folder exported in it) or "auto"; see `auto_precision`.
        shapes: how many shapes of batches oneDNN keeps kernels for on a CPU, each with a copy of the weights:
            ERNIE-base's are 333 MB in fp32, 170 MB in bf16, and take tenths of a second to make. 0: without oneDNN.
        tensorrt: texts and tokens of the largest batch in TensorRT on a GPU, in fp32 or fp16; empty: without TensorRT.
            Only for what paddle 2 exported, and a paddle that is built with TensorRT.

    InputError: no exported graph, or a damaged one; what runs it is not installed; the device or precision is not
    there.
    """

    def __init__(self, model_dir: str, device: str = "cpu", cpu_threads: int = 0, precision: str = "fp32",
                 shapes: int = 10, tensorrt: Sequence[int] = ()) -> None:
        threads, graph, record = cpu_threads or CPU_CORES, other_format(model_dir), read_record(model_dir)
        self.precision = precision = choose_precision(model_dir, device, precision, shapes > 0)
        if graph == ONNX_FILE:
            self.embed = _run_onnx(model_dir, threads)
        elif graph == OPENVINO_FILE:
            self.embed = _run_openvino(model_dir, threads, precision)
        else:
            self.embed = _run_paddle(model_dir, device, threads, precision, shapes, tensorrt)
        self.batch_tokens = 2048 if device == "cpu" else 65536  # of a batch, padding included, that keep it busy
        self.most_texts = tensorrt[0] if tensorrt else sys.maxsize  # of a batch
        self.max_positions = record["max_positions"]
        self.embedding_size = record.get("embedding_size") or self.embed(*[np.ones([1, 3], "int64")] * 2).shape[1]


def _run_onnx(model_dir: str, threads: int) -> Callable:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise InputError(f"ONNX: {error.name} is not installed; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    with reported(f"--model_dir {model_dir}: {ONNX_FILE} cannot be run", Exception):  # its own have no common base
        session = onnxruntime.InferenceSession(os.path.join(model_dir, ONNX_FILE), options, ["CPUExecutionProvider"])
    return lambda input_ids, token_type_ids: session.run(
        None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]


def _run_openvino(model_dir: str, threads: int, precision: str) -> Callable:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise InputError(f"OpenVINO: {error.name} is not installed; pip install openvino") from None
    in_bf16 = precision == "bf16" or (precision == "int8" and auto_precision("cpu") == "bf16")
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32"}
    with reported(f"--model_dir {model_dir}: {OPENVINO_FILE} cannot be run", RuntimeError):
        graph = openvino.Core().compile_model(os.path.join(model_dir, OPENVINO_FILE), "CPU", settings)
    request = graph.create_infer_request()
    return lambda input_ids, token_type_ids: request.infer(
        {"input_ids": input_ids, "token_type_ids": token_type_ids}, share_inputs=True)[0]


def _run_paddle(model_dir: str, device: str, threads: int, precision: str, shapes: int,
                tensorrt: Sequence[int]) -> Callable:
    import paddle

    graphs = [os.path.join(model_dir, name) for name in GRAPH_FILES]
    graph = next(filter(os.path.isfile, graphs), graphs[0])
    params = os.path.splitext(graph)[0] + ".pdiparams"
    if not (os.path.isfile(graph) and os.path.isfile(params)):
        raise InputError(f"--model_dir {model_dir}: no exported graph ({GRAPH_FILES[0]} or {GRAPH_FILES[1]}, and "
                         "inference.pdiparams); make one with export_model.py")
    if graph.endswith(".json") and paddle.__version__.startswith("2."):
        raise InputError(f"{graph} was exported by paddle 3; paddle {paddle.__version__} cannot run it: export the "
                         "checkpoint again here")
    if tensorrt:
        _check_tensorrt(graph, precision, paddle.inference.get_trt_compile_version())
    config = paddle.inference.Config(graph, params)
    config.disable_glog_info()
    _configure(config, device, threads, precision, shapes, tensorrt)
    with reported(f"--model_dir {model_dir}: the graph cannot be run", OSError, RuntimeError, ValueError):
        predictor = paddle.inference.create_predictor(config)
    inputs = [predictor.get_input_handle(name) for name in predictor.get_input_names()]
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def embed(*ids: np.ndarray) -> np.ndarray:
        for handle, array in zip(inputs, ids):
            handle.copy_from_cpu(array)
        predictor.run()
        return output.copy_to_cpu().astype("float32", copy=False)

    return embed


def link_cuda_libraries() -> None:
    """Have paddle 2.6 find the CUDA libraries of pip's packages (nvidia-cudnn-cu11 and others, see the project's
    requirements-gpu.txt): it opens them by names without a version, so links are made in its own folder, where it
    looks. Where they cannot be made, LD_LIBRARY_PATH has to name libraries of CUDA 11.8 and cuDNN 8."""
    import paddle

    packages = importlib.util.find_spec("nvidia")
    if not paddle.__version__.startswith("2.") or packages is None:
        return
    folder = os.path.join(os.path.dirname(paddle.__file__), "libs")
    for root in packages.submodule_search_locations or ():
        for library in glob.glob(os.path.join(root, "*", "lib", "*.so.*")):
            name = os.path.basename(library)
            for link in (name, name.split(".so.")[0] + ".so"):
                with contextlib.suppress(OSError):  # it is there, or the folder cannot be written
                    os.symlink(os.path.relpath(library, folder), os.path.join(folder, link))


def _check_tensorrt(graph: str, precision: str, built_with: tuple[int, int, int]) -> None:
    """InputError where paddle.inference.Config has no TensorRT for a graph or a precision, or this paddle has none."""
    if graph.endswith(".json"):
        raise InputError(f"--use_tensorrt: {graph} was exported by paddle 3, which has TensorRT for the .pdmodel of "
                         "paddle 2 alone; run it without, or export the checkpoint by paddle 2")
    if precision not in ("fp32", "fp16"):
        raise InputError(f"--use_tensorrt: --precision {precision} is not one of TensorRT's here: fp32 or fp16")
    if not any(built_with):
        raise InputError("--use_tensorrt: this paddlepaddle is built without TensorRT")


def _configure(config: Any, device: str, threads: int, precision: str, shapes: int, tensorrt: Sequence[int]) -> None:
    import paddle

    if device == "gpu":
        if not (paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
            raise InputError("--device gpu: no GPU that this paddlepaddle can use; run with --device cpu, or install "
                             "paddlepaddle-gpu")
        link_cuda_libraries()
        for switch in (paddle.base.core.set_cublas_switch, paddle.base.core.set_cudnn_switch):
            switch(False)  # paddle 2.6 rounds products of float32 to TF32 by itself
        types = paddle.inference.PrecisionType
        kind = {"fp32": types.Float32, "bf16": types.Bfloat16, "fp16": types.Half}[precision]
        config.enable_use_gpu(100, 0, types.Float32 if tensorrt else kind)
        if tensorrt:
            config.enable_tensorrt_engine(workspace_size=1 << 30, max_batch_size=tensorrt[0], min_subgraph_size=5,
                                          precision_mode=kind, use_static=False, use_calib_mode=False)
            config.set_trt_dynamic_shape_info(*(dict.fromkeys(("input_ids", "token_type_ids"), list(shape))
                                                for shape in ((1, 1), tensorrt, tensorrt)))
    elif device == "xpu":
        if not paddle.device.is_compiled_with_xpu():
            raise InputError("--device xpu: this paddlepaddle has no XPU support")
        config.enable_xpu()
    else:
        if precision == "bf16" and not CPU_HAS_BF16:
            raise InputError("--precision bf16: this processor has neither AVX-512 BF16 nor AMX")
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        if shapes:
            config.set_mkldnn_cache_capacity(shapes)
            config.enable_mkldnn()
        elif hasattr(config, "disable_mkldnn"):  # paddle 3 has it on by itself
            config.disable_mkldnn()
        if precision == "bf16":
            config.enable_mkldnn_bfloat16()


class Tokenizer:
    """tokenizer.json of an exported folder; InputError where there is none, or a damaged one."""

    def __init__(self, model_dir: str) -> None:
        import tokenizers

        path = os.path.join(model_dir, "tokenizer.json")
        if not os.path.isfile(path):
            raise InputError(f"--model_dir {model_dir}: no tokenizer.json; export the checkpoint again with "
                             "export_model.py")
        with reported(f"{path}: not a tokenizer", Exception):  # tokenizers raises nothing narrower
            self._rust = tokenizers.Tokenizer.from_file(path)
        self.pad_token_id, self.unk_token_id = map(self._rust.token_to_id, ("[PAD]", "[UNK]"))
        self._wordless = {self.unk_token_id, *(number for token, number in self._rust.get_vocab().items()
                                               if not any(map(str.isalnum, token)))}

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> list[list[int]]:
        """Token ids of each text, [CLS] and [SEP] included, cut to `max_seq_length`."""
        self._rust.enable_truncation(max_seq_length)
        room = max_seq_length - 2
        # A han character is a token and ends the one before it, so what follows the last that has room is cut anyway.
        enough = re.compile(f"(?:[^\u4e00-\u9fff]*[\u4e00-\u9fff]){{{room}}}").match
        texts = [found[0] if len(text) > room and (found := enough(text)) else text
                 for text in (self._beginning(text, room) for text in texts)]
        return [encoding.ids for encoding in self._rust.encode_batch_fast(texts)]

    def _beginning(self, text: str, room: int) -> str:
        """A text, of a very long one a beginning with the same first `room` tokens and less of [UNK]s and blanks. A
        word has 100 tokens at most, and [UNK] alone if it is longer than that: where there are 100 tokens more than
        `room`, the word that the cut falls into is behind them."""
        size = 16 * (room + 100)
        if len(text) <= 4 * size:
            return text
        text = WASTE.sub(r"\1\2", text)
        while size < len(text):
            encoding, = self._rust.encode_batch_fast([text[:size]])
            if room * len(encoding.overflowing) >= room + 100:
                return text[:size]
            size *= 4
        return text

    def unseen(self, ids: list[int]) -> bool:
        """Whether the encoder sees nothing of a text: no token, or [UNK] and no more than punctuation besides."""
        return self._wordless.issuperset(ids[1:-1]) and (len(ids) == 2 or self.unk_token_id in ids)


def encode(predictor: Predictor, tokenizer: Tokenizer, texts: Sequence[str], max_seq_length: int,
           batch_size: int | None = None, complain: Callable[[str, list[int]], Any] = lambda *told: None) -> np.ndarray:
    """Embeddings, float32 [len(texts), embedding_size], in the order of `texts`; texts of like length are batched,
    `batch_size` or, None, as many as fill the predictor's `batch_tokens`, padding included, and no more than its
    `most_texts`. Texts that the encoder sees nothing of have zeros, whose cosine with any is 0. `complain` is told that
    texts are cut or not seen, and which. InputError where texts of `max_seq_length` tokens have more positions than the
    encoder."""
    if max_seq_length > predictor.max_positions:
        raise InputError(f"--max_seq_length {max_seq_length}: the encoder has {predictor.max_positions} positions")
    embeddings, cut, dark = np.empty((len(texts), predictor.embedding_size), "float32"), [], []
    for start in range(0, len(texts), WINDOW):
        ids, window = tokenizer(texts[start : start + WINDOW], max_seq_length + 1), embeddings[start : start + WINDOW]
        cut += [start + row for row, each in enumerate(ids) if len(each) > max_seq_length]
        ids = [[*each[: max_seq_length - 1], each[-1]] if len(each) > max_seq_length else each for each in ids]
        dark += [start + row for row, each in enumerate(ids) if tokenizer.unseen(each)]
        order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        longest = len(ids[order[0]])
        while order:
            length = min(longest, -(-len(ids[order[0]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
            size = min(batch_size or max(1, predictor.batch_tokens // length), predictor.most_texts)
            rows, order = order[:size], order[size:]
            input_ids = np.full((len(rows), length), tokenizer.pad_token_id, "int64")
            for line, row in zip(input_ids, rows):
                line[: len(ids[row])] = ids[row]
            window[rows] = predictor.embed(input_ids, np.zeros_like(input_ids))
    embeddings[dark] = 0
    for remark, found in (
            (f"are longer than {max_seq_length} tokens and are cut; a higher --max_seq_length, in training too, reads "
             "on", cut),
            ("are all [UNK] to the encoder, so that their cosine with any text is 0", dark)):
        if found:
            complain(remark, found)
    return embeddings
