"""benchmarks/gpu.py, on the CPU: all that it does on a GPU, at a small size. No time is tested."""

import importlib
import inspect
import json

import pytest
from conftest import ROOT, refuse, run_script

SECTIONS = ["machine", "figures", "export", "ranks", "breaks", "step", "memory", "train", "encode"]
GPU = "benchmarks/gpu.py"


@pytest.mark.slow
def test_its_figures_on_a_cpu(tmp_path):
    """Right figures, and operators within their bound; what a CPU has not is said, and not wrong.

    What it measures takes minutes: those functions are called with their arguments by the tests below alone.
    """
    only = ["machine", "figures", "export", "step", "memory"]
    result = run_script(GPU, "--device", "cpu", "--json", "rows.json", "--only", *only, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert list(dict.fromkeys(row["section"] for row in rows)) == ["prepare", *only]
    found = {row["what"]: row for row in rows}
    assert all(row["what"] in result.stdout and row["ok"] is not False for row in rows)
    for what in ("losses, fp32", "1 - cosine, fp32", "operators a step, 6 layers", "--chunk_size takes less memory"):
        assert found[what]["ok"] is True, what
    assert found["training, fp16"]["figure"] == (
        "not there: --precision fp16 needs --device gpu: paddle has no such training on a CPU")


def test_a_figure_that_is_not_as_recorded_is_wrong(tmp_path):
    recorded = json.loads((ROOT / "benchmarks" / "gpu_figures.json").read_text(encoding="utf-8"))
    recorded["losses"][-1] *= 1.001
    (tmp_path / "other.json").write_text(json.dumps(recorded))
    result = run_script(GPU, "--device", "cpu", "--only", "figures", "--figures", "other.json", cwd=tmp_path)
    wrong = [row for row in json.loads((tmp_path / "gpu.json").read_text()) if row["ok"] is False]
    assert result.returncode == 1 and [row["what"] for row in wrong] == ["losses, fp32"]
    assert 9e-4 < wrong[0]["figure"] < 1.1e-3 and "1 of " in result.stderr


@pytest.mark.parametrize("function, seconds, said", [
    ("nothing", 60, "failed: KeyError: 'nothing'"), ("machine", 0.1, "failed: it took longer than 0.1 s"),
    ("machine", 0, "failed: not run, 30 minutes are over")])
def test_a_job_that_fails_is_a_row(monkeypatch, tmp_path, function, seconds, said):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    (row,) = gpu.run_job(gpu.Job("checks", function, {}), str(tmp_path), "cpu", seconds)
    assert row["figure"] == said and row["ok"] is False and row["what"] == function


@pytest.mark.parametrize("device, cards", [("cpu", 2), ("gpu", 1), ("gpu", 4)])
def test_jobs_are_functions_that_take_their_arguments(monkeypatch, device, cards):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    sections = gpu.sections(device, cards)
    assert list(sections) == SECTIONS
    for job in (job for jobs in sections.values() for job in jobs):
        function = getattr(importlib.import_module(f"gpu_{job.module}"), job.function)
        inspect.signature(function).bind(scratch="", device="gpu", **job.arguments)


def test_memory_that_runs_out_is_a_row(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_speed

    with gpu_speed.unless_out_of_memory("a batch") as fits:
        raise MemoryError("(ResourceExhausted) Out of memory error on GPU 0.")
    assert not fits and '"what": "a batch", "figure": "out of memory"' in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="shapes"), gpu_speed.unless_out_of_memory("a batch"):
        raise RuntimeError("shapes differ")


def test_mistakes_are_one_line(tmp_path):
    assert "no GPU that this paddlepaddle can use" in refuse(GPU, "--device", "gpu")
    assert "argument --only: invalid choice: 'planes'" in refuse(GPU, "--only", "planes")
    assert "--record needs --device cpu" in refuse(GPU, "--record", "--device", "gpu")
    assert "none.json: no such file" in refuse(GPU, "--device", "cpu", "--figures", tmp_path / "none.json")
