"""GPUs without one: which are taken, what is said of those that cannot be used, which Python the shell scripts take."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, refuse

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


def test_the_cpu_build_is_one_line(tmp_path):
    import paddle

    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this paddle can use GPUs")
    for flags in ([], ["--gpus", "0,1,2,3"]):
        line = refuse("scripts/launch.py", *flags, "train.py")
        assert line.startswith("launch.py: error: --device gpu: no GPU that this paddlepaddle can use")
        assert "DEVICE=cpu" in line


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
    code, words, said = words_of(script, stub, PYTHON=str(stub), DEVICE="cpu", GPUS="0,1")
    assert code == 0 and "scripts/launch.py" not in words, said


@pytest.mark.parametrize("script", ["run_build_index", "predict"])
def test_encoding_takes_the_batch_size_of_the_device_unless_asked(tmp_path, script):
    stub = tmp_path / "python"
    assert "--batch_size" not in words_of(script, stub, PYTHON=str(stub), DEVICE="cpu")[1]
    words = words_of(script, stub, PYTHON=str(stub), DEVICE="cpu", BATCH_SIZE="7")[1]
    assert words[words.index("--batch_size") + 1] == "7"


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
