"""The search service as a process: what it does not start with, and what it says then."""

import json
import shutil
import socket

import pytest
from conftest import refuse, succeed

pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
SERVER = ["deploy/serving/server.py", "--device", "cpu"]


def test_a_port_that_is_taken(exported, kept_index):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert refuse(*SERVER, "--model_dir", exported, "--index_path", kept_index, "--port", port) == (
            f"server.py: error: --host 127.0.0.1 --port {port}: address already in use")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70, "é" * 70, "1.2.3.4.5", "203.0.113.1", "::g"],
                         ids=ascii)
def test_an_address_that_is_not_of_this_machine(tmp_path, host):
    line = refuse(*SERVER, "--model_dir", tmp_path, "--index_path", tmp_path, "--host", host)
    assert line.startswith(f"server.py: error: --host {host} --port 8000: ")


@pytest.mark.parametrize("flags, complaint", [
    (["--index_path", "."], "argument --model_dir: ./output: no such folder"),
    (["--model_dir", "."], "one of --index_path and --milvus_uri is needed"),
    (["--model_dir", ".", "--index_path", ".", "--milvus_uri", "a.db"],
     "one of --index_path and --milvus_uri is needed, not both"),
    (["--model_dir", ".", "--index_path", "nowhere"], "argument --index_path: nowhere: no such folder"),
    (["--model_dir", ".", "--index_path", ".", "--milvus_collection", "a"], "--milvus_collection needs --milvus_uri"),
    (["--model_dir", ".", "--milvus_uri", "a"], "a is neither http://host:port nor a path that ends in .db"),
    (["--model_dir", ".", "--index_path", ".", "--device", "gpu", "--cpu_threads", 1], "--cpu_threads needs --device"),
    (["--model_dir", ".", "--index_path", ".", "--precision", "fp16"], "--precision fp16 needs --device gpu"),
    (["--model_dir", ".", "--index_path", ".", "--host", ""], "argument --host: an empty text"),
    (["--model_dir", ".", "--index_path", ".", "--port", 65536], "expected a port in [0, 65535], got '65536'"),
    (["--max_bach", 3], "no such flag: --max_bach; did you mean --max_batch?"),
    *((["--model_dir", ".", "--index_path", ".", flag, 0], f"argument {flag}: expected ") for flag in
      ("--max_texts", "--max_text_length", "--max_top_k", "--max_body", "--max_seconds", "--max_batch",
       "--max_waiting"))], ids=lambda value: value if isinstance(value, str) else "")
def test_flags(tmp_path, flags, complaint):
    assert complaint in refuse(*SERVER, *flags, cwd=tmp_path)


@pytest.mark.parametrize("token", ["geheim\n", " ", "\tgeheim"])
def test_a_token_that_no_client_could_send(tmp_path, token):
    """The end of a file's line among it, say."""
    line = refuse(*SERVER, "--model_dir", ".", "--index_path", ".", cwd=tmp_path, env={"SIMCSE_TOKEN": token})
    assert "SIMCSE_TOKEN in the environment begins or ends with white space" in line and "geheim" not in line


def test_an_index_of_another_checkpoint(checkpoint, exported, kept_index, tmp_path):
    other = tmp_path / "other"
    succeed("export_model.py", "--params_path", checkpoint.with_name("model_2"), "--output_path", other)
    line = refuse(*SERVER, "--model_dir", other, "--index_path", kept_index, "--port", 0)
    assert line.startswith(f"server.py: error: --index_path {kept_index}: was built with another model;")


def test_a_folder_that_does_not_say_what_it_is(exported, kept_index, tmp_path):
    """Exported before the checkpoint was recorded, or never exported."""
    old = tmp_path / "old"
    shutil.copytree(exported, old)
    record = json.loads((old / "simcse_config.json").read_text(encoding="utf-8"))
    del record["model"]
    (old / "simcse_config.json").write_text(json.dumps(record), encoding="utf-8")
    problems = ((old, "simcse_config.json does not name the checkpoint"), (tmp_path, "no simcse_config.json"))
    for folder, problem in problems:
        line = refuse(*SERVER, "--model_dir", folder, "--index_path", kept_index, "--port", 0)
        assert f"--model_dir {folder}: {problem}" in line
    (old / "simcse_config.json").write_text("{", encoding="utf-8")
    assert "simcse_config.json: not valid JSON" in refuse(*SERVER, "--model_dir", old, "--index_path", kept_index,
                                                          "--port", 0)


@pytest.mark.parametrize("name", ["shard", "corpus.csv", "manifest.json"])
def test_a_damaged_index(exported, kept_index, tmp_path, name):
    damaged = tmp_path / "index"
    shutil.copytree(kept_index, damaged)
    file = next(each for each in sorted(damaged.iterdir()) if each.name.startswith(name))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content if name != "manifest.json" else content[:-9])
    line = refuse(*SERVER, "--model_dir", exported, "--index_path", damaged, "--port", 0)
    assert line.startswith(f"server.py: error: --index_path {damaged}: ")
    assert ": damaged: " in line


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "fastapi_offline", "prometheus_client"])
def test_a_missing_package_is_one_line(exported, kept_index, tmp_path, package):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    line = refuse(*SERVER, "--model_dir", exported, "--index_path", kept_index, "--port", 0,
                  env={"PYTHONPATH": str(tmp_path)})
    assert line == f"server.py: error: {package} is not installed; pip install -r requirements-serving.txt"


def test_a_collection_that_is_not_there(exported, tmp_path):
    pytest.importorskip("pymilvus", reason="requirements-milvus.txt is not installed")
    line = refuse(*SERVER, "--model_dir", exported, "--milvus_uri", tmp_path / "a.db", "--port", 0)
    assert f"--milvus_collection simcse: {tmp_path / 'a.db'} has no such collection" in line
    line = refuse(*SERVER, "--model_dir", exported, "--milvus_uri", tmp_path / "a.db", "--max_top_k", 16385)
    assert line == "server.py: error: --max_top_k 16385: Milvus gives at most 16384"
    line = refuse(*SERVER, "--milvus_uri", "http://127.0.0.1:1", "--milvus_index_params", "nlist=2,nprobe=1",
                  "--model_dir", exported)
    assert "error: --milvus_index_params: nlist cannot be changed after the collection was built (see" in line
    line = refuse(*SERVER, "--model_dir", exported, "--milvus_uri", "http://127.0.0.1:1", "--port", 0)
    assert line.startswith("server.py: error: --milvus_uri http://127.0.0.1:1: ")
