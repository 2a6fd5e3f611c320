"""What encodes fastest here: on a CPU the network as a static graph in Paddle Inference, kept beside its checkpoint."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from simcse.console import InputError, first_line, log
from simcse.files import file_digest, new_folder, write_json
from simcse.machine import BATCH_TOKENS, CPU_HAS_BF16, auto_precision, default_threads
from simcse.weights import CONFIG_FILE, ONNX_FILE, OPSET, model_digest, read_record

import numpy as np
import paddle
from paddle import nn

# What `paddle.jit.save` writes: paddle 3 .json, paddle 2 .pdmodel; the last is what the original exported.
GRAPH_FILES = ("inference.json", "inference.pdmodel", "inference.get_pooled_embedding.pdmodel")


class Engine(Protocol):
    """What `model.encode` needs: the `SimCSE` of model.py, or a `CpuEngine`."""

    embedding_size: int
    max_positions: int
    batch_tokens: int  # tokens of a batch, padding included, where no batch size is asked for
    precision: str  # number format of the matrix products: "fp32", "bf16" or "fp16"

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> Any: ...


class _EmbeddingGraph(nn.Layer):
    """`get_pooled_embedding` as a layer of its own, which is what `paddle.jit.save` exports."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        return self.model.get_pooled_embedding(input_ids, token_type_ids, with_pooler=self.model.infer_with_pooler)


@contextlib.contextmanager
def _without_dropout(model: nn.Layer) -> Iterator[None]:
    """Dropout of rate 0: in evaluation it does nothing either way, but only so it is not an operator of the graph."""
    rates = [(layer, name, getattr(layer, name)) for layer in model.sublayers() for name, kind in (
        ("p", nn.Dropout), ("dropout", nn.MultiHeadAttention)) if isinstance(layer, kind)]
    try:
        for layer, name, _ in rates:
            setattr(layer, name, 0.0)
        yield
    finally:
        for layer, name, rate in rates:
            setattr(layer, name, rate)


def export_graph(model: nn.Layer, folder: str) -> None:
    """Write the static graph of `get_pooled_embedding`, batch and length dynamic, and its weights: inference.*."""
    ids = [paddle.static.InputSpec([None, None], "int64", name) for name in ("input_ids", "token_type_ids")]
    model.eval()
    with _without_dropout(model):
        graph = paddle.jit.to_static(_EmbeddingGraph(model), input_spec=ids, full_graph=True)
        graph.eval()
        paddle.jit.save(graph, os.path.join(folder, "inference"))


class CpuEngine:
    """An exported folder run by Paddle Inference on a CPU, with oneDNN.

    Args:
        folder: what `export_graph` wrote.
        cpu_threads: math threads; 0: all cores.
        precision: "fp32", "bf16", or "auto": bf16 on a CPU that is faster in it, else fp32.
        max_positions: positions of the encoder.
        embedding_size: numbers of an embedding.

    Raises:
        InputError: the processor has no such precision.
    """

    batch_tokens = BATCH_TOKENS[True]
    SHAPES = 10  # of batches that oneDNN keeps kernels for, each with a copy of the weights

    def __init__(self, folder: str, max_positions: int, embedding_size: int, precision: str = "fp32",
                 cpu_threads: int = 0) -> None:
        self.max_positions, self.embedding_size = max_positions, embedding_size
        self.precision = auto_precision("cpu") if precision == "auto" else precision
        if self.precision == "bf16" and not CPU_HAS_BF16:
            raise InputError("--precision bf16: this processor has neither AVX-512 BF16 nor AMX")
        graph = next(path for name in GRAPH_FILES if os.path.isfile(path := os.path.join(folder, name)))
        config = paddle.inference.Config(graph, os.path.splitext(graph)[0] + ".pdiparams")
        config.disable_glog_info()
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(cpu_threads or default_threads())
        config.set_mkldnn_cache_capacity(self.SHAPES)
        config.enable_mkldnn()
        if self.precision == "bf16":
            config.enable_mkldnn_bfloat16()
        self.predictor = paddle.inference.create_predictor(config)
        self.inputs = [self.predictor.get_input_handle(name) for name in self.predictor.get_input_names()]
        self.output = self.predictor.get_output_handle(self.predictor.get_output_names()[0])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, length] twice to float32 [batch, embedding_size], L2-normalized."""
        for handle, array in zip(self.inputs, (input_ids, token_type_ids)):
            handle.copy_from_cpu(array)
        self.predictor.run()
        return self.output.copy_to_cpu().astype("float32", copy=False)


def make_engine(model: nn.Layer, precision: str = "auto", cpu_threads: int = 0,
                keep: Callable[[str], None] | None = None) -> Engine:
    """What encodes fastest on the current device: on a CPU a `CpuEngine` of the weights as they are now, on a GPU the
    network itself, in `precision`.

    Args:
        keep: is given the folder of the exported graph, on a CPU.

    Raises:
        InputError: the processor or GPU has no such precision.
    """
    if paddle.device.get_device() != "cpu":
        supported = {"bf16": paddle.amp.is_bfloat16_supported, "fp16": paddle.amp.is_float16_supported}
        model.precision = "fp32" if precision == "auto" else precision
        if model.precision in supported and not supported[precision]():
            raise InputError(f"--precision {precision}: this GPU does not have it")
        return model
    with tempfile.TemporaryDirectory() as folder:
        export_graph(model, folder)
        engine = CpuEngine(folder, model.max_positions, model.embedding_size, precision, cpu_threads)
        if keep:
            keep(folder)
        return engine


# ---------------------------------------------------------------------------------- the graph kept beside a checkpoint
def graph_fingerprint(args: argparse.Namespace) -> dict[str, Any]:
    """What an exported graph depends on: the checkpoint and the encoder by content, the libraries, this code."""
    encoder = args.model_name_or_path or ""
    beside = [os.path.join(encoder, name) for name in sorted(os.listdir(encoder))] if os.path.isdir(encoder) else []
    described = hashlib.sha256()  # an encoder named by a flag describes the network; its weights are the checkpoint's
    for path in filter(os.path.isfile, beside):
        if not path.endswith((".pdparams", ".safetensors")):
            described.update(file_digest(path).encode())
    here = os.path.abspath(__file__)
    code = [here, *(os.path.join(os.path.dirname(here), name) for name in ("encoders.py", "../model.py"))]
    try:
        paddlenlp = importlib.metadata.version("paddlenlp")
    except importlib.metadata.PackageNotFoundError:
        paddlenlp = None
    return {"model": model_digest(args.params_path, args.model_name_or_path),
            "encoder": described.hexdigest(), "paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp,
            "code": [file_digest(path) for path in code]}


def read_kept_graph(folder: str, fingerprint: dict, args: argparse.Namespace) -> Engine | None:
    """The engine of the graph that `keep_graph` wrote to `folder`; None where it has to be exported (again)."""
    try:
        with open(os.path.join(folder, "fingerprint.json"), encoding="utf-8") as file:
            found = json.load(file)
        files = {name: file_digest(os.path.join(folder, name)) for name in found["files"]}
        record = read_record(folder)
        size, encoder = record["output_emb_size"], record["encoder_config"]
    except (OSError, LookupError, TypeError, ValueError, InputError):
        return None
    if found != {**fingerprint, "files": files} or args.output_emb_size not in (None, size):
        return None
    positions = encoder.get("max_position_embeddings", 512)
    return CpuEngine(folder, positions, size or encoder["hidden_size"], args.precision, args.cpu_threads)


def keep_graph(kept: str, fingerprint: dict, record: dict, exported: str) -> None:
    """Move the `exported` graph, with its record and its fingerprint, to the folder `kept`, which appears whole or,
    where it cannot be written, not at all."""
    write_json(os.path.join(exported, CONFIG_FILE), record)
    files = {name: file_digest(os.path.join(exported, name)) for name in sorted(os.listdir(exported))}
    write_json(os.path.join(exported, "fingerprint.json"), {**fingerprint, "files": files})
    try:
        with new_folder(kept, cache=True) as folder:
            for name in os.listdir(exported):
                shutil.move(os.path.join(exported, name), folder)
    except OSError:
        return
    log(f"kept the graph in {kept}, for quicker starts")


# ----------------------------------------------------------------------------------------------------------------- ONNX
@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """Nothing on stdout, of C++ neither: paddle2onnx reports there, and stdout is for results."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def export_onnx(model: nn.Layer, folder: str) -> None:
    """Write `get_pooled_embedding` with its weights, float32, batch and length dynamic, to <folder>/inference.onnx.

    Inputs are input_ids and token_type_ids, int64 [batch, length]; the output is float32 [batch, embedding_size].

    Raises:
        InputError: no paddle2onnx, or it cannot convert the network; paddle 2.
    """
    if paddle.__version__.startswith("2."):
        raise InputError(f"--format onnx needs paddlepaddle 3 (requirements.txt); this is {paddle.__version__}")
    import paddle2onnx

    with tempfile.TemporaryDirectory() as temporary:
        export_graph(model, temporary)
        paths = [os.path.join(temporary, name) for name in ("inference.json", "inference.pdiparams")]
        try:
            with _without_stdout():
                # Its default optimize_tool runs pip for what it finds missing; onnxruntime folds constants itself.
                graph = paddle2onnx.export(*paths, opset_version=OPSET, optimize_tool="None")
        except Exception as error:  # it logs what it could not convert, and then fails on having no result
            raise InputError(f"--format onnx: paddle2onnx cannot convert the network: {first_line(error)}") from None
    with open(os.path.join(folder, ONNX_FILE), "wb") as file:
        file.write(graph)


def onnx_graph(folder: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What `export_onnx` wrote, as a function of input_ids and token_type_ids, run by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(os.path.join(folder, ONNX_FILE), options, ["CPUExecutionProvider"])
    return lambda input_ids, token_type_ids: session.run(
        None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]
