"""The search service as a process: what it says, where it listens, and how it ends."""

import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, command, free_port, wait_for_answer

pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")


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
    words = command("deploy/serving/server.py", "--device", "cpu", "--model_dir", exported, "--index_path", kept_index,
                    "--port", port, *flags, bare=True)
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
    assert err.splitlines()[-1] == "stopped" and len(err.splitlines()) == 5 + bool(flags)


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
    assert "Traceback" not in log and log.splitlines()[-1] == "stopped"
    # On a busy machine the body that does not come has been given up before.
    cancelled = "uvicorn.error: Cancel 1 running task(s), timeout graceful shutdown exceeded"
    assert log.splitlines()[-2] == cancelled or "http://" in log.splitlines()[-2]


def models_process(server):
    """The process of the model, by its id."""
    (model,) = [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text(encoding="ascii").split()
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")]
    return model


def test_without_the_models_process_the_server_ends(serve):
    """A server that can answer nothing gives way to whatever starts it again."""
    service = serve()
    os.kill(models_process(service.process.pid), signal.SIGKILL)
    assert service.ask("/embed", {"texts": ["语义"]})[0] == 500
    assert service.process.wait(30) == 1
    assert "error: the process of the model has ended" in service.log.read_text(encoding="utf-8")


def written_to(pipe):
    """A pipe that somebody reads, opened to be written to; None: nobody does."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_signals_while_the_index_is_opened(exported, kept_index, tmp_path):
    """It never is here: a shard is a pipe. SIGHUP to all of a group leaves it at that, SIGTERM ends it at once."""
    shutil.copytree(kept_index, tmp_path / "index")
    shard = tmp_path / "index" / "shard_0.bin"
    shard.unlink()
    os.mkfifo(shard)
    words = command("deploy/serving/server.py", "--device", "cpu", "--model_dir", exported, "--index_path",
                    tmp_path / "index", "--port", free_port(), bare=True)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            while not (pipe := written_to(shard)):
                assert process.poll() is None
                time.sleep(0.05)
            model = models_process(process.pid)
            os.killpg(process.pid, signal.SIGHUP)
            time.sleep(0.5)
            assert process.poll() is None and models_process(process.pid) == model
            process.terminate()
            _, err = process.communicate(timeout=5)
            os.close(pipe)
        finally:
            process.kill()
    assert process.returncode == 0 and len(err.splitlines()) == 1 and not os.path.exists(f"/proc/{model}")
