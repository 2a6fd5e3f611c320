"""What encodes fastest here: on a CPU the network as a static graph in Paddle Inference, kept beside its checkpoint."""

import argparse
import collections
import contextlib
import copy
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Protocol
from unittest.mock import patch

from simcse.console import InputError, log
from simcse.files import file_digest, new_folder, read_json, write_json
from simcse.machine import BATCH_TOKENS, CPU_BF16_IS_FASTER, CPU_HAS_AMX, CPU_HAS_BF16, CPU_THREADS, auto_precision
from simcse.precision import gpu_precision
from simcse.weights import CONFIG_FILE, ONNX_FILE, OPENVINO_FILE, OPSET, model_digest, read_record

import numpy as np
import paddle
from paddle import nn

GRAPH_FILES = ("inference.json", "inference.pdmodel")  # what `paddle.jit.save` of paddle 3 and of paddle 2 writes


class Engine(Protocol):
    """What `model.encode` needs: the `SimCSE` of model.py, or a `CpuEngine`."""

    embedding_size: int
    max_positions: int
    batch_tokens: int  # tokens of a batch, padding included, where no batch size is asked for
    precision: str  # number format of the matrix products: "fp32", "tf32", "bf16", "fp16" or "int8"

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> Any: ...


class _EmbeddingGraph(nn.Layer):
    """`get_pooled_embedding` as a layer of its own, which is what `paddle.jit.save` exports."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        return self.model.get_pooled_embedding(input_ids, token_type_ids, with_pooler=self.model.infer_with_pooler)


def export_graph(model: nn.Layer, folder: str) -> None:
    """Write the static graph of `get_pooled_embedding`, batch and length dynamic, its weights, and what a `CpuEngine`
    asks for."""
    ids = [paddle.static.InputSpec([None, None], "int64", name) for name in ("input_ids", "token_type_ids")]
    model.eval()
    with contextlib.ExitStack() as without_dropout:  # of rate 0 it is no operator of the graph
        for layer in model.sublayers():
            rate = {nn.Dropout: "p", nn.MultiHeadAttention: "dropout"}.get(type(layer))
            if rate:
                without_dropout.enter_context(patch.object(layer, rate, 0.0))
        graph = paddle.jit.to_static(_EmbeddingGraph(model), input_spec=ids, full_graph=True)
        graph.eval()
        paddle.jit.save(graph, os.path.join(folder, "inference"))
    write_json(os.path.join(folder, CONFIG_FILE),
               {"embedding_size": model.embedding_size, "max_positions": model.max_positions})


class CpuEngine:
    """An exported folder run by Paddle Inference on a CPU, with oneDNN, in precision "fp32", "bf16" or "auto" (bf16 on
    a CPU that is faster in it, else fp32), on so many math threads, 0 being all cores. InputError where the processor
    has no such precision."""

    batch_tokens = BATCH_TOKENS[True]
    SHAPES = 10  # of batches that oneDNN keeps kernels for, each with a copy of the weights

    def __init__(self, folder: str, precision: str = "fp32", cpu_threads: int = 0) -> None:
        record = read_record(folder)
        self.embedding_size, self.max_positions = record["embedding_size"], record["max_positions"]
        self.precision = auto_precision("cpu") if precision == "auto" else precision
        if self.precision == "bf16" and not CPU_HAS_BF16:
            raise InputError("--precision bf16: this processor has neither AVX-512 BF16 nor AMX")
        graph = next(path for name in GRAPH_FILES if os.path.isfile(path := os.path.join(folder, name)))
        config = paddle.inference.Config(graph, os.path.splitext(graph)[0] + ".pdiparams")
        config.disable_glog_info()
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(cpu_threads or CPU_THREADS)
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


class _Launched:
    """What an OpenVINO request under way gives; `numpy.asarray` waits for it."""

    def __init__(self, request: Any, *inputs: np.ndarray) -> None:
        request.start_async(dict(zip(("input_ids", "token_type_ids"), inputs)), share_inputs=True)
        self._request, self._inputs, self._found = request, inputs, None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._found is None:
            self._request.wait()
            self._found, self._inputs = self._request.get_output_tensor().data.copy(), ()
        return self._found


class OpenVinoEngine:
    """A folder that `int8.export_openvino` has filled, run by OpenVINO on a CPU, on so many threads, 0 being all cores:
    two batches at a time, each on half of them. Of an int8 graph what is not int8 is, like all of another one where
    `precision` is "auto", bf16 on a CPU that is faster in it, else fp32."""

    batch_tokens, AT_A_TIME = BATCH_TOKENS[True], 2

    def __init__(self, folder: str, precision: str = "auto", cpu_threads: int = 0) -> None:
        import openvino

        record = read_record(folder)
        self.embedding_size, self.max_positions = record["embedding_size"], record["max_positions"]
        self.precision = auto_precision("cpu") if precision == "auto" else precision
        in_bf16 = self.precision == "bf16" or (self.precision == "int8" and CPU_BF16_IS_FASTER)
        graph = openvino.Core().compile_model(os.path.join(folder, OPENVINO_FILE), "CPU", {
            "NUM_STREAMS": str(self.AT_A_TIME), "INFERENCE_NUM_THREADS": cpu_threads or CPU_THREADS,
            "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32"})
        self._requests = itertools.cycle([graph.create_infer_request() for _ in range(self.AT_A_TIME)])
        self._launched = collections.deque(maxlen=self.AT_A_TIME)

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> _Launched:
        """int64 [batch, length] twice to float32 [batch, embedding_size], L2-normalized, which `numpy.asarray` waits
        for."""
        if len(self._launched) == self.AT_A_TIME:
            np.asarray(self._launched[0])  # whose request is the next one
        self._launched.append(_Launched(next(self._requests), input_ids, token_type_ids))
        return self._launched[-1]


class TableEngine:
    """A network of pooling "first_avg" as a table of tokens and one of positions, without paddle, in float32.

    What goes into the first layer is the layer norm of a token's and a position's embedding. With both centred, t and
    p, its variance is (|t|^2 + |p|^2 + 2 t p) / hidden size, and the mean over a text's n tokens a weighted sum of rows
    of the tables, sum(w t) + sum(w p) with w = 1 / (n standard deviation), times the norm's scale and plus its bias:
    two sparse products, where the graph fills an array of tokens x hidden size several times.
    """

    batch_tokens, precision = 16384, "fp32"
    FILE = "table.npz"
    _STEP = 64  # positions that the products of tokens and positions, t p, are made for at a time

    def __init__(self, folder: str, precision: str = "fp32") -> None:
        if precision not in ("auto", "fp32"):
            raise InputError(f"--precision {precision}: pooling first_avg is computed in fp32")
        record = read_record(folder)
        self.embedding_size, self.max_positions = record["embedding_size"], record["max_positions"]
        with np.load(os.path.join(folder, self.FILE)) as tables:
            self._centred = tables["tokens"], tables["positions"]
            self._pad, self._epsilon, self._normalizes = (
                tables[name].item() for name in ("pad", "epsilon", "normalizes"))
            self._tokens, self._positions = (
                (table * tables["scale"]) @ tables["weight"] for table in self._centred)
            self._bias, self._shift = tables["bias"] @ tables["weight"], tables["shift"]
        self._weights = np.empty((0, 0), "float32")

    @classmethod
    def write(cls, model: nn.Layer, folder: str) -> bool:
        """Write the tables of a network; returns whether its embeddings are such sums, by an example. False: they have
        to be a graph."""
        embeddings = model.ptm.embeddings
        names = ("word_embeddings", "position_embeddings", "layer_norm")
        if model.pooling != "first_avg" or not all(hasattr(embeddings, name) for name in names):
            return False
        model.eval()
        with paddle.no_grad(), patch.object(embeddings.layer_norm, "forward", lambda x: x):
            ids = paddle.ones([1, len(embeddings.position_embeddings.weight)], "int64")
            words = embeddings.word_embeddings.weight.numpy()
            positions = embeddings(ids, token_type_ids=paddle.zeros_like(ids)).numpy()[0] - words[1]
        fc = model.emb_reduce_linear if model.output_emb_size else None
        np.savez(os.path.join(folder, cls.FILE), scale=embeddings.layer_norm.weight.numpy(),
                 tokens=words - words.mean(axis=1, keepdims=True), bias=embeddings.layer_norm.bias.numpy(),
                 positions=positions - positions.mean(axis=1, keepdims=True),
                 weight=fc.weight.numpy() if fc else np.eye(words.shape[1], dtype="float32"),
                 shift=fc.bias.numpy() if fc else np.zeros(words.shape[1], "float32"),
                 pad=model.ptm.config.pad_token_id, epsilon=embeddings.layer_norm._epsilon,
                 normalizes=model.normalizes)
        write_json(os.path.join(folder, CONFIG_FILE),
                   {"embedding_size": model.embedding_size, "max_positions": model.max_positions})
        ids = np.random.default_rng(0).integers(0, len(words), (8, min(32, len(positions))))
        ids[:, -8:][::2] = model.ptm.config.pad_token_id
        same = np.allclose(cls(folder).embed(ids, ids * 0), model.embed(ids, ids * 0), atol=1e-5)
        if not same:
            os.remove(os.path.join(folder, cls.FILE))
        return same

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, length] twice, types being 0, to float32 [batch, embedding_size], L2-normalized."""
        from scipy.sparse import csr_matrix

        length = input_ids.shape[1]
        if length > self._weights.shape[1]:
            self._weights = self._inverse_deviations(-(-length // self._STEP) * self._STEP)
        inner = input_ids != self._pad
        inner[np.arange(len(inner)), inner.sum(axis=1) - 1] = inner[:, 0] = False  # [SEP] and [CLS]
        weights = self._weights.take(input_ids * self._weights.shape[1] + np.arange(length)) * inner
        counts = inner.sum(axis=1)
        of_tokens = csr_matrix((weights[inner], input_ids[inner].astype("int32"), np.append(0, np.cumsum(counts))),
                               (len(inner), len(self._tokens)))
        summed = of_tokens @ self._tokens + weights @ self._positions[:length]
        vectors = summed / np.maximum(counts, 1)[:, None].astype("float32")
        vectors += self._bias * (counts > 0)[:, None] + self._shift
        if self._normalizes:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _inverse_deviations(self, length: int) -> np.ndarray:
        """What a token's and a position's embedding is divided by, inverted, float32 [tokens, first positions]."""
        tokens, positions = self._centred[0], self._centred[1][:length]
        squares = 2 * (tokens @ positions.T) + (tokens**2).sum(axis=1)[:, None] + (positions**2).sum(axis=1)
        return 1 / np.sqrt(squares / tokens.shape[1] + self._epsilon)


def open_engine(folder: str, precision: str = "fp32", cpu_threads: int = 0) -> Engine:
    """The engine of a folder that `make_engine` has filled."""
    if os.path.isfile(os.path.join(folder, TableEngine.FILE)):
        return TableEngine(folder, precision)
    kind = OpenVinoEngine if os.path.isfile(os.path.join(folder, OPENVINO_FILE)) else CpuEngine
    return kind(folder, precision, cpu_threads)


def openvino_is_faster() -> bool:
    """Whether OpenVINO, if it is installed, is what runs a graph in fp32 or bf16: on a processor with AMX it was faster
    than Paddle Inference at both sizes that were measured (docs/en/benchmarks.md); on others it was not, or was not
    measured."""
    return (CPU_HAS_AMX and not paddle.__version__.startswith("2.")
            and importlib.util.find_spec("openvino") is not None)


def make_engine(model: nn.Layer, precision: str = "auto", cpu_threads: int = 0,
                keep: Callable[[str], None] | None = None,
                export: Callable[[nn.Layer, str], Any] = export_graph) -> Engine:
    """What encodes fastest on the current device: on a CPU the engine of the graph that `export` writes to a folder, of
    the weights as they are now, and the folder is given to `keep`; on a GPU the network itself, "auto" being its own
    precision."""
    if paddle.device.get_device() != "cpu":
        network = copy.copy(model)  # with the same weights
        network.precision = gpu_precision(model.precision if precision == "auto" else precision)
        return network
    with tempfile.TemporaryDirectory() as folder:
        if not TableEngine.write(model, folder):
            export(model, folder)
        engine = open_engine(folder, precision, cpu_threads)
        if keep:
            keep(folder)
        return engine


class KeptGraph:
    """The exported graph of the checkpoint that a stage's flags name, in a folder beside it, with its fingerprint: the
    checkpoint and the encoder by content, the libraries, the code that shapes the graph, its own files, and of int8 the
    --calibration_file, with which it is made anew, and without which it is taken as it is."""

    def __init__(self, args: argparse.Namespace) -> None:
        is_int8 = args.precision == "int8"
        self.args, self.folder = args, f"{os.path.splitext(args.params_path)[0]}.{'int8' if is_int8 else 'graph'}"
        here, calibration = os.path.dirname(os.path.abspath(__file__)), vars(args).get("calibration_file")
        code = ("engine.py", "encoders.py", "int8.py", "../model.py")
        packages = ["paddlenlp"] + ["openvino"] * (openvino_is_faster() and not is_int8)
        self.fingerprint = {
            "model": model_digest(args.params_path, args.model_name_or_path), "paddlepaddle": paddle.__version__,
            "libraries": {name: found.version for name in packages
                          for found in importlib.metadata.distributions(name=name)},
            "code": [file_digest(os.path.join(here, name)) for name in code],
            **({"calibration": file_digest(calibration)} if calibration else {})}

    def read(self) -> Engine | None:
        """Its engine; None where it has to be exported (again)."""
        try:
            found, record = read_json(os.path.join(self.folder, "fingerprint.json")), read_record(self.folder)
            files = {name: file_digest(os.path.join(self.folder, name)) for name in found["files"]}
        except (OSError, LookupError, TypeError, InputError):
            return None
        if (found != {**found, **self.fingerprint, "files": files}
                or self.args.output_emb_size not in (None, record["output_emb_size"])):
            return None
        return open_engine(self.folder, self.args.precision, self.args.cpu_threads)

    def write(self, record: dict, exported: str) -> None:
        """Move the `exported` graph, its record joined to the checkpoint's, to the folder, which appears whole or,
        where it cannot be written, not at all."""
        write_json(os.path.join(exported, CONFIG_FILE), {**record, **read_record(exported)})
        files = {name: file_digest(os.path.join(exported, name)) for name in sorted(os.listdir(exported))}
        write_json(os.path.join(exported, "fingerprint.json"), {**self.fingerprint, "files": files})
        with contextlib.suppress(OSError):
            with new_folder(self.folder, cache=True) as folder:
                for name in os.listdir(exported):
                    shutil.move(os.path.join(exported, name), folder)
            log(f"kept the graph in {self.folder}, for quicker starts")


def export_onnx(model: nn.Layer, folder: str) -> None:
    """Write `get_pooled_embedding` with its weights, float32, batch and length dynamic, to <folder>/inference.onnx:
    from input_ids and token_type_ids, int64 [batch, length], to float32 [batch, embedding_size]. InputError where
    paddle is of version 2, or paddle2onnx cannot convert the network."""
    if paddle.__version__.startswith("2."):
        raise InputError(f"paddle2onnx needs paddlepaddle 3 (requirements.txt); this is {paddle.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        export_graph(model, temporary)
        # An operator that paddle2onnx does not know aborts its process. Its default optimize_tool runs pip
        # for what it finds missing; onnxruntime folds constants itself.
        files = ["inference.json", "inference.pdiparams", os.path.abspath(os.path.join(folder, ONNX_FILE))]
        code = f"import paddle2onnx; paddle2onnx.export(*{files}, opset_version={OPSET}, optimize_tool='None')"
        ran = subprocess.run([sys.executable, "-c", code], cwd=temporary, capture_output=True, text=True,
                             errors="replace", check=False)
    if ran.returncode:
        said = (ran.stderr.strip() or f"exit code {ran.returncode}").splitlines()[-1]
        raise InputError(f"paddle2onnx cannot convert the network: {said}")


def onnx_graph(folder: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What `export_onnx` wrote, as a function of input_ids and token_type_ids, run by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(os.path.join(folder, ONNX_FILE), options, ["CPUExecutionProvider"])
    return lambda input_ids, token_type_ids: session.run(
        None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]
