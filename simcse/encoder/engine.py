"""What encodes fastest here: on a CPU the network as a static graph, kept beside its checkpoint."""

import argparse
import contextlib
import copy
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

from simcse.console import InputError, log
from simcse.device import gpu_precision
from simcse.encoder.openvino import OpenVinoEngine
from simcse.encoder.paddle_engine import CpuEngine, export_graph
from simcse.encoder.table import TableEngine
from simcse.encoder.weights import CONFIG_FILE, OPENVINO_FILE, model_digest, read_record
from simcse.files import file_digest, new_folder, read_json, write_json
from simcse.machine import CPU_HAS_AMX

import numpy as np
import paddle
from paddle import nn


class Engine(Protocol):
    """What `encoder.encode` needs: the `SimCSE` of model.py, or a `CpuEngine`."""

    embedding_size: int
    max_positions: int
    batch_tokens: int  # tokens of a batch, padding included, where no batch size is asked for
    precision: str  # number format of the matrix products: "fp32", "tf32", "bf16", "fp16" or "int8"

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> Any: ...


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
        code = ("pretrained.py", "paddle_patches.py", "paddle_engine.py", "onnx.py", "openvino.py", "table.py",
                "engine.py", "../../model.py")
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
