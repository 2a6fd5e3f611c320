"""Export the network as an ONNX graph."""

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
    """Write `get_pooled_embedding` with its weights, float32, batch and length dynamic, to <folder>/inference.onnx.

    The graph maps input_ids and token_type_ids, int64 [batch, length], to float32 [batch, embedding_size].

    Raises:
        InputError: this is paddle 2, or paddle2onnx cannot convert the network.
    """
    if paddle.__version__.startswith("2."):
        raise InputError(f"paddle2onnx needs paddlepaddle 3 (requirements.txt); this is {paddle.__version__}")
    output = os.path.abspath(os.path.join(folder, ONNX_FILE))
    # paddle2onnx's default optimize_tool runs pip for what it finds missing; onnxruntime folds constants itself.
    code = ("import paddle2onnx\n"
            f"paddle2onnx.export('inference.json', 'inference.pdiparams', {output!r}, opset_version={OPSET}, "
            "optimize_tool='None')")
    with tempfile.TemporaryDirectory() as temporary:
        export_graph(model, temporary)
        # A process of its own: paddle2onnx aborts its process on an operator that it does not know.
        converted = subprocess.run([sys.executable, "-c", code], cwd=temporary, capture_output=True, text=True,
                                   errors="replace", check=False)
    if converted.returncode:
        lines = converted.stderr.strip().splitlines() or [f"exit code {converted.returncode}"]
        raise InputError(f"paddle2onnx cannot convert the network: {lines[-1]}")


def onnx_graph(folder: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Open what `export_onnx` wrote in onnxruntime, as a function of input_ids and token_type_ids."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(os.path.join(folder, ONNX_FILE), options, ["CPUExecutionProvider"])

    def embed(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        return session.run(None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]

    return embed
