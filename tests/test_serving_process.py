"""The search service as a process: what it says, where it listens, how it ends, and what it does not start with."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, command, free_port, refuse, succeed, wait_for_answer

pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
SERVER = ["deploy/serving/server.py", "--device", "cpu"]


def listening(port):
    """The addresses, in hexadecimal as the kernel writes them, at which a port of this machine is listened on."""
    found = []
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(path, encoding="ascii") as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except FileNotFoundError:  # no IPv6
            continue
        found += [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
    return found


@pytest.mark.parametrize("flags, address", [([], "0100007F"), (["--host", "0.0.0.0"], "00000000")])
def test_what_it_says_and_where_it_listens(exported, kept_index, flags, address):
    port = free_port()
    words = command(*SERVER, "--model_dir", exported, "--index_path", kept_index, "--port", port, *flags, bare=True)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          encoding="utf-8") as process:
        try:
            wait_for_answer(f"http://127.0.0.1:{port}/healthz", process=process)
            assert listening(port) == [address]
            process.terminate()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and out == ""
    host = flags[1] if flags else "127.0.0.1"
    said = [line for line in err.splitlines() if str(port) in line]
    assert len(said) == 1 and f"120 documents in fp32 at http://{host}:{port}," in said[0]
    assert ("SIMCSE_TOKEN in the environment asks for a token" in err) == bool(flags)
    assert err.splitlines()[-1] == "stopped" and len(err.splitlines()) == 4 + bool(flags)


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_what_is_under_way_is_answered_before_it_ends(serve, name, code):
    service = serve("--max_texts", 4000, "--max_seconds", 120)
    texts = [f"第{row}个对象,数据经统计软件处理后作进一步比较" for row in range(2000)]
    with ThreadPoolExecutor(5) as clients:
        asked = [clients.submit(service.ask, "/embed", {"texts": texts})]
        while service.figures()["simcse_batch_requests_count"] < 1:
            time.sleep(0.02)
        asked += [clients.submit(service.ask, "/search", {"queries": [f"{n}"]}) for n in range(4)]
        while service.figures()["simcse_waiting_texts"] < 4:
            assert not asked[0].done()
            time.sleep(0.02)
        service.process.send_signal(getattr(signal, name))
        assert [each.result(120)[0] for each in asked] == [200] * 5
        assert len(asked[0].result()[2]["embeddings"]) == 2000
    assert service.process.wait(60) == code
    log = service.log.read_text(encoding="utf-8")
    assert "stopped" in log and "Traceback" not in log and "Error" not in log
    assert code == 0 or log.splitlines()[-1] == "server.py: interrupted"


def test_it_ends_although_clients_do_not(serve):
    """One that sends no more, one that reads no more, one that has not asked yet and one that keeps its connection."""
    service = serve("--max_seconds", 1)
    address = ("127.0.0.1", int(service.address.rsplit(":")[-1]))
    sent = [b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", b"", b"POST /em",
            b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n" * 9]
    clients = []
    try:
        for each in sent:
            clients.append(socket.socket())
            clients[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            clients[-1].connect(address)
            clients[-1].sendall(each)
        assert clients[3].recv(15) == b"HTTP/1.1 200 OK"
        service.process.terminate()
        assert service.process.wait(60) == 0
    finally:
        for each in clients:
            each.close()
    log = service.log.read_text(encoding="utf-8")
    assert "Traceback" not in log and log.splitlines()[-2:] == [
        "uvicorn.error: Cancel 1 running task(s), timeout graceful shutdown exceeded", "stopped"]


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
    (["--model_dir", ".", "--index_path", ".", "--port", 65536], "'65536' is not a port"),
    (["--max_bach", 3], "no such flag: --max_bach; did you mean --max_batch?"),
    *((["--model_dir", ".", "--index_path", ".", flag, 0], f"argument {flag}: '0' is not ") for flag in
      ("--max_texts", "--max_text_length", "--max_top_k", "--max_body", "--max_seconds", "--max_batch",
       "--max_waiting"))], ids=lambda value: value if isinstance(value, str) else "")
def test_flags(tmp_path, flags, complaint):
    assert complaint in refuse(*SERVER, *flags, cwd=tmp_path)


@pytest.mark.parametrize("token", ["geheim\n", " ", "\tgeheim"])
def test_a_token_that_no_client_could_send(tmp_path, token):
    """The end of a file's line among it, say."""
    line = refuse(*SERVER, "--model_dir", ".", "--index_path", ".", cwd=tmp_path, env={"SIMCSE_TOKEN": token})
    assert "SIMCSE_TOKEN in the environment begins or ends with white space" in line and "geheim" not in line


def test_an_index_of_another_checkpoint(trained, exported, kept_index, tmp_path):
    other = tmp_path / "other"
    succeed("export_model.py", "--params_path", trained[0] / "checkpoints" / "model_3", "--output_path", other)
    line = refuse(*SERVER, "--model_dir", other, "--index_path", kept_index, "--port", 0)
    assert line.startswith(f"server.py: error: --index_path {kept_index}: was built with another model;")


def test_a_folder_that_does_not_say_what_it_is(exported, kept_index, tmp_path):
    """Exported before the checkpoint was recorded, or never exported."""
    old = tmp_path / "old"
    shutil.copytree(exported, old)
    record = json.loads((old / "simcse_config.json").read_text(encoding="utf-8"))
    del record["model"]
    (old / "simcse_config.json").write_text(json.dumps(record), encoding="utf-8")
    for folder in (old, tmp_path):
        line = refuse(*SERVER, "--model_dir", folder, "--index_path", kept_index, "--port", 0)
        assert f"--model_dir {folder}: its simcse_config.json does not say of which checkpoint it is" in line
    (old / "simcse_config.json").write_text("{", encoding="utf-8")
    assert "simcse_config.json: not valid JSON" in refuse(*SERVER, "--model_dir", old, "--index_path", kept_index,
                                                          "--port", 0)


@pytest.mark.parametrize("name", ["shard", "corpus.csv", "fingerprint.json"])
def test_a_damaged_index(exported, kept_index, tmp_path, name):
    damaged = tmp_path / "index"
    shutil.copytree(kept_index, damaged)
    file = next(each for each in sorted(damaged.iterdir()) if each.name.startswith(name))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content if name != "fingerprint.json" else content[:-9])
    line = refuse(*SERVER, "--model_dir", exported, "--index_path", damaged, "--port", 0)
    assert line.startswith(f"server.py: error: --index_path {damaged}: ")
    assert ("is not an index that recall.py wrote" if name == "fingerprint.json" else ": damaged: ") in line


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
    line = refuse(*SERVER, "--model_dir", exported, "--milvus_uri", "http://127.0.0.1:1", "--port", 0)
    assert line.startswith("server.py: error: --milvus_uri http://127.0.0.1:1: ")


def test_without_the_models_process_the_server_ends(serve):
    """A server that can answer nothing gives way to whatever starts it again."""
    service = serve()
    (model,) = [int(pid) for pid in Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text(
        encoding="ascii").split() if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")]
    os.kill(model, signal.SIGKILL)
    assert service.ask("/embed", {"texts": ["语义"]})[0] == 500
    assert service.process.wait(30) == 1
    assert "error: the process of the model has ended" in service.log.read_text(encoding="utf-8")
