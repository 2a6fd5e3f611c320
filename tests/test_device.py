"""GPUs without one: which are taken, what is said of those that cannot be used, which Python the shell scripts take."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

from deploy.python import predictor
from simcse import console, device, flags

import paddle
import pytest
from conftest import ENCODER, ROOT, refuse

# Stands in for paddle, and its launcher, on a machine with CARDS GPUs.
PADDLE = """
import os
from types import SimpleNamespace
Tensor = object
names = os.environ.get("CUDA_VISIBLE_DEVICES")
cards = [str(card) for card in range(int(os.environ["CARDS"]))]
seen = cards if names is None else [name for name in names.split(",") if name in cards]
device = SimpleNamespace(is_compiled_with_cuda=lambda: True, cuda=SimpleNamespace(device_count=lambda: len(seen)))
"""
SHOW = """
import os, sys
print(os.path.basename(os.path.dirname(sys.argv[0])), *sys.argv[1:], sep="|")
print(os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.fixture
def cards(tmp_path):
    """Runs scripts/launch.py on a machine with so many GPUs: exit code, what was run with what, the GPUs that it may
    use, stderr."""
    for name, content in (("paddle/__init__.py", PADDLE), ("paddle/distributed/launch/__main__.py", SHOW),
                          ("alone/show.py", SHOW)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    def launch(count, *flags, visible=None):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CARDS": str(count)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        words = [sys.executable, ROOT / "scripts" / "launch.py", *flags, "--log_dir", "logs", "alone/show.py", "--x", 1]
        ran = subprocess.run([*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return ran.returncode, ran.stdout.splitlines(), ran.stderr

    return launch


@pytest.mark.parametrize("count, visible, flags, gpus", [
    (4, None, [], "0,1,2,3"), (2, None, ["--gpus", "all"], "0,1"), (4, "2,3", [], "2,3"),
    (4, None, ["--gpus", "0,1,2,3"], "0,1,2,3"), (8, "4,5,6,7", ["--gpus", "6, 5"], "6,5"),
    (2, "0,1,7", [], "0,1")])
def test_several_gpus_go_through_the_launcher(cards, tmp_path, count, visible, flags, gpus):
    """All that are visible, or those that are named; it prints no environment, and what it writes is its owner's."""
    code, (ran, seen), said = cards(count, *flags, visible=visible)
    assert code == 0, said
    assert ran == f"launch|--gpus|{gpus}|--log_level|CRITICAL|--log_dir|logs|alone/show.py|--x|1" and seen == gpus
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("count, visible, flags, gpu", [
    (1, None, [], "0"), (4, "3", [], "3"), (4, None, ["--gpus", "2"], "2"), (4, None, ["--gpus", "first"], "0"),
    (4, "3,1", ["--gpus", "first"], "3")])
def test_one_gpu_needs_no_launcher(cards, tmp_path, count, visible, flags, gpu):
    code, (ran, seen), said = cards(count, *flags, visible=visible)
    assert (code, ran, seen) == (0, "alone|--x|1", gpu), said
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("count, visible, gpus, message", [
    (2, None, "0,1,2,3", "GPUS=0,1,2,3: no GPU 2; there are 0,1"), (1, None, "1", "GPUS=1: no GPU 1; there is 0"),
    (4, "2,3", "0", "GPUS=0: no GPU 0; there are 2,3 by CUDA_VISIBLE_DEVICES"),
    (4, None, "1,1", "GPUS=1,1: GPU 1 is named twice"), (4, None, "0,", "GPUS=0,: no GPU without a number; there are"),
    (4, None, "x", "GPUS=x: no GPU x"), (0, None, "0", "--device gpu: no GPU that this paddlepaddle can use"),
    (4, "", "all", "--device gpu: no GPU that this paddlepaddle can use")])
def test_a_gpu_that_is_not_there_is_one_line(cards, count, visible, gpus, message):
    code, printed, said = cards(count, "--gpus", gpus, visible=visible)
    assert (code, printed) == (2, []) and said.count("\n") == 1
    assert said.startswith(f"launch.py: error: {message}")


def test_without_a_gpu_or_with_the_cpu_build_it_is_one_line():
    if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        pytest.skip("there is a GPU")
    for script in ("train", "run_build_index", "predict"):
        ran = subprocess.run(["sh", f"scripts/{script}.sh", "--any_flag"], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "PYTHON": sys.executable, "DEVICE": "gpu", "GPUS": "0"})
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
        assert ran.stderr.startswith("launch.py: error: --device gpu: no GPU that this paddlepaddle can use; run with ")
        assert "DEVICE=cpu" in ran.stderr


@pytest.mark.default_stack
def test_every_script_says_in_one_line_that_there_is_no_gpu(checkpoint, exported, sample, kept_index, tmp_path):
    if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        pytest.skip("there is a GPU")
    of_model, corpus = ["--params_path", checkpoint], sample / "corpus.csv"
    scripts = {
        "train.py": ["--train_set_file", sample / "train_unsupervised.csv", "--model_name_or_path", ENCODER],
        "scripts/pretrain.py": ["--train_set_file", corpus, "--model_name_or_path", ENCODER],
        "recall.py": [*of_model, "--corpus_file", corpus, "--query", "语义"],
        "predict.py": [*of_model, "--text_pair_file", sample / "test.csv"], "inference.py": of_model,
        "deploy/python/predict.py": ["--model_dir", exported]}
    if importlib.util.find_spec("fastapi_offline"):
        scripts["deploy/serving/server.py"] = ["--model_dir", exported, "--index_path", kept_index, "--port", 0]
    for script, words in scripts.items():
        line = refuse(script, "--device", "gpu", *words, cwd=tmp_path)
        assert line.startswith(f"{os.path.basename(script)}: error: --device gpu: no GPU that this paddlepaddle can "
                               "use; run with --device cpu"), line
        assert list(tmp_path.iterdir()) in ([], [tmp_path / "recall_result_dir"])


# --------------------------------------------------------------------------------------------------- a GPU by itself
@pytest.fixture
def card(monkeypatch):
    """Makes the current device look like a GPU of a compute capability, under a build for some; it computes on the
    CPU."""
    def make(capability, built, version="3.3.1", cuda="12.6"):
        monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda device: "NVIDIA X1")
        monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(paddle, "__version__", version)
        monkeypatch.setattr(paddle.version, "cuda", lambda: cuda)
        if built is None:
            monkeypatch.delattr(paddle.version, "cuda_archs", raising=False)
        else:
            monkeypatch.setattr(paddle.version, "cuda_archs", lambda: built, raising=False)

    return make


OLD = {"built": None, "version": "2.6.2", "cuda": "11.8"}  # what pip finds


@pytest.mark.parametrize("capability, build", [
    ((7, 0), OLD), ((8, 6), OLD), ((8, 9), OLD), ((9, 0), {**OLD, "cuda": "12.0"}), ((9, 0), {"built": [75, 80, 90]}),
    ((8, 9), {"built": ["80"]}), ((12, 0), {"built": [80, 120]}), ((7, 0), {"built": []})])
def test_a_gpu_that_the_build_is_for(card, capability, build):
    """Of a major number the code of a lower minor one runs; of a build that is not known nothing is said."""
    card(capability, **build)
    device.check_gpu()


@pytest.mark.parametrize("capability, build, known", [
    ((9, 0), OLD, "2.6.2 is built for 6.1, 7.0, 7.5, 8.0, 8.6"), ((6, 0), OLD, "2.6.2 is built for 6.1"),
    ((12, 0), {"built": [75, 80, 86, 89]}, "3.3.1 is built for 7.5, 8.0, 8.6, 8.9"),
    ((7, 0), {"built": [75, 80]}, "3.3.1"), ((8, 0), {"built": [86]}, "3.3.1 is built for 8.6")])
def test_a_gpu_that_the_build_has_no_code_for_is_one_line(card, capability, build, known):
    card(capability, **build)
    with pytest.raises(console.InputError) as said:
        device.check_gpu()
    message, (major, minor) = str(said.value), capability
    assert message.startswith(f"--device gpu: NVIDIA X1 has compute capability {major}.{minor}, and this ")
    assert known in message and "says which one fits" in message and "\n" not in message


LIBRARY = """(PreconditionNotMet) The third-party dynamic library (libcublas.so) that Paddle depends on is not \
configured correctly. (error code is libcublas.so: cannot open shared object file: No such file or directory)
  Suggestions:
  1. Check if the third-party dynamic library (e.g. CUDA, CUDNN) is installed correctly. (at /paddle/x.cc:312)"""
DRIVER = """

--------------------------------------
C++ Traceback (most recent call last):
--------------------------------------
0   phi::backends::gpu::GetGPUDeviceCount()

----------------------
Error Message Summary:
----------------------
ExternalError: CUDA error(803), system has unsupported display driver / cuda driver combination.
  [Hint: Please search for the error code(803) on website to get Nvidia's advice about CUDA Error.] (at /paddle/x.cc:1)
"""
FULL = """(ResourceExhausted)

Out of memory error on GPU 0. Cannot allocate 15.258789GB memory on GPU 0, 15.6GB memory has been allocated.

Please check whether there is any other process using GPU 0. (at /paddle/x.cc:86)"""
LATE = "(External) CUDA error(2), out of memory.\n  [Hint: 'cudaErrorMemoryAllocation'.] (at /paddle/x.cc:65)"


@pytest.mark.parametrize("error, line", [
    (RuntimeError(LIBRARY), "--device gpu: NVIDIA X1 cannot be computed on: The third-party dynamic library "
     "(libcublas.so) that Paddle depends on is not configured correctly. (error code is libcublas.so: cannot open "
     "shared object file: No such file or directory); requirements-gpu.txt has the CUDA libraries"),
    (OSError(DRIVER), "--device gpu: NVIDIA X1 cannot be computed on: CUDA error(803), system has unsupported display "
     "driver / cuda driver combination."),
    (MemoryError(FULL), "--device gpu: NVIDIA X1 cannot be computed on: Out of memory error on GPU 0. Cannot allocate "
     "15.258789GB memory on GPU 0, 15.6GB memory has been allocated.")])
def test_the_first_tensor_says_in_one_line_what_is_wrong(card, monkeypatch, error, line):
    def ones(shape):
        raise error

    card((8, 0), [80])
    monkeypatch.setattr(paddle, "ones", ones)
    with pytest.raises(console.InputError) as said:
        device.check_gpu()
    assert str(said.value) == line


def ended(error, capsys):
    """Exit code and stderr of a script that ends so."""
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        console.run(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, said", [
    (MemoryError(FULL), "out of memory: Out of memory error on GPU 0. Cannot allocate 15.258789GB memory on GPU 0, "
     "15.6GB memory has been allocated.; "), (OSError(LATE), "out of memory: CUDA error(2), out of memory.; "),
    (OSError("(External) CUBLAS error(3).\n [Hint: 'CUBLAS_STATUS_ALLOC_FAILED'.]"), "out of memory: CUBLAS error(3)."),
    (MemoryError(), "out of memory: MemoryError; "), (OSError(DRIVER), "the GPU cannot be used: CUDA error(803), syst"),
    (RuntimeError(LIBRARY), "the GPU cannot be used: The third-party dynamic library (libcublas.so) that"),
    (RuntimeError("Unsupported GPU architecture"), "the GPU cannot be used: Unsupported GPU architecture"),
    (OSError("(External) NCCL error(2), unhandled system error."), "the GPU cannot be used: NCCL error(2), unhandled")])
def test_trouble_with_memory_or_cuda_is_one_line(monkeypatch, capsys, error, said):
    """Out of memory names the flags of this program that help."""
    parser = flags.ArgumentParser(description="x")
    for flag in ("--batch_size", "--max_seq_length", "--other"):
        parser.add_argument(flag)
    parser.parse_args([])
    code, printed = ended(error, capsys)
    assert code == 2 and printed.count("\n") == 1
    assert printed.startswith(f"{console.PROGRAM}: error: {said}")
    assert printed.endswith("; a lower --batch_size or --max_seq_length takes less\n") == ("out of memory: " in said)


@pytest.mark.parametrize("error", [RuntimeError("x"), ValueError(FULL), NotImplementedError("CUDA"), SystemError("y")])
def test_a_mistake_of_the_program_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        console.run(main)


def test_memory_that_paddle_does_not_get_is_one_line(capsys):
    with pytest.raises(MemoryError) as error:
        paddle.empty([1 << 44])
    code, printed = ended(error.value, capsys)
    assert code == 2 and re.search(r"error: out of memory: Fail to alloc memory of \d+ size, error code is 12", printed)


@pytest.mark.parametrize("module", [device, predictor])
@pytest.mark.parametrize("version, linked", [("2.6.2", True), ("3.3.1", False)])
def test_cuda_libraries_of_pip_are_linked_as_paddle_names_them(tmp_path, monkeypatch, version, linked, module):
    for name in ("nvidia/cudnn/lib/libcudnn.so.8", "nvidia/cublas/lib/libcublas.so.11", "paddle/libs/libcublas.so",
                 "nvidia/__init__.py", "paddle/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(paddle, "__version__", version)
    monkeypatch.setattr(paddle, "__file__", str(tmp_path / "paddle" / "__init__.py"))
    for _ in range(2):
        module.link_cuda_libraries()
    libraries = {path.name: path.read_text() for path in (tmp_path / "paddle" / "libs").iterdir()}
    assert libraries == {"libcublas.so": "paddle/libs/libcublas.so", **({
        "libcublas.so.11": "nvidia/cublas/lib/libcublas.so.11", "libcudnn.so": "nvidia/cudnn/lib/libcudnn.so.8",
        "libcudnn.so.8": "nvidia/cudnn/lib/libcudnn.so.8"} if linked else {})}


@pytest.mark.parametrize("library", ["16GetNCCL", "17GetCUDNN", "17GetCUFFT", "17GetNVRTC", "18GetCublas",
                                     "20GetCublasLt", "18GetCurand", "20GetCusolver", "20GetCusparse"])
def test_paddle_opens_the_cuda_libraries_of_pip(library):
    """By paddle's own functions, in the GPU build of paddle 2.6, for which no driver is needed."""
    if not (paddle.device.is_compiled_with_cuda() and paddle.__version__.startswith("2.")):
        pytest.skip("this paddle is not the GPU build of requirements-gpu.txt")
    device.link_cuda_libraries()
    code = ("import ctypes, os, simcse, paddle\n"
            "phi = ctypes.CDLL(os.path.join(os.path.dirname(paddle.__file__), 'libs', 'libphi.so'))\n"
            f"find = phi._ZN3phi7dynload{library}DsoHandleEv\nfind.restype = ctypes.c_void_p\nos._exit(not find())\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ----------------------------------------------------------------------------------------------------- shell scripts
def words_of(script, stub, *flags, cwd=ROOT, **environment):
    """Exit code, the words that a shell script runs Python with, stderr."""
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("#!/bin/sh\nprintf '%s\\n' \"$0\" \"$@\"\n")
    stub.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("GPUS", "BATCH_SIZE", "DEVICE", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")}
    ran = subprocess.run(["sh", f"scripts/{script}.sh", *flags], cwd=cwd, capture_output=True, text=True,
                         env={**inherited, **environment})
    return ran.returncode, ran.stdout.splitlines(), ran.stderr


@pytest.mark.parametrize("script, gpus", [("train", "all"), ("run_build_index", "first"), ("predict", "first")])
def test_shell_scripts_leave_the_gpus_to_launch(tmp_path, script, gpus):
    stub = tmp_path / "python"
    for asked in ({}, {"GPUS": "3"}, {"GPUS": "0,1,2,3"}):
        code, words, said = words_of(script, stub, PYTHON=str(stub), **asked)
        if script == "predict" and "," in asked.get("GPUS", ""):
            assert (code, words) == (2, []) and said == "predict.sh: error: GPUS=0,1,2,3: pairs are scored on one GPU\n"
        else:
            assert code == 0, said
            assert words[2:5] == ["scripts/launch.py", "--gpus", asked.get("GPUS", gpus)]
            assert words[words.index("--device") + 1] == "gpu"
    for flag, device_name in (("--quiet", "cpu"), ("--help", "gpu")):
        code, words, said = words_of(script, stub, flag, PYTHON=str(stub), DEVICE=device_name, GPUS="1")
        assert code == 0 and flag in words and "scripts/launch.py" not in words, said


@pytest.mark.parametrize("script", ["run_build_index", "predict"])
def test_encoding_takes_the_batch_size_of_the_device_unless_asked(tmp_path, script):
    stub = tmp_path / "python"
    assert "--batch_size" not in words_of(script, stub, PYTHON=str(stub), DEVICE="cpu")[1]
    words = words_of(script, stub, PYTHON=str(stub), DEVICE="cpu", BATCH_SIZE="7")[1]
    assert words[words.index("--batch_size") + 1] == "7"


@pytest.mark.default_stack
def test_an_activated_environment_comes_before_the_projects_own(tmp_path):
    """conda's base, which every shell has, is not what somebody activated."""
    shutil.copytree(ROOT / "scripts", tmp_path / "clone" / "scripts")
    folders = {name: tmp_path / name for name in ("venv", "conda", "clone/.venv", "given")}
    for folder in folders.values():
        words_of("evaluate", folder / "bin" / "python")

    def taken(**environment):
        code, words, said = words_of("evaluate", folders["given"] / "bin" / "python", cwd=tmp_path / "clone",
                                     **environment)
        assert code == 0, said
        return words[0]

    venv, conda = {"VIRTUAL_ENV": str(folders["venv"])}, {"CONDA_PREFIX": str(folders["conda"])}
    assert taken() == ".venv/bin/python" == taken(VIRTUAL_ENV=str(tmp_path / "gone"))
    assert taken(**venv) == taken(**venv, **conda) == f"{folders['venv']}/bin/python"
    assert taken(**conda, CONDA_DEFAULT_ENV="gpu") == f"{folders['conda']}/bin/python"
    assert taken(**conda, CONDA_DEFAULT_ENV="base") == ".venv/bin/python"
    given = str(folders["given"] / "bin" / "python")
    assert taken(**venv, PYTHON=given) == given
