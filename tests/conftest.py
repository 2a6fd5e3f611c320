"""What the tests share: running a script as a user does, a small trained checkpoint, and the recorded figures."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from milvus_server import PROGRAM, MilvusServer, free_port

ROOT = Path(__file__).resolve().parent.parent
ENCODER = ROOT / "pretrained" / "ernie_mini_zh"
SHARED = Path(os.environ.get("SIMCSE_SHARED", ROOT.parent / "shared"))
FORKSERVER = Path(__file__).with_name("forkserver.py")
FP32 = ["--precision", "fp32"]  # where figures are compared with the dynamic graph's
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def read_texts(path, flag="--flag"):
    """The texts of a file, one a line, by the reader of rows."""
    from simcse.text.textfile import read_rows

    return [row.fields[0] for row in read_rows(str(path), 1, flag)]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="also what takes minutes: tests marked slow, all 50 recorded training steps, the whole "
                     "quickstart")


# The tests of a file go to one worker of xdist, and so do files that share what is costly: one browser, the launcher.
GROUPS = dict.fromkeys(("test_visualdl", "test_search_page", "test_search_page_errors"), "pages")
# What takes longest comes first, so that no worker is left with it at the end.
FIRST = ("test_milvus_server", "test_gpu_benchmark", "test_scripts", "test_distributed", "test_search_page",
         "test_search_page_errors", "test_visualdl", "test_resume", "test_serving")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes long and shows what others show nearly as well; --slow"))
        item.add_marker(pytest.mark.xdist_group(GROUPS.get(item.path.stem, item.path.stem)))


def pytest_configure(config):
    """Start the server that forks scripts, once for all of xdist's workers; it is ready when the first one is run."""
    config.addinivalue_line("markers", "slow: is run with --slow alone")
    config.addinivalue_line("markers", "default_stack: shows nothing that depends on paddle's version, and takes long")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by nohup, or & in a script; what is started inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "SIMCSE_FORKED_PYTHON" in os.environ:
        # A worker of xdist: a core for each, since threads of two programs that wait for one another cost a fifth.
        number, cores = int(os.environ["PYTEST_XDIST_WORKER"][2:]), sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
        return
    folder = Path(tempfile.mkdtemp())
    socket, python = folder / "socket", folder / "python"
    words = [sys.executable, "-I", "-S", str(FORKSERVER), "run", str(socket)]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    python.chmod(0o755)
    server = subprocess.Popen([sys.executable, FORKSERVER, "serve", socket], stdin=subprocess.PIPE)
    os.environ["SIMCSE_FORKED_PYTHON"] = str(python)
    config.add_cleanup(lambda: (server.stdin.close(), server.wait(), shutil.rmtree(folder),
                                os.environ.pop("SIMCSE_FORKED_PYTHON")))


def command(script, *args, bare=False):
    """The words of a command that runs a script of the project: as `bare` Python, or forked (see forkserver.py), which
    takes a tenth of a second instead of several."""
    python = sys.executable if bare else os.environ["SIMCSE_FORKED_PYTHON"]
    return [python, str(ROOT / script), *map(str, args)]


def run_script(script, *args, cwd=None, env=None, timeout=600, bare=False):
    """Run a script of the project with this Python; the caller looks at returncode, stdout and stderr."""
    return subprocess.run(command(script, *args, bare=bare), cwd=cwd, timeout=timeout, capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, **(env or {})})


def launch(script, *args, cwd, ranks=2, env=None, **options):
    """Run a script on CPU ranks, with paddle's launcher; the process, and the log of every rank."""
    flags = ["--nproc_per_node", ranks, "--backend", "gloo", "--log_dir", cwd / "ranks", ROOT / script, *args]
    result = run_script("tests/launch.py", *flags, cwd=cwd, env=env, **options)
    return result, [(cwd / "ranks" / f"workerlog.{rank}").read_text(encoding="utf-8") for rank in range(ranks)]


def succeed(script, *args, **options):
    result = run_script(script, *args, **options)
    assert result.returncode == 0, result.stderr
    return result


def succeed_on(ranks, *words, cwd):
    """Run a script on so many ranks; what the first of them says on stderr."""
    if ranks == 1:
        return succeed(*words, cwd=cwd).stderr
    result, logs = launch(*words, cwd=cwd, ranks=ranks)
    assert not result.returncode, logs
    return logs[0]


def contents(folder):
    """The files of a folder, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refuse(script, *args, **options):
    """Run a script that has to end with exit code 2 and one line on stderr; returns that line."""
    result = run_script(script, *args, **options)
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    assert not result.stdout
    return result.stderr.strip().splitlines()[-1]


def wait_for_answer(address, seconds=120, process=None):
    """Wait until a server answers with success, as long as its process lives; the answer."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return answer.read()
        except OSError:
            assert time.monotonic() < end, f"no answer from {address}"
            assert process is None or process.poll() is None, "the server has ended"
            time.sleep(0.2)


@pytest.fixture(autouse=True)
def usual_signals():
    """Every test has Python's own handlers of SIGINT and SIGTERM, which `console.run` changes; none passes its on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, driven by Selenium; ended with the module, since a page that is left open takes half a core.
    """
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("there is no chromium with chromedriver (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "window-size=1280,900", "lang=zh-CN",
                 f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


@pytest.fixture
def visit(browser):
    """Opens the page of a server in English, as if for the first time; whatever a test does there, the browser asks
    no other address, and neither scripts nor the security policy have anything to say."""
    from page import Page, speak

    def start(address):
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address, "storageTypes": "all"})
        speak(browser, "en-US")
        visited.append(Page(browser, address))
        visited[-1].open()
        return visited[-1]

    visited = []
    yield start
    for page in visited:
        assert all(url.startswith((f"{page.address}/", "about:")) for url in page.requests())
    said = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("Failed to load resource" in entry["message"] for entry in said), said
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get("about:blank")


@pytest.fixture
def page(visit, service):
    return visit(service.address)


class Service:
    """A running search service: its address, its process, and the file that it writes stderr to."""

    def __init__(self, folder, *flags, env=None):
        self.address, self.log = f"http://127.0.0.1:{(port := free_port())}", folder / f"server_{port}.log"
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command("deploy/serving/server.py", "--device", "cpu", "--port", port, *flags, bare=True),
                stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **(env or {})})
        wait_for_answer(f"{self.address}/healthz", process=self.process)

    def ask(self, path, body=None, **headers):
        """Status, headers and content of an answer, JSON parsed; a body that is not bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        asked = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json", **headers})
        try:
            answer = urllib.request.urlopen(asked, timeout=120)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content = answer.read()
            is_json = answer.headers["Content-Type"] == "application/json"
            return answer.status, answer.headers, json.loads(content) if is_json else content.decode(errors="replace")

    def figures(self):
        """What /metrics tells, by name and labels."""
        lines = self.ask("/metrics")[2].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def kept_index(checkpoint, sample, tmp_path_factory):
    """The index of the sample's corpus, kept by recall.py in fp32."""
    folder = tmp_path_factory.mktemp("kept")
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--query", "语义", "--max_seq_length", 32, "--index_path", folder / "index", *FP32)
    return folder / "index"


@pytest.fixture(scope="session")
def service(exported, kept_index, tmp_path_factory):
    """The search service over the sample's corpus."""
    pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
    running = Service(tmp_path_factory.mktemp("service"), "--model_dir", exported, "--index_path", kept_index)
    yield running
    running.stop()


@pytest.fixture
def serve(exported, kept_index, tmp_path):
    """Starts further services, `serve(*flags, env=None)`, which end with the test."""
    pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
    started = []

    def start(*flags, env=None):
        started.append(Service(tmp_path, "--model_dir", exported, "--index_path", kept_index, *flags, env=env))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture(scope="module")
def milvus_server(tmp_path_factory):
    """A running Milvus server, whose token is in the environment; it ends with its tests, as an idle one takes a fifth
    of a core."""
    pytest.importorskip("pymilvus", reason="requirements-milvus.txt is not installed")
    if not PROGRAM.is_file():
        pytest.skip("milvus is not installed (requirements-test.txt)")
    folder = tmp_path_factory.mktemp("milvus_server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILVUS_TOKEN", "root:Milvus")
        server = MilvusServer(folder, "common.security.authorizationEnabled=true")
        try:
            yield server.start()
        finally:
            server.stop()
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def compat(tmp_path_factory):
    """The original's checkpoint and figures; links, since a graph is kept beside a checkpoint."""
    source, folder = SHARED / "compat" / "simcse_tiny", tmp_path_factory.mktemp("compat")
    if not source.is_dir():
        pytest.skip(f"the figures recorded from the original are not here ({source})")
    for each in source.iterdir():
        (folder / each.name).symlink_to(each)
    return folder


@pytest.fixture(scope="session")
def real_data():
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"the real text is not here ({folder})")
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A small part of the generated sample data, in the original's layout."""
    whole, small = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("sample") / "recall"
    succeed("scripts/make_sample_data.py", whole)
    small.mkdir()
    for name, lines in (("train_unsupervised.csv", 128), ("corpus.csv", 120), ("dev.csv", 60), ("test.csv", 40)):
        text = (whole / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (small / name).write_text("".join(text[:lines]), encoding="utf-8")
    return small


@pytest.fixture(scope="session")
def checkpoint(sample, tmp_path_factory):
    """What four steps of training left; model_2 beside it is of the same run."""
    folder = tmp_path_factory.mktemp("checkpoint")
    succeed("train.py", "--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file",
            sample / "train_unsupervised.csv", "--max_seq_length", 32, "--output_emb_size", 128,
            "--infer_with_fc_pooler", "--save_steps", 2, cwd=folder)
    return folder / "checkpoints" / "model_4"


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """The checkpoint exported by the command line."""
    folder = tmp_path_factory.mktemp("exported") / "output"
    succeed("export_model.py", "--params_path", checkpoint, "--output_path", folder)
    return folder
