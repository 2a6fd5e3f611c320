"""Run an exported graph by Paddle Inference, onnxruntime or OpenVINO, chosen by the file that the folder holds.

    predictor = load_predictor("./output", device="cpu")
    embeddings = predictor.embed(input_ids, token_type_ids)

This file imports nothing of the project. It needs numpy, and the one runtime that the folder is for (requirements.txt).
"""

import contextlib
import glob
import importlib.util
import json
import os
import re
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 crashes in inflateReset2 if it loads its own zlib before Python's
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ONNX_FILE = "inference.onnx"
OPENVINO_FILE = "inference.xml"
CPU_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_cpu_flags() -> str:
    """Return what Linux reports of the first processor; "" elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read(4096)
    except OSError:
        return ""


CPU_FLAGS = read_cpu_flags()
CPU_IS_AMD = "AuthenticAMD" in CPU_FLAGS
CPU_HAS_AMX = " amx_bf16" in CPU_FLAGS
CPU_HAS_BF16 = CPU_HAS_AMX or " avx512_bf16" in CPU_FLAGS
CPU_HAS_AVX512 = all(f" {name}" in CPU_FLAGS for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
if CPU_IS_AMD and " avx2" in CPU_FLAGS:  # without it paddle's MKL uses only SSE on AMD; 5 is AVX2, 7 AVX-512
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if CPU_HAS_AVX512 else "5")
os.environ.setdefault("GLOG_minloglevel", "2")  # a user cannot act on paddle's C++ notes and warnings
# The last is the GPU build on a machine without a GPU: harmless with --device cpu, an error of its own with gpu.
warnings.filterwarnings("ignore", message="No ccache found|Setuptools is replacing distutils|You are using GPU version")


class InputError(Exception):
    """A mistake in a flag or an input file: reported in one line, exit code 2, no traceback."""


def first_line(error: BaseException) -> str:
    """Return an error's message in one line, without the C++ traceback that paddle puts before it."""
    _, has_traceback, message = str(error).rpartition("Error Message Summary:")
    if has_traceback:
        message = message.lstrip("-\n ")
    message = re.sub(r"^\(\w+\)\s+", "", message.strip())
    return message.partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def reported(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise an InputError that begins with `what` in place of an error of these kinds."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {first_line(error)}") from None


class TensorRtShape(NamedTuple):
    """The largest batch that a TensorRT engine is built for."""

    batch_size: int
    max_seq_length: int


@dataclass(frozen=True)
class Settings:
    """How a graph runs.

    Args:
        device: "cpu", "gpu" or "xpu".
        precision: "fp32", "bf16", "fp16" (GPU) or "int8" (a folder exported in int8).
        cpu_threads: math threads on a CPU.
        onednn_shapes: number of batch shapes for which oneDNN keeps kernels on a CPU, each with a copy of the weights
            (ERNIE-base: 333 MB in fp32, 170 MB in bf16, some tenths of a second to make); 0: without oneDNN.
        tensorrt: run on TensorRT, in fp32 or fp16, in batches of this shape at most; None: without TensorRT.
    """

    device: str
    precision: str
    cpu_threads: int
    onednn_shapes: int
    tensorrt: TensorRtShape | None


class Predictor:
    """An exported graph that is ready to run. A runtime is a subclass and an entry of PREDICTORS.

    Attributes:
        DEVICES, PRECISIONS: what the runtime supports.
        precision: the number format that the graph runs in.
        embedding_size: numbers of an embedding.
        max_positions: most tokens of a text, [CLS] and [SEP] included.
        batch_tokens: tokens of a batch, padding included, that keep the device busy.
        max_batch_size: most texts of a batch; None: any number.
    """

    DEVICES: tuple[str, ...] = ("cpu",)
    PRECISIONS: tuple[str, ...] = ()

    def __init__(self, graph: str, settings: Settings) -> None:
        self.precision = settings.precision
        self.batch_tokens = 2048 if settings.device == "cpu" else 65536
        self.max_batch_size = settings.tensorrt.batch_size if settings.tensorrt else None
        self.open(graph, settings)
        record = read_record(os.path.dirname(graph))
        self.max_positions = record["max_positions"]
        self.embedding_size = record.get("embedding_size") or self._measure_embedding_size()

    def open(self, graph: str, settings: Settings) -> None:
        """Load the graph of this path.

        Raises:
            InputError: the runtime is not installed, the graph is damaged, or the device or precision is not there.
        """
        raise NotImplementedError

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return the embeddings of a batch.

        Args:
            input_ids, token_type_ids: int64 [batch, length].

        Returns:
            float32 [batch, embedding_size], L2-normalized.
        """
        raise NotImplementedError

    def _measure_embedding_size(self) -> int:
        input_ids = np.ones([1, 3], "int64")
        return self.embed(input_ids, np.zeros_like(input_ids)).shape[1]


class OnnxPredictor(Predictor):
    """Run inference.onnx by onnxruntime."""

    PRECISIONS = ("fp32",)

    def open(self, graph: str, settings: Settings) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise InputError(f"ONNX: {error.name} is not installed; pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.cpu_threads
        options.log_severity_level = 3  # errors
        # onnxruntime's errors have no base class but Exception.
        with reported(f"{graph} cannot be run", Exception):
            self._session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        outputs = self._session.run(None, {"input_ids": input_ids, "token_type_ids": token_type_ids})
        return outputs[0]


class OpenVinoPredictor(Predictor):
    """Run inference.xml by OpenVINO. What is not int8 in an int8 graph is bf16 where the processor is faster in it."""

    PRECISIONS = ("fp32", "bf16", "int8")

    def open(self, graph: str, settings: Settings) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise InputError(f"OpenVINO: {error.name} is not installed; pip install openvino") from None
        float_precision = auto_precision("cpu") if settings.precision == "int8" else settings.precision
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": settings.cpu_threads,
                   "INFERENCE_PRECISION_HINT": "bf16" if float_precision == "bf16" else "f32"}
        with reported(f"{graph} cannot be run", RuntimeError):
            self._request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids}
        return self._request.infer(inputs, share_inputs=True)[0]


class PaddlePredictor(Predictor):
    """Run a graph of `paddle.jit.save` by Paddle Inference."""

    DEVICES = ("cpu", "gpu", "xpu")
    PRECISIONS = ("fp32", "bf16", "fp16")

    def open(self, graph: str, settings: Settings) -> None:
        import paddle

        params = os.path.splitext(graph)[0] + ".pdiparams"
        if not os.path.isfile(params):
            raise InputError(f"{params}: no such file; export the checkpoint again with export_model.py")
        if graph.endswith(".json") and paddle.__version__.startswith("2."):
            raise InputError(f"{graph} was exported by paddle 3; paddle {paddle.__version__} cannot run it: export the "
                             "checkpoint again here")
        if settings.tensorrt:
            check_tensorrt(graph, settings.precision, paddle.inference.get_trt_compile_version())
        config = paddle.inference.Config(graph, params)
        config.disable_glog_info()
        CONFIGURE[settings.device](config, settings)
        with reported(f"{graph} cannot be run", OSError, RuntimeError, ValueError):
            self._predictor = paddle.inference.create_predictor(config)
        input_ids, token_type_ids = self._predictor.get_input_names()
        self._input_ids = self._predictor.get_input_handle(input_ids)
        self._token_type_ids = self._predictor.get_input_handle(token_type_ids)
        self._output = self._predictor.get_output_handle(self._predictor.get_output_names()[0])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        self._input_ids.copy_from_cpu(input_ids)
        self._token_type_ids.copy_from_cpu(token_type_ids)
        self._predictor.run()
        return self._output.copy_to_cpu().astype("float32", copy=False)


# Graph file -> what runs it; a folder that holds several is run by the first. `paddle.jit.save` writes .json in
# paddle 3 and .pdmodel in paddle 2; the last name is that of the original implementation's export.
PREDICTORS: dict[str, type[Predictor]] = {
    ONNX_FILE: OnnxPredictor,
    OPENVINO_FILE: OpenVinoPredictor,
    "inference.json": PaddlePredictor,
    "inference.pdmodel": PaddlePredictor,
    "inference.get_pooled_embedding.pdmodel": PaddlePredictor,
}


def find_graph(model_dir: str) -> str | None:
    """Return the name of a folder's graph, a key of PREDICTORS; None where it holds none."""
    for name in PREDICTORS:
        if os.path.isfile(os.path.join(model_dir, name)):
            return name
    return None


def read_record(model_dir: str) -> dict:
    """Return what export_model.py recorded of a folder, {} where it has no record, with `max_positions` in any case."""
    path = os.path.join(model_dir, "simcse_config.json")
    record = {}
    if os.path.exists(path):
        with reported(f"{path}: not valid JSON", ValueError), open(path, encoding="utf-8") as file:
            record = json.load(file)
    record.setdefault("max_positions", record.get("encoder_config", {}).get("max_position_embeddings", 512))
    return record


def auto_precision(device: str, onednn: bool = True) -> str:
    """Return what precision "auto" means: bf16 on a CPU that is faster in it (AMX, or AMD's AVX-512 BF16), else fp32.
    """
    faster = device == "cpu" and onednn and CPU_HAS_BF16 and (CPU_HAS_AMX or CPU_IS_AMD)
    return "bf16" if faster else "fp32"


def choose_precision(model_dir: str, device: str, precision: str, onednn: bool = True) -> str:
    """Return the precision that a folder runs in.

    Args:
        precision: the one that is asked for, or "auto".
        onednn: whether Paddle Inference uses oneDNN on a CPU.

    Raises:
        InputError: the folder cannot run on the device, or in the precision.
    """
    graph = find_graph(model_dir)
    runtime = PREDICTORS.get(graph, PaddlePredictor)
    exported_in = read_record(model_dir).get("precision", "fp32")
    if device not in runtime.DEVICES:
        raise InputError(f"--device {device}: --model_dir {model_dir} holds {graph}, which runs with --device "
                         f"{' or '.join(runtime.DEVICES)}")
    if precision == "auto":
        if exported_in == "int8":
            return "int8"
        if "bf16" not in runtime.PRECISIONS:
            return "fp32"
        return auto_precision(device, onednn or runtime is not PaddlePredictor)
    if (precision == "int8") != (exported_in == "int8"):
        raise InputError(f"--precision {precision}: --model_dir {model_dir} was exported in {exported_in}; "
                         "export_model.py --format openvino --precision int8 exports in int8")
    if precision not in runtime.PRECISIONS:
        raise InputError(f"--precision {precision}: --model_dir {model_dir} holds {graph}, which runs in "
                         f"{' or '.join(runtime.PRECISIONS)}")
    return precision


def load_predictor(model_dir: str, *, device: str = "cpu", precision: str = "auto", cpu_threads: int = 0,
                   onednn_shapes: int = 10, tensorrt: TensorRtShape | None = None) -> Predictor:
    """Load an exported folder by the runtime that its graph is for.

    Args:
        precision: see `choose_precision`.
        cpu_threads: math threads on a CPU; 0: all cores.
        The others: see `Settings`.

    Raises:
        InputError: the folder holds no graph, or one that cannot run like this.
    """
    precision = choose_precision(model_dir, device, precision, onednn=onednn_shapes > 0)
    graph = find_graph(model_dir)
    if graph is None:
        raise InputError(f"--model_dir {model_dir}: no exported graph ({', '.join(PREDICTORS)}); make one with "
                         "export_model.py")
    settings = Settings(device, precision, cpu_threads or CPU_CORES, onednn_shapes, tensorrt)
    return PREDICTORS[graph](os.path.join(model_dir, graph), settings)


def configure_cpu(config: Any, settings: Settings) -> None:
    """Set a paddle.inference.Config for a CPU, with oneDNN or without it."""
    if settings.precision == "bf16" and not CPU_HAS_BF16:
        raise InputError("--precision bf16: this processor has neither AVX-512 BF16 nor AMX")
    config.disable_gpu()
    config.set_cpu_math_library_num_threads(settings.cpu_threads)
    if settings.onednn_shapes:
        config.set_mkldnn_cache_capacity(settings.onednn_shapes)
        config.enable_mkldnn()
    elif hasattr(config, "disable_mkldnn"):  # paddle 3 uses oneDNN unless it is told not to
        config.disable_mkldnn()
    if settings.precision == "bf16":
        config.enable_mkldnn_bfloat16()


def configure_gpu(config: Any, settings: Settings) -> None:
    """Set a paddle.inference.Config for a GPU, with TensorRT or without it."""
    import paddle

    if not (paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        raise InputError("--device gpu: no GPU that this paddlepaddle can use; run with --device cpu, or install "
                         "paddlepaddle-gpu")
    link_cuda_libraries()
    # paddle 2.6 rounds products of float32 to TF32 unless it is told not to.
    paddle.base.core.set_cublas_switch(False)
    paddle.base.core.set_cudnn_switch(False)
    types = paddle.inference.PrecisionType
    precision = {"fp32": types.Float32, "bf16": types.Bfloat16, "fp16": types.Half}[settings.precision]
    if not settings.tensorrt:
        config.enable_use_gpu(100, 0, precision)
        return
    config.enable_use_gpu(100, 0, types.Float32)
    config.enable_tensorrt_engine(workspace_size=1 << 30, max_batch_size=settings.tensorrt.batch_size,
                                  min_subgraph_size=5, precision_mode=precision, use_static=False,
                                  use_calib_mode=False)
    smallest = {"input_ids": [1, 1], "token_type_ids": [1, 1]}
    largest = {"input_ids": list(settings.tensorrt), "token_type_ids": list(settings.tensorrt)}
    config.set_trt_dynamic_shape_info(smallest, largest, largest)


def configure_xpu(config: Any, settings: Settings) -> None:
    """Set a paddle.inference.Config for an XPU."""
    import paddle

    if not paddle.device.is_compiled_with_xpu():
        raise InputError("--device xpu: this paddlepaddle has no XPU support")
    config.enable_xpu()


CONFIGURE = {"cpu": configure_cpu, "gpu": configure_gpu, "xpu": configure_xpu}


def check_tensorrt(graph: str, precision: str, built_with: tuple[int, int, int]) -> None:
    """Raise InputError where Paddle Inference cannot run a graph on TensorRT.

    Args:
        built_with: paddle.inference.get_trt_compile_version(), zeros where paddle is built without TensorRT.
    """
    if graph.endswith(".json"):
        raise InputError(f"--use_tensorrt: {graph} was exported by paddle 3, which runs only the .pdmodel of paddle 2 "
                         "on TensorRT; run it without TensorRT, or export the checkpoint by paddle 2")
    if precision not in ("fp32", "fp16"):
        raise InputError(f"--use_tensorrt: --precision {precision} does not run on TensorRT; use fp32 or fp16")
    if not any(built_with):
        raise InputError("--use_tensorrt: this paddlepaddle is built without TensorRT")


def link_cuda_libraries() -> None:
    """Make links by which paddle 2.6 finds the CUDA libraries of pip's packages (requirements-gpu.txt).

    It opens them by names without a version, and looks in its own folder. Where the links cannot be made,
    LD_LIBRARY_PATH has to name libraries of CUDA 11.8 and cuDNN 8.
    """
    import paddle

    packages = importlib.util.find_spec("nvidia")
    if not paddle.__version__.startswith("2.") or packages is None:
        return
    folder = os.path.join(os.path.dirname(paddle.__file__), "libs")
    for root in packages.submodule_search_locations or ():
        for library in glob.glob(os.path.join(root, "*", "lib", "*.so.*")):
            name = os.path.basename(library)
            without_version = name.split(".so.")[0] + ".so"
            for link in (name, without_version):
                with contextlib.suppress(OSError):  # the link exists, or the folder cannot be written
                    os.symlink(os.path.relpath(library, folder), os.path.join(folder, link))
