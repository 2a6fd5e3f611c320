"""The log of a training run: read back, and shown by VisualDL's own server in a real browser."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

from data import Batch, Inputs
from model import LossSettings, SimCSE
from simcse.encoder.pretrained import load_pretrained
from simcse.training.log import BINS, alignment, uniformity

import numpy as np
import pytest
from conftest import ENCODER, ROOT, free_port, succeed, wait_for_answer

RUN = ["--device", "cpu", "--model_name_or_path", ENCODER, "--max_seq_length", 32, "--batch_size", 16,
       "--output_emb_size", 64, "--infer_with_fc_pooler"]


@pytest.fixture(scope="module")
def run(sample, tmp_path_factory):
    """A run of 16 steps that logs all there is; its folder."""
    folder = tmp_path_factory.mktemp("run")
    succeed("train.py", *RUN, "--train_set_file", sample / "train_unsupervised.csv", "--test_set_file",
            sample / "dev.csv", "--epochs", 2, "--eval_steps", 8, "--visualdl_embeddings", 20, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def log(run):
    from visualdl import LogReader

    (path,) = (run / "log").iterdir()
    return LogReader(file_path=str(path))


def values(log, kind, tag):
    return {record.id: record for record in log.get_data(kind, tag)}


def test_scalars(log):
    assert {"train/loss", "train/learning_rate", "train/speed", "train/alignment", "train/uniformity",
            *(f"eval/recall@{k}" for k in (1, 5, 10, 20, 50))} == set(log.get_tags()["scalar"])
    assert list(values(log, "scalar", "train/loss")) == [10, 16]
    assert list(values(log, "scalar", "eval/recall@1")) == [8, 16]


def test_histograms_are_those_of_the_cosines(log):
    counts = {}
    for name in ("positive", "negative"):
        record = values(log, "histogram", f"train/{name}_cosines")[10].histogram
        counts[name] = np.array(record.hist)
        assert np.allclose(record.bin_edges, BINS)
    assert counts["positive"].sum() == 16 and counts["negative"].sum() <= 16 * 15, "some texts are in the batch twice"
    # Half a bin is the most that a mean over bins can be wrong by.
    means = {name: counts[name] @ (BINS[1:] + BINS[:-1]) / 2 / counts[name].sum() for name in counts}
    alignment_of_log = values(log, "scalar", "train/alignment")[10].value
    assert alignment_of_log == pytest.approx(2 - 2 * means["positive"], abs=0.04)
    assert means["positive"] > means["negative"]


def test_alignment_and_uniformity_by_their_definition():
    rng = np.random.default_rng(0)
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in rng.normal(size=(2, 50, 8)))
    distances = [np.sum((a - b) ** 2) for a, b in zip(x, y)]
    assert alignment((x * y).sum(axis=1)) == pytest.approx(np.mean(distances))
    potentials = [np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i in range(50) for j in range(50) if i != j]
    assert uniformity((x @ x.T)[~np.eye(50, dtype=bool)]) == pytest.approx(np.log(np.mean(potentials)))


def test_what_was_compared_is_what_the_loss_is_of():
    import paddle

    model = SimCSE(load_pretrained(str(ENCODER)), output_emb_size=16, loss_settings=LossSettings(margin=0.1))
    ids = Inputs(np.arange(5, 25).reshape(4, 5))
    loss, (query, title, _), keys = model.loss(model(Batch(ids, ids)))
    logits = 20 * (query @ title.T - 0.1 * paddle.eye(4)).numpy()
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))
    assert keys is None and query.stop_gradient and float(loss) == pytest.approx(expected, abs=1e-5)


def test_one_text_alone_has_no_negatives(tmp_path):
    from visualdl import LogReader

    (tmp_path / "texts.csv").write_text("".join(f"第{row}条文本\n" for row in range(10)), encoding="utf-8")
    succeed("train.py", *RUN, "--batch_size", 1, "--train_set_file", "texts.csv", cwd=tmp_path)

    (path,) = (tmp_path / "log").iterdir()
    tags = LogReader(file_path=str(path)).get_tags()
    assert "train/alignment" in tags["scalar"] and "train/uniformity" not in tags["scalar"]
    assert tags["histogram"] == ["train/positive_cosines"]


@pytest.fixture(scope="module")
def server(run):
    """VisualDL's server on the log, as its users start it; its address."""
    port = free_port()
    env = {**os.environ, "PYTHON": sys.executable, "VISUALDL_DIR": str(run / "log"), "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(["sh", ROOT / "scripts" / "visualdl.sh", "--port", str(port)], env=env, cwd=run,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_answer(f"http://127.0.0.1:{port}/app/api/runs")
    yield f"http://127.0.0.1:{port}/app"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ask(address):
    with urllib.request.urlopen(address, timeout=20) as answer:
        return json.load(answer)["data"]


def test_hyper_parameters_stand_with_the_final_measures(server, log):
    (row,) = ask(f"{server}/api/hparams/list")
    assert {"batch_size": 16, "learning_rate": 5e-5, "dropout": 0.1, "infer_with_fc_pooler": "True",
            "output_emb_size": 64}.items() <= row["hparams"].items()
    assert "save_dir" not in row["hparams"] and "train_set_file" not in row["hparams"]
    last = values(log, "scalar", "eval/recall@10")[16].value
    assert row["metrics"]["eval/recall@10"] == pytest.approx(last) and "train/loss" in row["metrics"]


def test_embeddings_have_their_texts(server, sample):
    (one,) = ask(f"{server}/api/embedding/list")
    texts = set((sample / "train_unsupervised.csv").read_text(encoding="utf-8").splitlines())
    with urllib.request.urlopen(f"{server}/api/embedding/metadata?name={one['name'].replace('%', '%25')}") as answer:
        shown = answer.read().decode("utf-8").splitlines()
    assert one["shape"] == [len(shown), 64] and 15 <= len(shown) <= 20 and set(shown) <= texts


@pytest.mark.parametrize("language", ["fr", "de-DE,de;q=0.9", "zh-CN", "en", "*", None])
def test_the_page_opens_whatever_the_browsers_language_is(server, language):
    asked = urllib.request.Request(f"{server}/scalar", headers={"Accept-Language": language} if language else {})
    with urllib.request.urlopen(asked, timeout=20) as answer:
        assert answer.status == 200 and b"VisualDL" in answer.read() and "vdl_lng=en" in answer.headers["Set-Cookie"]


def test_a_log_that_is_not_there(tmp_path):
    ran = subprocess.run(["sh", ROOT / "scripts" / "visualdl.sh"], capture_output=True, text=True,
                         env={**os.environ, "VISUALDL_DIR": str(tmp_path / "log")})
    assert ran.returncode == 2 and ran.stderr.startswith(f"visualdl.sh: {tmp_path}/log: no such folder"), ran.stderr


# Charts are canvases, titles and all; a canvas that is drawn on differs from an empty one.
DRAWN = """return [...document.querySelectorAll('canvas')].filter(canvas => {
    const empty = document.createElement('canvas');
    [empty.width, empty.height] = [canvas.width, canvas.height];
    return canvas.toDataURL() != empty.toDataURL();
}).length"""


@pytest.mark.parametrize("page, says, charts", [
    ("scalar", ["eval\n5", "train\n5"], 10),
    ("histogram", ["train\n2"], 2),
    ("hyper-parameter", ["learning_rate", "0.00005", "train/loss", "eval/recall@1", "eval/recall@50"], 0),
    pytest.param("high-dimensional", ["log/texts", "Points: [12]\\d", "Component #1: [1-9]"], 0,  # no picture of WebGL
                 marks=pytest.mark.slow)])
def test_the_browser_shows_the_log(server, browser, page, says, charts):
    from selenium.webdriver.support.ui import WebDriverWait

    def shows(driver):
        text = driver.execute_script("return document.body.innerText")
        return all(re.search(f"^{each}", text, re.M) for each in says)

    browser.get(f"{server}/{page}")
    WebDriverWait(browser, 240).until(shows)
    if page == "scalar":  # the second group is closed at first
        browser.find_element("xpath", "//*[text()='train']").click()
    WebDriverWait(browser, 240).until(lambda driver: driver.execute_script(DRAWN) >= charts)
