"""A real Milvus server of this machine, from the pip package `milvus`, which has an older one: 2.3.5."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("milvus-server")
START_SECONDS = 180
# Settings, by the names that they have in the environment, that have it look more often what there is to do; a test
# waits a quarter of a minute for the index of 6,000 rows otherwise.
QUICK = {
    "QUERYCOORD_UPDATENEXTTARGETINTERVAL": "1",
    "QUERYCOORD_CHECKINTERVAL": "200",
    "QUERYCOORD_SEGMENTCHECKINTERVAL": "200",
    "INDEXCOORD_SCHEDULER_INTERVAL": "100",
    "DATACOORD_SEGMENT_ASSIGNMENTEXPIRATION": "200",
}


class MilvusServer:
    """A server and its data, in a folder. Its processes are a group of their own, which signals are sent to.

    Args:
        folder: of its data, its configuration and its logs.
        settings: of its configuration, such as "common.security.authorizationEnabled=true".
        environment: further ones, by the names that they have in the environment.
    """

    def __init__(self, folder, *settings, environment=QUICK):
        self.folder = Path(folder)
        self._environment = environment
        self._settings = [word for setting in settings for word in ("--extra-config", setting)]
        self._process = None
        self._port = free_port()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self._port}"

    def start(self):
        """Start it, on the port that it had before if it is free, and wait until it answers to MILVUS_TOKEN."""
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [PROGRAM, "--data", self.folder, "--proxy-port", str(self._port), *self._settings]
        env = {**os.environ, **self._environment, "ETCD_CONFIG_PATH": str(self._write_etcd_configuration()),
               "PROXY_INTERNALPORT": str(free_port())}
        with open(self.folder / "started.log", "ab") as log:
            self._process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
        os.sched_setaffinity(self._process.pid, range(os.cpu_count()))  # a worker of the tests has one core
        self._wait_until_it_answers()
        return self

    def _write_etcd_configuration(self):
        """Write which ports the etcd in it takes; they are the same for all servers of a machine otherwise."""
        path = self.folder / "etcd.yaml"
        client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        path.write_text(f"name: default\nlisten-client-urls: {client}\nadvertise-client-urls: {client}\n"
                        f"listen-peer-urls: {peer}\ninitial-advertise-peer-urls: {peer}\n"
                        f"initial-cluster: default={peer}\n", encoding="utf-8")
        return path

    def _wait_until_it_answers(self):
        from pymilvus import MilvusException

        end = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, f"the server has ended; its logs are in {self.folder}/logs"
            assert time.monotonic() < end, f"the server does not answer; its logs are in {self.folder}/logs"
            time.sleep(0.5)
            self._read_port()
            try:
                client = self.connect()
                client.list_collections(timeout=5)
                client.close()
                return
            except MilvusException:
                pass

    def connect(self):
        """Return a client of pymilvus."""
        from pymilvus import MilvusClient

        token = os.environ.get("MILVUS_TOKEN", "")
        return MilvusClient(uri=self.uri, token=token, timeout=5, grpc_options={"grpc.enable_http_proxy": 0})

    def _read_port(self):
        """Read which port it has: the next free one where the wanted one is taken."""
        configuration = self.folder / "configs" / "milvus.yaml"
        if configuration.is_file():
            of_proxy = configuration.read_text(encoding="utf-8").partition("\nproxy:\n")[2]
            found = re.search(r"^  port: (\d+)", of_proxy, re.MULTILINE)
            if found:  # it has been written to its end
                self._port = int(found[1])

    def signal(self, number):
        """Send a signal to its processes."""
        os.killpg(self._process.pid, number)

    def memory_mb(self):
        """Return the memory that its processes take, resident."""
        kilobytes = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == self._process.pid:
                    kilobytes += int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
            except (OSError, TypeError):  # it has ended
                pass
        return kilobytes / 1024

    def kill(self):
        """End it at once, as a machine does that fails."""
        self.signal(signal.SIGKILL)
        self._process.wait(60)

    def stop(self):
        """End it, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
