"""Export the network for OpenVINO, in float32 or quantized to int8 by NNCF, and run it on a CPU."""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from simcse.console import InputError, as_input_error, count, log
from simcse.encoder.onnx import export_onnx
from simcse.encoder.paddle_patches import import_openvino, keep_signal_stack, quiet_nncf
from simcse.encoder.weights import (
    CONFIG_FILE,
    GRAPH_FIELDS,
    ONNX_FILE,
    OPENVINO_FILE,
    activation_bytes,
    graph_record,
    read_record,
)
from simcse.files import write_json
from simcse.machine import BATCH_TOKENS, CPU_BF16_IS_FASTER, CPU_THREADS, auto_precision

import numpy as np
from paddle import nn

IdArrays = tuple[np.ndarray, np.ndarray]  # input_ids and token_type_ids of a batch, int64 [texts, length]


class PendingEmbeddings:
    """The embeddings of a batch that OpenVINO is computing; `numpy.asarray` waits for them.

    Args:
        request: an idle `openvino.InferRequest`; it is busy until `wait` has returned.
    """

    def __init__(self, request: Any, input_ids: np.ndarray, token_type_ids: np.ndarray) -> None:
        self._request = request
        self._inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids}  # kept: the request reads them
        self._embeddings: np.ndarray | None = None
        request.start_async(self._inputs, share_inputs=True)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return what `wait` does, for `numpy.asarray`."""
        return np.asarray(self.wait(), dtype)

    def wait(self) -> np.ndarray:
        """Wait for the embeddings and return them, float32 [batch, embedding_size]."""
        if self._embeddings is None:
            self._request.wait()
            self._embeddings = self._request.get_output_tensor().data.copy()
            self._inputs = {}
        return self._embeddings


class OpenVinoEngine:
    """An exported folder, run by OpenVINO on a CPU: two batches at a time, each on half of the threads.

    Args:
        folder: filled by `export_openvino`.
        precision: "fp32", "bf16", "int8" or "auto": bf16 on a CPU that is faster in it, else fp32. What is not int8 in
            an int8 graph is computed as in "auto".
        cpu_threads: math threads; 0: all cores.
    """

    batch_tokens = BATCH_TOKENS["cpu"]
    STREAMS = 2  # batches that are computed at a time

    def __init__(self, folder: str, precision: str = "auto", cpu_threads: int = 0) -> None:
        self.precision = auto_precision("cpu") if precision == "auto" else precision
        if self.precision not in ("fp32", "bf16", "int8"):
            raise InputError(f"--precision {precision}: OpenVINO computes in fp32, bf16 or int8")
        openvino = import_openvino()
        record = read_record(folder, GRAPH_FIELDS)
        self.embedding_size = record["embedding_size"]
        self.max_positions = record["max_positions"]
        self.bytes_needed = self.STREAMS * activation_bytes(record)
        in_bf16 = self.precision == "bf16" or (self.precision == "int8" and CPU_BF16_IS_FASTER)
        with keep_signal_stack():
            graph = openvino.Core().compile_model(os.path.join(folder, OPENVINO_FILE), "CPU", {
                "NUM_STREAMS": str(self.STREAMS), "INFERENCE_NUM_THREADS": cpu_threads or CPU_THREADS,
                "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32"})
        self._requests = [graph.create_infer_request() for _ in range(self.STREAMS)]
        self._pending: list[PendingEmbeddings | None] = [None] * self.STREAMS  # what each request computes
        self._next = 0  # the request to use next

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> PendingEmbeddings:
        """Start to compute a batch, and return at once; `numpy.asarray` of the result waits for it.

        Args:
            input_ids, token_type_ids: int64 [batch, length].

        Returns:
            L2-normalized embeddings, float32 [batch, embedding_size].
        """
        earlier = self._pending[self._next]
        if earlier is not None:
            earlier.wait()  # read before its request is used again
        embeddings = PendingEmbeddings(self._requests[self._next], input_ids, token_type_ids)
        self._pending[self._next] = embeddings
        self._next = (self._next + 1) % self.STREAMS
        return embeddings


def export_openvino(model: nn.Layer, folder: str, calibration: Sequence[IdArrays] = ()) -> None:
    """Write `get_pooled_embedding` with its weights, batch and length dynamic, for an `OpenVinoEngine`.

    Args:
        folder: gets inference.xml, inference.bin and a record.
        calibration: batches of one text each, with which the graph is quantized to int8; (): it stays float32.

    Raises:
        InputError: the network cannot be converted.
    """
    record = {**graph_record(model), "precision": "int8" if calibration else "fp32"}
    _write_graph(model, folder, calibration)
    write_json(os.path.join(folder, CONFIG_FILE), record)


def _write_graph(model: nn.Layer, folder: str, calibration: Sequence[IdArrays]) -> None:
    """Convert the network by way of ONNX, quantize it if there is `calibration`, and write inference.xml and .bin."""
    openvino = import_openvino()
    from openvino.passes import ConstantFolding, Manager

    with tempfile.TemporaryDirectory() as temporary:
        export_onnx(model, temporary)
        graph = openvino.Core().read_model(os.path.join(temporary, ONNX_FILE))
        # The network multiplies its whole table of tokens by a mask that zeroes [PAD]. Both are constants: fold them
        # here, once, instead of multiplying them again in every batch.
        folding = Manager()
        folding.register_pass(ConstantFolding())
        folding.run_passes(graph)
        if calibration:
            graph = _quantize(graph, calibration, has_fc=model.output_emb_size > 0)
        openvino.save_model(graph, os.path.join(folder, OPENVINO_FILE), compress_to_fp16=False)


def _quantize(graph: Any, calibration: Sequence[IdArrays], has_fc: bool) -> Any:
    """Return the graph with matrix products of int8 weights and int8 activations.

    Activations are scaled by their ranges over the calibration texts (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438,
    and bias correction: NNCF's defaults for transformers). Attention's products of two activations stay in float, and
    so does the fc, whose whitening magnifies every error that it gets.
    """
    log(f"quantizing with {count(len(calibration), 'text')}, which takes a minute or two, once")
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    kept_in_float = [node for node in products if node.input_value(1).get_node().get_type_name() != "Constant"]
    if has_fc:
        kept_in_float.append(products[-1])  # the fc is the last product: only the norm comes after it
    with quiet_nncf(), as_input_error("--precision int8: NNCF cannot quantize the network", Exception):
        import nncf

        inputs = nncf.Dataset([{"input_ids": ids, "token_type_ids": types} for ids, types in calibration])
        names_in_float = [node.get_friendly_name() for node in kept_in_float]
        return nncf.quantize(graph, inputs, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration),
                             ignored_scope=nncf.IgnoredScope(names_in_float))
