"""What no script may do, and that what is installed is what the requirements name."""

import ast
import re
import subprocess
import sys
from importlib import metadata

import pytest
from conftest import ROOT

SOURCES = sorted(path for folder in ("", "simcse/**/", "scripts/", "deploy/**/") for path in ROOT.glob(f"{folder}*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_eval_no_shell(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads",
                                "paddle.load", "yaml.load"), f"{path}:{node.lineno}"
            assert not any(word.arg == "shell" for word in node.keywords), f"{path}:{node.lineno}"


def test_bandit_finds_nothing():
    result = subprocess.run([sys.executable, "-m", "bandit", "-q", "--severity-level", "medium", *map(str, SOURCES)],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", sorted(path.relative_to(ROOT).as_posix() for folder in (".", "deploy/python")
                                        for path in (ROOT / folder).glob("requirements*.txt")))
def test_pins_are_exact_and_installed(name):
    """Every package at one version, except where the file may say less; and, of this stack, that version is here."""
    loose = {"scipy", "setuptools", "pip"}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if not line or line.startswith(("#", "--extra-index-url https://www.paddlepaddle.org.cn/")):
            continue
        package, relation, version = re.fullmatch(r"([\w-]+)(?:(==|>=|<)([\w.]+))?", line).groups()
        assert relation == "==" or package in loose, line
        if relation == "==" and not name.startswith("requirements-gpu"):
            assert metadata.version(package) == version


def test_the_default_stack_on_gpus_is_that_on_a_cpu():
    """But for paddle itself, which has another name there: the CPU's would be written over it."""
    def pins(name):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line and not line.startswith(("#", "--"))]

    (paddle, *cpu), (paddle_gpu, *gpu) = pins("requirements.txt"), pins("requirements-gpu3.txt")
    assert gpu == cpu and paddle_gpu == paddle.replace("paddlepaddle", "paddlepaddle-gpu")
