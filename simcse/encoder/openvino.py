"""The network in OpenVINO, which runs it on a CPU: as it is, or in int8, quantized by NNCF with the user's texts."""

import collections
import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from simcse.console import InputError, log, reported
from simcse.encoder.onnx import export_onnx
from simcse.encoder.paddle_engine import export_graph
from simcse.encoder.weights import CONFIG_FILE, ONNX_FILE, OPENVINO_FILE, read_record
from simcse.files import write_json
from simcse.machine import BATCH_TOKENS, CPU_BF16_IS_FASTER, CPU_THREADS, auto_precision

import numpy as np
from paddle import nn

SAMPLE = 256  # texts: every second sets the ranges of activations, the others measure what int8 costs
LEAST = 32  # texts below which ranges are a guess
LEAST_COSINE = 0.98  # to float32, on the mean: below, results are no longer those of the checkpoint
Batch = tuple[np.ndarray, np.ndarray]  # input_ids and token_type_ids, int64 [texts, length]


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

    batch_tokens, AT_A_TIME = BATCH_TOKENS["cpu"], 2

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


def export_openvino(model: nn.Layer, folder: str, batches: Sequence[Batch] = ()) -> None:
    """Write `get_pooled_embedding` with its weights, batch and length dynamic, to <folder>/inference.xml and .bin, in
    float32 or, with `batches` of a text each, in int8, and what a later stage has to know of it. InputError where it
    cannot be converted, or where int8 is too far from the network."""
    import openvino
    from openvino.passes import ConstantFolding, Manager

    with tempfile.TemporaryDirectory() as temporary:
        export_onnx(model, temporary)
        network = openvino.Core().read_model(os.path.join(temporary, ONNX_FILE))
        folding = Manager()  # of the table of tokens by a mask for [PAD], as large as the table
        folding.register_pass(ConstantFolding())
        folding.run_passes(network)
        if batches:
            network = _quantize(network, batches[::2], bool(model.output_emb_size))
        openvino.save_model(network, os.path.join(folder, OPENVINO_FILE), compress_to_fp16=False)
    record = {"embedding_size": model.embedding_size, "max_positions": model.max_positions,
              "precision": "int8" if batches else "fp32"}
    write_json(os.path.join(folder, CONFIG_FILE), record)
    if batches:
        record["int8_cosines"] = _compare(model, OpenVinoEngine(folder, "int8"), batches[1::2] or batches)
        write_json(os.path.join(folder, CONFIG_FILE), record)


def export_fastest(model: nn.Layer, folder: str) -> None:
    """`export_openvino` in float32 or, where the network has what OpenVINO does not, `engine.export_graph`."""
    try:
        export_openvino(model, folder)
    except InputError as error:
        log(f"{error}; Paddle Inference runs it instead")
        export_graph(model, folder)


def _quantize(network: Any, batches: Sequence[Batch], has_fc: bool) -> Any:
    """Matrix products of int8 weights and int8 activations, scaled by their ranges over the batches (SmoothQuant, Xiao
    et al. 2023, arXiv:2211.10438, and bias correction: NNCF's defaults for transformers). In float stay the products
    of two activations, which are attention's, and that of the fc, whose whitening magnifies whatever error it has."""
    os.environ.setdefault("NNCF_CI", "1")  # it reports to Google Analytics otherwise
    import nncf

    nncf.set_log_level(40)  # errors alone
    products = [each for each in network.get_ordered_ops() if each.get_type_name() == "MatMul"]
    in_float = [each for each in products if each.input_value(1).get_node().get_type_name() != "Constant"]
    in_float += products[-1:] * has_fc
    inputs = nncf.Dataset([{"input_ids": ids, "token_type_ids": types} for ids, types in batches])
    log(f"quantizing with {len(batches)} texts, which takes a minute or two, once")
    quiet = contextlib.redirect_stdout(io.StringIO())  # of progress bars; stdout is for results
    with quiet, reported("--precision int8: NNCF cannot quantize the network", Exception):
        return nncf.quantize(network, inputs, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches),
                             ignored_scope=nncf.IgnoredScope([each.get_friendly_name() for each in in_float]))


def _compare(model: nn.Layer, engine: OpenVinoEngine, batches: Sequence[Batch]) -> dict:
    """The cosines of embeddings with those of the network itself, the mean and the lowest, said and returned."""
    cosines = np.concatenate([(np.asarray(engine.embed(*batch)) * np.asarray(model.embed(*batch))).sum(axis=1)
                              for batch in batches])
    mean, lowest = float(cosines.mean()), float(cosines.min())
    found = f"cosine of int8 to fp32 on {len(cosines)} texts: {mean:.4f} on the mean, {lowest:.4f} at lowest"
    if not mean >= LEAST_COSINE:
        raise InputError(f"--precision int8: {found}; below {LEAST_COSINE} on the mean it is another model: take bf16 "
                         "or fp32")
    log(found)
    return {"texts": len(cosines), "mean": mean, "lowest": lowest}
