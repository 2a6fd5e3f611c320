"""Run an exported graph by Paddle Inference, ONNX Runtime or OpenVINO, chosen by the file that the folder holds.

    predictor = load_predictor("./output", device="cpu")
    embeddings = predictor.embed(input_ids, token_type_ids)

This file imports nothing of the project. It needs numpy, and the one runtime that the folder is for (requirements.txt).
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 crashes in inflateReset2 if it loads its own zlib before Python's
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ONNX_FILE = "inference.onnx"
OPENVINO_FILE = "inference.xml"
INTEGER_FIELDS = ("embedding_size", "max_positions", "max_seq_length", "whitened_at")  # of simcse_config.json
BATCH_TOKENS = {"cpu": 2048, "gpu": 65536}  # tokens of a batch, padding included, that keep the device busy

STDERR = 2  # its file descriptor, to which C++ writes
CGROUPS = "/sys/fs/cgroup"
CGROUP_OF_PROCESS = "/proc/self/cgroup"


def count_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError), open(CGROUP_OF_PROCESS, encoding="utf-8") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "":  # version 2
                root = CGROUPS
                names = ["cpu.max"]
            elif "cpu" in controllers.split(","):
                root = os.path.join(CGROUPS, controllers)
                names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            else:
                continue
            folder = Path(os.path.normpath(root + path))
            while folder.is_relative_to(root):  # the group, and those that it is in
                with contextlib.suppress(OSError):
                    # Microseconds of all cores together in a period, and the period.
                    quota, period = " ".join((folder / name).read_text() for name in names).split()
                    if quota not in ("max", "-1"):
                        cores = min(cores, max(1, int(quota) // int(period)))
                folder = folder.parent
    return cores


CPU_CORES = count_cores()
CPU_FLAGS = ""  # Linux' description of the first processor
with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
    CPU_FLAGS = cpuinfo.read(4096)
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


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Deliver Ctrl-C and SIGTERM after the context, in which paddle is imported, to the handlers from before it.

    Paddle installs a handler of its own for SIGTERM, which prints a C++ stack on stdout, and makes an ImportError of
    Ctrl-C.
    """
    handler = signal.getsignal(signal.SIGTERM)  # None: it is not Python's
    is_main_thread = threading.current_thread() is threading.main_thread()
    if handler is None or not is_main_thread or not hasattr(signal, "pthread_sigmask"):  # which Windows lacks
        yield
        return
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


class TensorRtShape(NamedTuple):
    """The largest batch that a TensorRT engine is built for."""

    batch_size: int
    max_seq_length: int


class Settings(NamedTuple):
    """How a graph runs.

    Attributes:
        device: "cpu" or "gpu".
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
        PRECISIONS: device -> number formats that the runtime computes in there.
        precision: the number format that the graph runs in.
        embedding_size: numbers of an embedding.
        max_positions: most tokens of a text, [CLS] and [SEP] included.
        batch_tokens: tokens of a batch, padding included, that keep the device busy.
        max_batch_size: most texts of a batch; None: any number.
        calibration: what an int8 graph was calibrated with, in words; "": it is not int8. It is accurate on similar
            texts only, and nothing here can tell others: the folder lacks the float network.
    """

    PRECISIONS: dict[str, tuple[str, ...]] = {}

    def __init__(self, graph: str, record: dict, settings: Settings) -> None:
        self.precision = settings.precision
        self.embedding_size = record["embedding_size"]
        self.max_positions = record["max_positions"]
        self.batch_tokens = BATCH_TOKENS[settings.device]
        self.max_batch_size = settings.tensorrt.batch_size if settings.tensorrt else None
        self.calibration = ""
        calibration = record.get("calibration")
        if calibration:
            self.calibration = f"calibrated with {calibration['texts']} texts of {calibration['file']}"
        self.open(graph, settings)

    def open(self, graph: str, settings: Settings) -> None:
        """Load the graph of this path.

        Raises:
            InputError: the graph is damaged, or the device or the precision is not there.
            ModuleNotFoundError: the runtime is not installed.
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


class OnnxPredictor(Predictor):
    """Run inference.onnx by ONNX Runtime."""

    PRECISIONS = {"cpu": ("fp32",)}

    def open(self, graph: str, settings: Settings) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.cpu_threads
        options.log_severity_level = 3  # errors
        with reported(f"{graph} cannot be run", Exception):  # onnxruntime's errors have no narrower base class
            self._session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        outputs = self._session.run(None, {"input_ids": input_ids, "token_type_ids": token_type_ids})
        return outputs[0]


class OpenVinoPredictor(Predictor):
    """Run inference.xml by OpenVINO. What is not int8 in an int8 graph is bf16 where the processor is faster in it."""

    PRECISIONS = {"cpu": ("fp32", "bf16", "int8")}

    def open(self, graph: str, settings: Settings) -> None:
        sys.modules.setdefault("openvino_telemetry", None)  # as if not installed: it asks Google Analytics
        import openvino

        float_precision = auto_precision("cpu") if settings.precision == "int8" else settings.precision
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": settings.cpu_threads,
            "INFERENCE_PRECISION_HINT": "bf16" if float_precision == "bf16" else "f32",
        }
        with reported(f"{graph} cannot be run", RuntimeError):
            self._request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids}
        return self._request.infer(inputs, share_inputs=True)[0]


class PaddlePredictor(Predictor):
    """Run a graph of `paddle.jit.save` by Paddle Inference."""

    PRECISIONS = {"cpu": ("fp32", "bf16"), "gpu": ("fp32", "bf16", "fp16")}

    def open(self, graph: str, settings: Settings) -> None:
        with signals_held():
            import paddle

        self._graph = graph
        params = os.path.splitext(graph)[0] + ".pdiparams"
        if not os.path.isfile(params):  # paddle 3 would run the graph with any numbers
            raise InputError(f"{params}: no such file; export the checkpoint again with export_model.py")
        if graph.endswith(".json") and paddle.__version__.startswith("2."):  # which would crash
            raise InputError(f"{graph} was exported by paddle 3; paddle {paddle.__version__} cannot run it: export the "
                             "checkpoint again here")
        if settings.tensorrt:
            check_tensorrt(graph, settings.precision, paddle.inference.get_trt_compile_version())
        config = paddle.inference.Config(graph, params)
        config.disable_glog_info()
        if settings.device == "cpu":
            configure_cpu(config, settings)
        else:
            configure_gpu(config, settings)
        with reported(f"{graph} cannot be run", OSError, RuntimeError, ValueError), quiet_passes(paddle.__version__):
            self._predictor = paddle.inference.create_predictor(config)
        input_ids, token_type_ids = self._predictor.get_input_names()
        self._input_ids = self._predictor.get_input_handle(input_ids)
        self._token_type_ids = self._predictor.get_input_handle(token_type_ids)
        self._output = self._predictor.get_output_handle(self._predictor.get_output_names()[0])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        self._input_ids.copy_from_cpu(input_ids)
        self._token_type_ids.copy_from_cpu(token_type_ids)
        with reported(f"{self._graph} cannot be run", RuntimeError):  # a library of CUDA that paddle opens only now
            self._predictor.run()
        return self._output.copy_to_cpu().astype("float32", copy=False)


@contextlib.contextmanager
def quiet_passes(version: str) -> Iterator[None]:
    """Discard what paddle 2.6 prints on stderr about each change of a bf16 graph ("--- marked 159 operators ...").

    `disable_glog_info` leaves it. Errors are exceptions, which pass.

    Args:
        version: paddle's.
    """
    if not version.startswith("2."):
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(STDERR)
    discarded = os.open(os.devnull, os.O_WRONLY)
    os.dup2(discarded, STDERR)
    os.close(discarded)
    try:
        yield
    finally:
        os.dup2(stderr, STDERR)
        os.close(stderr)


# Graph file -> what runs it; a folder that holds several is run by the first. `paddle.jit.save` writes .json in
# paddle 3 and .pdmodel in paddle 2.
PREDICTORS: dict[str, type[Predictor]] = {
    ONNX_FILE: OnnxPredictor,
    OPENVINO_FILE: OpenVinoPredictor,
    "inference.json": PaddlePredictor,
    "inference.pdmodel": PaddlePredictor,
}


def find_graph(model_dir: str) -> str | None:
    """Return the name of a folder's graph, a key of PREDICTORS; None where it holds none."""
    for name in PREDICTORS:
        if os.path.isfile(os.path.join(model_dir, name)):
            return name
    return None


def read_record(model_dir: str) -> dict:
    """Return what export_model.py recorded of a folder; {} where it has no record.

    Raises:
        InputError: it is no JSON object, or a field that is read here has no such value as export_model.py writes.
    """
    path = os.path.join(model_dir, "simcse_config.json")
    if not os.path.exists(path):
        return {}
    with reported(f"{path}: not valid JSON", ValueError, RecursionError), open(path, encoding="utf-8") as file:
        record = json.load(file)
    if not isinstance(record, dict):
        raise InputError(f"{path}: not a JSON object")
    for name in INTEGER_FIELDS:
        value = record.get(name)
        if value is not None and (type(value) is not int or value < 1):  # not isinstance: a bool is an int, too
            raise InputError(f"{path}: {name}: expected an integer >= 1, got {json.dumps(value)[:40]}")
    precision = record.get("precision", "fp32")
    if not isinstance(precision, str):
        raise InputError(f"{path}: precision: expected a string, got {json.dumps(precision)[:40]}")
    calibration = record.get("calibration")
    if calibration is not None and not (isinstance(calibration, dict) and {"texts", "file"} <= calibration.keys()):
        raise InputError(f"{path}: calibration: expected texts and file, got {json.dumps(calibration)[:40]}")
    for name in ("embedding_size", "max_positions"):
        if record and record.get(name) is None:
            raise InputError(f"{path}: {name} is missing; export the checkpoint again with export_model.py")
    return record


def load_predictor(model_dir: str, *, device: str = "cpu", precision: str = "auto", cpu_threads: int = 0,
                   onednn_shapes: int = 10, tensorrt: TensorRtShape | None = None) -> Predictor:
    """Load an exported folder by the runtime that its graph is for.

    Args:
        precision: a number format, or "auto": int8 if the folder was exported in it, bf16 on a CPU that is faster in
            it, else fp32, as always without layers.
        cpu_threads: math threads on a CPU; 0: all cores.
        The others: see `Settings`.

    Raises:
        InputError: the folder holds no graph, or one that cannot run like this.
    """
    graph = find_graph(model_dir)
    if graph is None:
        raise InputError(f"--model_dir {model_dir}: no exported graph ({', '.join(PREDICTORS)}); make one with "
                         "export_model.py")
    runtime = PREDICTORS[graph]
    if device not in runtime.PRECISIONS:
        raise InputError(f"--device {device}: --model_dir {model_dir} holds {graph}, which runs with --device "
                         f"{' or '.join(runtime.PRECISIONS)}")
    record = read_record(model_dir)
    exported_in = record.get("precision", "fp32")
    if precision == "auto":
        precision = "int8" if exported_in == "int8" else auto_precision(device, onednn=onednn_shapes > 0)
        if precision not in runtime.PRECISIONS[device] or not has_layers(record):  # the stages have fp32 then, too
            precision = "fp32"
    if (precision == "int8") != (exported_in == "int8"):
        advice = "export it again without --precision int8 for others"
        if precision == "int8":
            advice = "export_model.py --format openvino --precision int8 exports in int8"
        raise InputError(f"--precision {precision}: --model_dir {model_dir} was exported in {exported_in}; {advice}")
    if precision not in runtime.PRECISIONS[device]:
        raise InputError(f"--precision {precision}: --model_dir {model_dir} holds {graph}, which runs in "
                         f"{' or '.join(runtime.PRECISIONS[device])} with --device {device}")
    if "embedding_size" not in record:
        raise InputError(f"--model_dir {model_dir}: no record (simcse_config.json) of the graph; export the checkpoint "
                         "again with export_model.py")
    settings = Settings(device, precision, cpu_threads or CPU_CORES, onednn_shapes, tensorrt)
    try:
        return runtime(os.path.join(model_dir, graph), record, settings)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed for {sys.executable}; requirements.txt of deploy/python names "
                         f"what {graph} needs") from None


def has_layers(record: dict) -> bool:
    """Return whether an exported encoder has layers."""
    config = record.get("encoder_config")
    return not isinstance(config, dict) or config.get("num_hidden_layers") != 0


def auto_precision(device: str, onednn: bool = True) -> str:
    """Return "bf16" for a CPU that is faster in it by oneDNN (AMX, or AMD's AVX-512 BF16), else "fp32"."""
    faster = device == "cpu" and onednn and CPU_HAS_BF16 and (CPU_HAS_AMX or CPU_IS_AMD)
    return "bf16" if faster else "fp32"


def configure_cpu(config: Any, settings: Settings) -> None:
    """Set a paddle.inference.Config for a CPU, with oneDNN or without it."""
    if settings.precision == "bf16" and not settings.onednn_shapes:
        raise InputError("--precision bf16 with --device cpu needs oneDNN (--enable_mkldnn True)")
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
    folder = Path(paddle.__file__).parent / "libs"
    for root in packages.submodule_search_locations or ():
        for library in Path(root).glob("*/lib/*.so.*"):
            without_version = library.name.split(".so.")[0] + ".so"
            for name in (library.name, without_version):
                with contextlib.suppress(OSError):  # the link exists, or the folder cannot be written
                    (folder / name).symlink_to(os.path.relpath(library, folder))
