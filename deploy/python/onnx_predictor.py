"""The network as an ONNX graph: written by paddle2onnx, run by onnxruntime, which needs no Paddle graph.

Light on purpose: paddle, paddle2onnx and onnxruntime are imported by what needs them.
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from console import InputError, first_line
from machine import default_threads

if TYPE_CHECKING:
    from model import SimCSE

ONNX_FILE = "inference.onnx"
OPSET = 17  # the first with LayerNormalization as one operator


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"ONNX: {error.name} is not installed; pip install -r requirements-onnx.txt") from None


def check_packages() -> None:
    """Before any work: is here what exports to ONNX and runs it?

    Raises:
        InputError: a package is missing.
    """
    for name in ("paddle2onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"ONNX: {name} is not installed; pip install -r requirements-onnx.txt")


def holds_onnx(model_dir: str) -> bool:
    """Whether an exported folder is for onnxruntime."""
    return os.path.isfile(os.path.join(model_dir, ONNX_FILE))


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


def export_onnx(model: "SimCSE", folder: str) -> None:
    """Write `get_pooled_embedding` with its weights, float32, batch and length dynamic, to <folder>/inference.onnx.

    Inputs are input_ids and token_type_ids, int64 [batch, length]; the output is float32 [batch, embedding_size].

    Raises:
        InputError: no paddle2onnx, or it cannot convert the network; paddle 2.
    """
    import paddle

    if paddle.__version__.startswith("2."):
        raise InputError(f"--format onnx needs paddlepaddle 3 (requirements.txt); this is {paddle.__version__}")
    from deploy.python.predictor import export_graph

    paddle2onnx = _import("paddle2onnx")
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


class OnnxPredictor:
    """An exported folder with inference.onnx, run by onnxruntime on a CPU: an `Engine` as model.py describes it.

    Args:
        model_dir: what `export_model.py --format onnx` wrote.
        cpu_threads: math threads; 0: all cores.

    Raises:
        InputError: no onnxruntime, or the graph is damaged.
    """

    precision = "fp32"

    def __init__(self, model_dir: str, cpu_threads: int = 0) -> None:
        from loading import read_record
        from model import BATCH_TOKENS

        onnxruntime = _import("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpu_threads or default_threads()
        options.log_severity_level = 3  # errors alone
        path = os.path.join(model_dir, ONNX_FILE)
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own have no common base
            raise InputError(f"--model_dir {model_dir}: {ONNX_FILE} cannot be run: {first_line(error)}") from None
        self.max_positions = read_record(model_dir).get("encoder_config", {}).get("max_position_embeddings", 512)
        self.batch_tokens = BATCH_TOKENS[True]
        self.embedding_size = self.embed(*[np.ones([1, 3], "int64")] * 2).shape[1]

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, length] twice to float32 [batch, embedding_size], L2-normalized."""
        return self.session.run(None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]
