"""The ONNX graph: what paddle2onnx writes and onnxruntime runs is what Paddle computes."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import model as m
from deploy.python.predictor import load_predictor
from simcse.console import InputError
from simcse.encoder import weights
from simcse.encoder.onnx import export_onnx

import numpy as np
import pytest
from conftest import FP32, ROOT, read_texts, refuse, run_script, succeed

for package in ("onnxruntime", "paddle2onnx"):
    pytest.importorskip(package, reason=f"no {package}: pip install -r requirements-onnx.txt", exc_type=ImportError)
DEPLOY = ["deploy/python/predict.py", "--device", "cpu"]


@pytest.fixture(scope="module")
def onnx_export(checkpoint, tmp_path_factory):
    """The checkpoint exported as ONNX by the command line: folder and process."""
    folder = tmp_path_factory.mktemp("onnx") / "output"
    before = sorted(each.name for each in metadata.distributions())
    result = succeed("export_model.py", "--params_path", checkpoint, "--output_path", folder, "--format", "onnx")
    assert sorted(each.name for each in metadata.distributions()) == before, "nothing is installed on the way"
    return folder, result


def test_exported_folder(onnx_export):
    folder, result = onnx_export
    assert set(os.listdir(folder)) == {
        "inference.onnx", "simcse_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    assert result.stdout == ""
    assert float(result.stderr.split("largest difference to the checkpoint's embeddings ")[1]) <= 1e-5


def vectors(folder, texts, tmp_path, *flags):
    succeed(*DEPLOY, "--model_dir", folder, "--input_file", texts, "--output_file", tmp_path / "v.npy", *flags)
    return np.load(tmp_path / "v.npy")


@pytest.mark.parametrize("flags", [[], ["--batch_size", 1, "--max_seq_length", 9], ["--batch_size", 7],
                                   ["--cpu_threads", 1, "--max_seq_length", 300]])
def test_vectors_of_the_sample(onnx_export, exported, sample, tmp_path, flags):
    of_onnx = vectors(onnx_export[0], sample / "corpus.csv", tmp_path, *flags)
    assert of_onnx.shape == (120, 128) and of_onnx.std(axis=0).min() > 0
    np.testing.assert_allclose(np.linalg.norm(of_onnx, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(of_onnx, vectors(exported, sample / "corpus.csv", tmp_path, *flags, *FP32), atol=1e-5)


def test_vectors_of_real_text(onnx_export, exported, real_data, tmp_path):
    texts = read_texts(real_data / "csl" / "recall" / "corpus.csv")[:300]
    (tmp_path / "texts").write_text("\n".join(texts), encoding="utf-8")
    of_onnx = vectors(onnx_export[0], tmp_path / "texts", tmp_path)
    assert len(of_onnx) == 300
    np.testing.assert_allclose(of_onnx, vectors(exported, tmp_path / "texts", tmp_path, *FP32), atol=1e-5)


def test_cosines(onnx_export, exported, sample):
    found = [[float(line) for line in succeed(*DEPLOY, "--model_dir", folder, *FP32, "--text_pair_file",
                                              sample / "test.csv").stdout.splitlines()]
             for folder in (onnx_export[0], exported)]
    assert len(found[0]) == 40
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("with_fc", [True, False], ids=["fc", "no fc"])
@pytest.mark.parametrize("with_pooler", [True, False], ids=["pooler", "raw"])
def test_every_kind_of_embedding(checkpoint, tmp_path, with_pooler, with_fc):
    """Every shape, padding among it, against the dynamic graph."""
    network, tokenizer, record = m.load_model(str(checkpoint / "model_state.pdparams"))
    if not with_fc:
        network = m.SimCSE(network.ptm)
    network.with_pooler = with_pooler
    export_onnx(network, str(tmp_path))
    weights.write_record(str(tmp_path), {**record, "embedding_size": network.embedding_size}, tokenizer)
    engine = load_predictor(str(tmp_path))
    assert engine.embedding_size == network.embedding_size == (128 if with_fc else 256)
    assert engine.max_positions == network.max_positions and engine.precision == "fp32"
    random = np.random.default_rng(0)
    for shape in ((1, 1), (1, 513), (9, 3), (2, 64), (33, 17)):
        ids = random.integers(1, 2000, shape)
        ids[0, 1 + shape[1] // 2 :] = tokenizer.pad_token_id
        expected = np.asarray(network.embed(ids, np.zeros_like(ids)))
        np.testing.assert_allclose(engine.embed(ids, np.zeros_like(ids)), expected, atol=1e-5)
    network.with_pooler = not with_pooler
    assert abs(np.asarray(network.embed(ids, np.zeros_like(ids))) - expected).max() > 1e-3, "it would be seen"


@pytest.mark.parametrize("flags, flag", [
    (["--precision", "bf16"], "--precision bf16"), (["--enable_mkldnn", "True"], "--enable_mkldnn"),
    (["--device", "gpu"], "--device gpu"), (["--device", "gpu", "--precision", "fp16"], "--device gpu"),
    (["--device", "gpu", "--use_tensorrt", "True"], "--use_tensorrt")])
def test_flags_that_would_do_nothing(tmp_path, flags, flag):
    (tmp_path / "inference.onnx").write_bytes(b"")
    assert f"error: {flag}: --model_dir . holds inference.onnx" in refuse(*DEPLOY, "--model_dir", ".", *flags,
                                                                          cwd=tmp_path)


def test_a_damaged_graph_is_one_line(onnx_export, tmp_path):
    folder = tmp_path / "output"
    shutil.copytree(onnx_export[0], folder)
    with open(folder / "inference.onnx", "r+b") as file:
        file.truncate(1000)
    assert "inference.onnx cannot be run: " in refuse(*DEPLOY, "--model_dir", folder)


@pytest.mark.parametrize("package", ["paddle2onnx", "onnxruntime"])
def test_a_missing_package_is_one_line_and_nothing_is_written(checkpoint, tmp_path, package):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    result = run_script("export_model.py", "--params_path", checkpoint, "--format", "onnx", cwd=tmp_path,
                        env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{package} is not installed; pip install -r requirements-onnx.txt" in result.stderr.splitlines()[-1]
    assert [each for each in os.listdir(tmp_path) if "output" in each] == []


def test_an_operator_that_paddle2onnx_does_not_know_is_one_line(tmp_path):
    """It aborts the process that it runs in."""
    class Unknown(m.nn.Layer):
        embedding_size, max_positions, with_pooler = 4, 8, True
        ptm = SimpleNamespace(config=SimpleNamespace(hidden_size=4, vocab_size=9))

        def get_pooled_embedding(self, input_ids, token_type_ids, with_pooler=True):
            return m.paddle.linalg.qr((input_ids + token_type_ids).astype("float32"))[0]

    with pytest.raises(InputError, match="paddle2onnx cannot convert the network: .*unsupported operators.*$"):
        export_onnx(Unknown(), str(tmp_path))
    assert not os.listdir(tmp_path)


def test_paddle_2_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(m.paddle, "__version__", "2.6.2")
    with pytest.raises(InputError, match=r"paddle2onnx needs paddlepaddle 3 \(requirements.txt\); this is 2.6.2"):
        export_onnx(None, str(tmp_path))


def test_one_folder_holds_one_graph(onnx_export, exported, checkpoint, tmp_path):
    for folder, kind, name in ((onnx_export[0], "paddle", "inference.onnx"), (exported, "onnx", "inference.")):
        line = refuse("export_model.py", "--params_path", checkpoint, "--output_path", folder, "--format", kind)
        assert f"--output_path {folder}: holds {name}" in line and f"not of --format {kind}" in line


def test_nothing_heavy_is_imported_before_flags_are_checked():
    code = ("import sys, deploy.python.predictor\n"
            "sys.exit(bool({'paddle', 'onnx', 'onnxruntime', 'paddle2onnx'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
