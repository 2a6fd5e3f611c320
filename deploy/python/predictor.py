"""The network as a static graph in Paddle Inference: what every stage encodes with on a CPU, and what is deployed."""

# isort: off
import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# `model` first: it prepares the environment in which paddle is imported.
from checkpoint import new_folder
from console import InputError, log
from data import file_digest
from index_store import model_digest
from machine import CPU_HAS_BF16, RANK, auto_precision, default_threads
from model import BATCH_TOKENS, Engine, SimCSE, set_device
from loading import CONFIG_FILE, checkpoint_tokenizer, load_model, read_record, write_json

import numpy as np
import paddle
from paddle import nn
# isort: on

# What `paddle.jit.save` writes: paddle 3 .json, paddle 2 .pdmodel; the last is what the original exported.
GRAPH_FILES = ("inference.json", "inference.pdmodel", "inference.get_pooled_embedding.pdmodel")


class _EmbeddingGraph(nn.Layer):
    """`get_pooled_embedding` as a layer of its own, which is what `paddle.jit.save` exports."""

    def __init__(self, model: SimCSE) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        return self.model.get_pooled_embedding(input_ids, token_type_ids, with_pooler=self.model.infer_with_pooler)


@contextlib.contextmanager
def _without_dropout(model: SimCSE) -> Iterator[None]:
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


def export_graph(model: SimCSE, folder: str) -> None:
    """Write the static graph of `get_pooled_embedding`, batch and length dynamic, and its weights: inference.*."""
    ids = [paddle.static.InputSpec([None, None], "int64", name) for name in ("input_ids", "token_type_ids")]
    model.eval()
    with _without_dropout(model):
        graph = paddle.jit.to_static(_EmbeddingGraph(model), input_spec=ids, full_graph=True)
        graph.eval()
        paddle.jit.save(graph, os.path.join(folder, "inference"))


def make_engine(model: SimCSE, precision: str = "auto", cpu_threads: int = 0,
                keep: Callable[[str], None] | None = None) -> Engine:
    """What encodes fastest on the current device: on a CPU a `Predictor` of the weights as they are now, on a GPU the
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
        engine = Predictor(folder, cpu_threads=cpu_threads, precision=precision, max_positions=model.max_positions,
                           embedding_size=model.embedding_size)
        if keep:
            keep(folder)
        return engine


def load_engine(args: argparse.Namespace) -> tuple[Engine, Any]:
    """The engine and the tokenizer that a stage's flags ask for (`add_model_arguments`, `add_encode_arguments`).

    On a CPU the graph, once exported, is kept beside the checkpoint; later starts need neither the network nor
    paddlenlp.
    """
    set_device(args.device, args.cpu_threads)
    keep = None
    if args.device == "cpu":
        kept, fingerprint = f"{os.path.splitext(args.params_path)[0]}.graph", graph_fingerprint(args)
        if engine := read_kept_graph(kept, fingerprint, args):
            return engine, checkpoint_tokenizer(args.params_path, args.model_name_or_path)
    model, tokenizer, record = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    if args.device == "cpu" and not RANK:
        keep = functools.partial(keep_graph, kept, fingerprint, record)
    return make_engine(model, args.precision, args.cpu_threads, keep), tokenizer


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
    code = [here, *(os.path.join(os.path.dirname(here), "..", "..", name) for name in ("model.py", "loading.py"))]
    try:
        paddlenlp = importlib.metadata.version("paddlenlp")
    except importlib.metadata.PackageNotFoundError:
        paddlenlp = None
    return {"model": model_digest(args.params_path, args.model_name_or_path, args.output_emb_size),
            "encoder": described.hexdigest(), "paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp,
            "code": [file_digest(path) for path in code]}


def read_kept_graph(folder: str, fingerprint: dict, args: argparse.Namespace) -> Engine | None:
    """The engine of the graph that `keep_graph` wrote to `folder`; None where it has to be exported (again)."""
    try:
        with open(os.path.join(folder, "fingerprint.json"), encoding="utf-8") as file:
            found = json.load(file)
        files = {name: file_digest(os.path.join(folder, name)) for name in found["files"]}
        size = read_record(folder)["output_emb_size"]
    except (OSError, LookupError, TypeError, ValueError, InputError):
        return None
    if found != {**fingerprint, "files": files} or args.output_emb_size not in (None, size):
        return None
    return Predictor(folder, cpu_threads=args.cpu_threads, precision=args.precision)


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


class Predictor:
    """An exported folder run by Paddle Inference.

    Args:
        model_dir: what export_model.py wrote.
        device: "cpu", "gpu" or "xpu".
        cpu_threads: math threads on a CPU; 0: all cores.
        enable_mkldnn: oneDNN kernels on a CPU.
        use_tensorrt: TensorRT on a GPU, for up to max_batch_size x max_seq_length tokens.
        precision: "fp32", "bf16", "fp16" (GPU), "int8" (TensorRT), or "auto": bf16 on a CPU that has it and with
            oneDNN, else fp32.
        max_positions: positions of the encoder; None: what the folder records.
        embedding_size: numbers of an embedding; None: what the folder records or, where it records none, what a run
            gives.
        shapes: how many shapes of batches oneDNN keeps kernels for, each with a copy of the weights: ERNIE-base's are
            333 MB in fp32, 170 MB in bf16, and take tenths of a second to make.

    Raises:
        InputError: no exported graph in `model_dir`, or the device or precision is not there.
    """

    def __init__(self, model_dir: str, device: str = "cpu", cpu_threads: int = 0, enable_mkldnn: bool = True,
                 use_tensorrt: bool = False, precision: str = "fp32", max_batch_size: int = 32,
                 max_seq_length: int = 128, max_positions: int | None = None, embedding_size: int | None = None,
                 shapes: int = 10) -> None:
        config = paddle.inference.Config(*_graph_files(model_dir))
        config.disable_glog_info()
        record = read_record(model_dir)
        encoder_config = record.get("encoder_config", {})
        self.max_positions = max_positions or encoder_config.get("max_position_embeddings", 512)
        self.batch_tokens, self.shapes = BATCH_TOKENS[device == "cpu"], shapes
        self.precision = auto_precision(device, enable_mkldnn) if precision == "auto" else precision
        if device == "gpu":
            set_device(device)
            self._use_gpu(config, use_tensorrt, max_batch_size, max_seq_length)
        elif device == "xpu":
            if not paddle.device.is_compiled_with_xpu():
                raise InputError("--device xpu: this paddlepaddle has no XPU support")
            config.enable_xpu()
        else:
            self._use_cpu(config, cpu_threads or default_threads(), enable_mkldnn)
        self.predictor = paddle.inference.create_predictor(config)
        self.inputs = [self.predictor.get_input_handle(name) for name in self.predictor.get_input_names()]
        self.output = self.predictor.get_output_handle(self.predictor.get_output_names()[0])
        self.embedding_size = (embedding_size or record.get("output_emb_size") or encoder_config.get("hidden_size")
                               or self.embed(*[np.ones([1, 3], "int64")] * 2).shape[1])

    def _use_cpu(self, config: Any, threads: int, enable_mkldnn: bool) -> None:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        if self.precision == "bf16" and not CPU_HAS_BF16:
            raise InputError("--precision bf16: this processor has neither AVX-512 BF16 nor AMX")
        if enable_mkldnn:
            config.set_mkldnn_cache_capacity(self.shapes)
            config.enable_mkldnn()
        elif hasattr(config, "disable_mkldnn"):  # paddle 3 has it on unless told
            config.disable_mkldnn()
        if self.precision == "bf16":
            config.enable_mkldnn_bfloat16()

    def _use_gpu(self, config: Any, use_tensorrt: bool, max_batch_size: int, max_seq_length: int) -> None:
        types = paddle.inference.PrecisionType
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


def _graph_files(model_dir: str) -> tuple[str, str]:
    """The graph and the weights in an exported folder."""
    graph = next((path for name in GRAPH_FILES if os.path.isfile(path := os.path.join(model_dir, name))), None)
    if graph is None or not os.path.isfile(params := os.path.splitext(graph)[0] + ".pdiparams"):
        raise InputError(f"--model_dir {model_dir}: no exported graph ({GRAPH_FILES[0]} or {GRAPH_FILES[1]}, and "
                         "inference.pdiparams); make one with export_model.py")
    if graph.endswith(".json") and paddle.__version__.startswith("2."):
        raise InputError(f"{graph} was exported by paddle 3; paddle {paddle.__version__} cannot run it: "
                         "export the checkpoint again here")
    return graph, params
