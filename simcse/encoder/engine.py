"""What computes embeddings of token ids: the network itself on a GPU, an exported folder on a CPU.

ENCODER_ENGINES has an entry for each kind of exported folder.
"""

import copy
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

from simcse.console import InputError, log
from simcse.device import set_gpu_precision
from simcse.encoder.openvino import IdArrays, OpenVinoEngine, export_openvino
from simcse.encoder.paddle_engine import GRAPH_FILES, PaddleEngine, export_graph
from simcse.encoder.table import TableEngine, write_table
from simcse.encoder.weights import OPENVINO_FILE, TABLE_FILE
from simcse.machine import CPU_HAS_AMX

import numpy as np
import paddle
from paddle import nn


class Engine(Protocol):
    """Compute embeddings of token ids.

    Attributes:
        embedding_size: numbers of an embedding.
        max_positions: tokens that a text may have.
        batch_tokens: tokens of a batch, padding included, where no batch size is asked for.
        precision: number format of the matrix products: "fp32", "tf32", "bf16", "fp16" or "int8".
        bytes_needed: about the bytes of memory that computing takes, beyond those of the open engine.
    """

    embedding_size: int
    max_positions: int
    batch_tokens: int
    precision: str
    bytes_needed: int

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> Any:
        """Return L2-normalized embeddings, float32 [batch, embedding_size], of two int64 [batch, length].

        An engine may return at once, with what `numpy.asarray` waits for and makes an array of: a tensor on a GPU, an
        `openvino.PendingEmbeddings`. `Encoder.embed` therefore calls this for the next batch before it reads the last
        one: a GPU has work to go on with, and OpenVINO computes two batches at a time.
        """
        ...


# By a file that the folder has. The first one counts: a folder with a table may have a graph, too, which is slower.
ENCODER_ENGINES: dict[str, type] = {
    TABLE_FILE: TableEngine,
    OPENVINO_FILE: OpenVinoEngine,
    **dict.fromkeys(GRAPH_FILES, PaddleEngine),
}


def open_engine(folder: str, precision: str = "auto", cpu_threads: int = 0) -> Engine:
    """Open an exported folder on a CPU.

    Args:
        precision: "auto" or one that the folder's engine has.
        cpu_threads: math threads; 0: all cores.

    Raises:
        InputError: the folder has no graph, or its engine not this precision.
    """
    for name, engine in ENCODER_ENGINES.items():
        if os.path.isfile(os.path.join(folder, name)):
            return engine(folder, precision, cpu_threads)
    raise InputError(f"{folder}: no exported graph; it has none of {', '.join(ENCODER_ENGINES)}")


def make_engine(model: nn.Layer, precision: str = "auto", cpu_threads: int = 0) -> Engine:
    """Make an engine of the network, with its weights as they are now, on the current device.

    On a CPU it is a `TableEngine` or a `PaddleEngine`, which are quick to make; on a GPU it is a copy of the network
    that shares its weights, whose "auto" is the network's precision.
    """
    if paddle.device.get_device() != "cpu":
        network = copy.copy(model)
        network.precision = set_gpu_precision(model.precision if precision == "auto" else precision)
        return network
    with tempfile.TemporaryDirectory() as folder:
        if not write_table(model, folder):
            export_graph(model, folder)
        return open_engine(folder, precision, cpu_threads)


def export_fastest(model: nn.Layer, folder: str, calibration: Sequence[IdArrays] = ()) -> None:
    """Export the network as what encodes fastest on this CPU, for `open_engine`.

    Args:
        calibration: for int8; see `export_openvino`. (): float32.
    """
    if write_table(model, folder):
        return
    if calibration:
        export_openvino(model, folder, calibration)
        return
    if openvino_is_faster():
        try:
            export_openvino(model, folder)
            return
        except InputError as error:
            log(f"{error}; Paddle Inference runs it instead")
    export_graph(model, folder)


def openvino_is_faster() -> bool:
    """Tell whether OpenVINO is installed, and runs a graph in fp32 or bf16 faster than Paddle Inference.

    On a processor with AMX it was faster at both sizes that were measured (docs/en/benchmarks.md); on others it was
    not, or was not measured.
    """
    return (CPU_HAS_AMX and not paddle.__version__.startswith("2.")
            and importlib.util.find_spec("openvino") is not None)
