"""The network in ONNX."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from simcse.console import InputError
from simcse.encoder.paddle_engine import export_graph
from simcse.encoder.weights import ONNX_FILE, OPSET

import numpy as np
import paddle
from paddle import nn


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
