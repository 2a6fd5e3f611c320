"""deploy/python on a server: an exported folder and these files, without paddlenlp and without the project."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import simcse.encoder.paddle_engine
from deploy.python import encoder, predictor
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import paddle
import pytest
from conftest import FP32, ROOT, read_texts, refuse, run_script, succeed
from training import embed

# Imports of what a server does not have fail.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
PROJECT = {"simcse", "model", "data", "ann_util", "deploy", "paddlenlp", "hnswlib", "jieba", "visualdl"}
TEXTS = ["语义检索", "", "a [SEP] b[CLS]", "😀 ①ⅷ", "Ünïcödé ÄÖ\u00ad", "長" * 600, "x" * 300,
         "𠮷野 \u2b820 \x1f\u200b.", "2型  糖尿病。"]


def load_script(name, monkeypatch):
    """A script of a folder whose modules it imports by their bare names, as a module."""
    monkeypatch.syspath_prepend(ROOT / os.path.dirname(name))
    spec = importlib.util.spec_from_file_location("deployed_predict", ROOT / name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def server(tmp_path):
    """A folder with the files of deploy/python alone, and what runs predict.py there."""
    for path in ROOT.glob("deploy/python/*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "site").mkdir()

    def predict(blocked, *args):
        (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked), encoding="utf-8")
        return subprocess.run([sys.executable, tmp_path / "predict.py", "--device", "cpu", *map(str, args)],
                              cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
                              env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})

    return predict


@pytest.mark.parametrize("kind", ["paddle", "onnx"])
def test_a_copied_folder_gives_the_same_vectors(kind, server, exported, checkpoint, sample, tmp_path):
    folder = exported
    if kind == "onnx":
        if paddle.__version__.startswith("2."):
            pytest.skip("paddle 2 exports no ONNX")
        pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed", exc_type=ImportError)
        folder = tmp_path / "output"
        succeed("export_model.py", "--params_path", checkpoint, "--output_path", folder, "--format", "onnx")
    blocked = PROJECT | ({"paddle"} if kind == "onnx" else {"onnxruntime"})
    result = server(blocked, "--model_dir", folder, "--input_file", sample / "corpus.csv", "--output_file", "v.npy",
                    *FP32)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["predict.py:", "120", "wrote"]  # all are cut
    expected = embed(checkpoint, read_texts(sample / "corpus.csv"))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


@pytest.mark.default_stack
def test_in_an_environment_of_its_requirements_alone(request, exported, checkpoint, sample, tmp_path):
    if not request.config.getoption("--slow"):
        pytest.skip("only with --slow: makes an environment and installs deploy/python/requirements.txt")
    shutil.copytree(ROOT / "deploy" / "python", tmp_path / "python")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", tmp_path / "python" / "requirements.txt"], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(["sh", "python/deploy.sh", "--input_file", sample / "corpus.csv", "--output_file", "v.npy", *FP32],
                   cwd=tmp_path, check=True, env={**environment, "PYTHON": str(python), "DEVICE": "cpu",
                                                  "OUTPUT_DIR": str(exported)})
    expected = embed(checkpoint, read_texts(sample / "corpus.csv"))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


@pytest.mark.default_stack
def test_what_is_missing_is_one_line(server, exported, tmp_path):
    for name in ("numpy", "paddle"):
        result = server(PROJECT | {name}, "--model_dir", exported)
        assert result.returncode == 2 and f"{name} is not installed for" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr and not result.stdout
    for name in os.listdir(exported):
        if name != "tokenizer.json":
            (tmp_path / name).symlink_to(exported / name)
    result = server(PROJECT, "--model_dir", ".")
    assert result.returncode == 2 and "--model_dir .: no tokenizer.json; export the" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name, message", [
    ("tokenizer.json", "tokenizer.json: not a tokenizer: "), ("inference.json", "inference.json cannot be run: "),
    ("inference.pdiparams", "{graph} cannot be run: ")])
def test_what_is_damaged_is_one_line(exported, tmp_path, name, message):
    if not (exported / name).exists():
        pytest.skip("the graph is of paddle 2, which crashes on a damaged one")
    for each in os.listdir(exported):
        (tmp_path / each).symlink_to(exported / each)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"{nope")
    graph = "inference.pdmodel" if paddle.__version__.startswith("2.") else "inference.json"
    line = refuse("deploy/python/predict.py", "--device", "cpu", "--model_dir", tmp_path)
    assert message.format(graph=graph) in line


@pytest.mark.default_stack
@pytest.mark.parametrize("content, message", [
    (b"\x1f\x8b\x08\0\n", "texts:1: not UTF-8 at byte 2 of the line; convert it from its encoding: iconv -f"),
    ("甲\n".encode("gbk"), "texts:1: not UTF-8 at byte 1 of the line; convert it from its encoding: iconv -f"),
    ("甲\n".encode("utf-16"), "texts:1: not UTF-8 at byte 1 of the line; convert it from its"),
    (b"a\n\xff\xfa\x81\n", "texts:2: not UTF-8 at byte 1 of the line; convert it from its encoding: iconv -f"),
    (b"\n", "the file is empty"),
    (b'{"text": "a"}\n', "texts:1: looks like JSON or CSV; write one text a line"),
    (b'"a","b"\n', "texts:1: looks like JSON or CSV; write one text a line"),
    (b'[{"text": "a"}]\n', "texts:1: looks like JSON or CSV"),
    (b'id,text\n1,"a,b"\n', "texts:1: looks like JSON or CSV"),
    ("甲\na\tb\n\n".encode(), "2 of 3 lines are blank or malformed: texts:2 (columns: 2 instead of 1), "
                               "texts:3 (blank)"),
    (b"a\tb\nc\td\ne\n", "2 of 3 lines are blank or malformed")])
def test_files(server, exported, tmp_path, content, message):
    """Malformed lines have no result and are said; nothing of them is silently wrong."""
    (tmp_path / "texts").write_bytes(content)
    result = run_script(tmp_path / "predict.py", "--device", "cpu", "--model_dir", exported, "--input_file", "texts",
                        "--format", "tsv", cwd=tmp_path)
    assert message in result.stderr and "Traceback" not in result.stderr
    assert (result.returncode, result.stdout[:2]) == ((0, "甲\t") if b"\xe7" in content else (2, ""))


def test_what_was_whitened_at_a_length_is_told_of_longer_texts(exported, tmp_path):
    for each in os.listdir(exported):
        (tmp_path / each).symlink_to(exported / each)
    config = tmp_path / "simcse_config.json"
    record = json.loads(config.read_text(encoding="utf-8"))
    config.unlink()
    config.write_text(json.dumps({**record, "whitened_at": 16}), encoding="utf-8")
    result = succeed("deploy/python/predict.py", "--device", "cpu", "--model_dir", tmp_path, "--text", "语义", *FP32,
                     "--max_seq_length", 17)
    assert f"--max_seq_length 17: {tmp_path} was whitened at 16 tokens" in result.stderr


@pytest.mark.parametrize("length", [3, 16, 512])
def test_tokens_are_those_of_the_project(exported, sample, length):
    texts = TEXTS + read_texts(sample / "corpus.csv")
    ours, theirs = load_tokenizer(str(exported)), encoder.Tokenizer(str(exported))
    assert theirs(texts, length) == ours(texts, length) and theirs.pad_token_id == ours.pad_token_id


@pytest.mark.default_stack
@pytest.mark.parametrize("config, message", [
    ('{"pad_token": "<pad>"}', "tokenizer.json: has no token <pad>; name its pad_token in tokenizer_config.json"),
    ('{"unk_token": {"content": "<unk>"}}', "tokenizer.json: has no token <unk>; name its unk_token in tokenizer_c"),
    ('{"unk_token": 5}', "tokenizer_config.json: unk_token: expected a string, got 5"),
    ('{"unk_token": {}}', None), ("{}", None), ("", "tokenizer_config.json: damaged: "),
    ("[]", "tokenizer_config.json: damaged: "), ('{"pad_token": {"x": 1}}', "tokenizer_config.json: damaged: ")])
def test_special_tokens_are_those_of_tokenizer_config_json(exported, tmp_path, config, message):
    (tmp_path / "tokenizer.json").symlink_to(exported / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="utf-8")
    if message is None:
        assert encoder.Tokenizer(str(tmp_path)).pad_token_id == encoder.Tokenizer(str(exported)).pad_token_id
        return
    with pytest.raises(OSError, match=re.escape(message)):
        encoder.Tokenizer(str(tmp_path))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_windows_give_the_rows_of_the_whole(exported, sample, batch_size, monkeypatch):
    """A file of many texts is tokenized a window at a time, and every embedding is in its text's row."""
    texts = read_texts(sample / "corpus.csv")
    graph = predictor.load_predictor(str(exported), precision="fp32")
    tokenizer = encoder.Tokenizer(str(exported))
    whole = encoder.encode(graph, tokenizer, texts, 64, batch_size)
    monkeypatch.setattr(encoder, "WINDOW", 7)
    in_windows = encoder.encode(graph, tokenizer, texts, 64, batch_size)
    np.testing.assert_allclose(in_windows.embeddings, whole.embeddings, atol=1e-5)
    assert in_windows.truncated == whole.truncated and in_windows.unknown == whole.unknown
    assert encoder.encode(graph, tokenizer, [], 64).embeddings.shape == (0, graph.embedding_size)
    with pytest.raises(ValueError, match="max_seq_length 600: the encoder has 513 positions"):
        encoder.encode(graph, tokenizer, texts, 600)


def test_requirements_are_pinned_as_the_projects():
    def pins(name):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return {line for line in lines if line and not line.startswith("#")}

    assert pins("deploy/python/requirements.txt") < pins("requirements.txt")
    onnxruntime, = (pin for pin in pins("requirements-onnx.txt") if pin.startswith("onnxruntime"))
    assert onnxruntime in (ROOT / "deploy/python/requirements.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("config, expected", [
    ({"num_hidden_layers": 0}, False), ({"num_hidden_layers": 4}, True), ({}, True), (None, True), ("4", True)])
def test_a_network_without_layers_is_run_in_fp32(config, expected):
    """As the stages do, so that their vectors are the same."""
    assert predictor.has_layers({"encoder_config": config}) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_onednn_is_set_up_as_by_the_stages(exported, precision, monkeypatch):
    """simcse/encoder/paddle_engine.py and predictor.py make the same calls of paddle.inference.Config."""
    assert predictor.auto_precision("cpu") == simcse.machine.auto_precision("cpu")
    calls = []

    class Config:
        def __init__(self, *paths):
            calls.append([paths])

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            return lambda *args: calls[-1].append((name, *args))

    monkeypatch.setattr(paddle.inference, "Config", Config)
    monkeypatch.setattr(simcse.encoder.paddle_engine, "CPU_HAS_BF16", True)
    monkeypatch.setattr(predictor, "CPU_HAS_BF16", True)
    for make in (lambda: simcse.encoder.paddle_engine.PaddleEngine(str(exported), precision, 2),
                 lambda: predictor.load_predictor(str(exported), cpu_threads=2, precision=precision)):
        with pytest.raises(TypeError):  # there is no predictor of such a config
            make()
    assert calls[0][0] == calls[1][0] and set(calls[0]) == set(calls[1]) and len(calls[0]) > 5, calls


@pytest.mark.parametrize("graph, precision, built_with, message", [
    ("out/inference.json", "fp32", (8, 5, 3), "out/inference.json was exported by paddle 3, which runs only the"),
    ("out/inference.pdmodel", "bf16", (8, 5, 3), "--precision bf16 does not run on TensorRT; use fp32 or fp16"),
    ("out/inference.pdmodel", "fp16", (0, 0, 0), "this paddlepaddle is built without TensorRT")])
def test_tensorrt_is_refused_where_it_cannot_work(graph, precision, built_with, message):
    predictor.check_tensorrt("out/inference.pdmodel", "fp16", (8, 5, 3))
    with pytest.raises(predictor.InputError, match=f"^--use_tensorrt: {re.escape(message)}"):
        predictor.check_tensorrt(graph, precision, built_with)


def test_tensorrt_is_refused_before_the_device_is_looked_at(exported):
    line = refuse("deploy/python/predict.py", "--model_dir", exported, "--use_tensorrt", "True")
    if not paddle.__version__.startswith("2."):
        assert "was exported by paddle 3" in line
    elif not any(paddle.inference.get_trt_compile_version()):
        assert "built without TensorRT" in line
    line = refuse("deploy/python/predict.py", "--model_dir", exported, "--use_tensorrt", "True", "--precision", "int8")
    assert "--precision int8: --model_dir" in line and "was exported in fp32" in line


@pytest.mark.parametrize("batch_size", [None, 100])
def test_batches_of_tensorrt_are_no_larger_than_it_was_built_for(exported, monkeypatch, batch_size):
    """The engine is made for so many texts of so many tokens at most, and cannot run more."""
    shapes = []

    def embed(input_ids, token_type_ids):
        shapes.append(input_ids.shape)
        return np.ones([len(input_ids), 128], "float32")

    monkeypatch.setattr(predictor.PaddlePredictor, "open", lambda *args: None)
    monkeypatch.setattr(predictor.PaddlePredictor, "embed", staticmethod(embed))
    graph = predictor.load_predictor(str(exported), device="gpu", precision="fp16",
                                     tensorrt=predictor.TensorRtShape(32, 60))
    texts = ["语义" * (1 + number % 40) for number in range(200)]
    encoder.encode(graph, encoder.Tokenizer(str(exported)), texts, 60, batch_size)
    assert sum(texts for texts, _ in shapes) == 200
    assert max(texts for texts, _ in shapes) == 32 and max(tokens for _, tokens in shapes) <= 60


@pytest.mark.parametrize("error, line", [
    (MemoryError("(ResourceExhausted)\n\nOut of memory error on GPU 0.\n\nPlease check"), "out of memory: Out of "
     "memory error on GPU 0.; a lower --batch_size or --max_seq_length takes less"),
    (OSError("\n---\nC++ Traceback\n---\n0 x()\n\n---\nError Message Summary:\n---\nExternalError: CUDA error(209), no "
             "kernel image is available\n [Hint"), "ExternalError: CUDA error(209), no kernel image is available")])
def test_trouble_on_a_gpu_is_one_line(monkeypatch, capsys, error, line):
    def stop(args):
        raise error

    script = load_script("deploy/python/predict.py", monkeypatch)
    monkeypatch.setattr(script, "predict", stop)
    monkeypatch.setattr(script, "parse_args", lambda: None)
    assert script.main() == 2 and capsys.readouterr().err == f"predict.py: error: {line}\n"
    monkeypatch.setattr(script, "predict", lambda args: [].remove(1))
    with pytest.raises(ValueError, match="x not in list"):
        script.main()


def test_a_library_that_paddle_misses_when_it_runs_is_one_line(exported, monkeypatch):
    def run():
        raise RuntimeError("(PreconditionNotMet) The third-party dynamic library (libcudnn.so) that\n x")

    graph = predictor.load_predictor(str(exported), precision="fp32")
    monkeypatch.setattr(graph, "_predictor", SimpleNamespace(run=run))
    ids = np.ones([1, 3], "int64")
    message = r"inference\.\w+ cannot be run: The third-party dynamic library \(libcudnn.so\) that$"
    with pytest.raises(predictor.InputError, match=message):
        graph.embed(ids, np.zeros_like(ids))


@pytest.mark.parametrize("flags, message", [
    (["--precision", "bf16", "--enable_mkldnn", "no"], "--precision bf16 with --device cpu needs oneDNN"),
    (["--precision", "int8"], "was exported in fp32; export_model.py --format openvino --precision int8 exports in"),
    (["--precision", "fp16"], "which runs in fp32 or bf16 with --device cpu"),
    (["--text", os.fsdecode(b"a\xff"), *FP32], "argument --text: not UTF-8: 'a\\udcff'"),
    (["--text", " "], "argument --text: an empty text")])
def test_what_the_folder_cannot_do_is_one_line(exported, flags, message):
    assert message in refuse("deploy/python/predict.py", "--model_dir", exported, "--device", "cpu", *flags)


def test_a_folder_without_record_is_refused(exported, tmp_path):
    for each in os.listdir(exported):
        if each != "simcse_config.json":
            (tmp_path / each).symlink_to(exported / each)
    line = refuse("deploy/python/predict.py", "--model_dir", tmp_path, "--device", "cpu")
    assert "no record (simcse_config.json) of the graph; export the checkpoint again" in line


@pytest.mark.parametrize("record, message", [
    ({"embedding_size": "x", "max_positions": 512}, 'embedding_size: expected an integer >= 1, got "x"'),
    ({"embedding_size": 8, "max_positions": 512, "max_seq_length": -5}, "max_seq_length: expected an integer >= 1"),
    ({"embedding_size": 8}, "max_positions is missing; export the checkpoint again"),
    ([1], "not a JSON object")])
def test_an_odd_value_in_the_record_is_an_input_error(tmp_path, record, message):
    (tmp_path / "simcse_config.json").write_text(json.dumps(record))
    with pytest.raises(predictor.InputError, match=f"simcse_config.json: {message}"):
        predictor.read_record(str(tmp_path))


def test_deployed_at_the_recorded_length(exported, tmp_path):
    (tmp_path / "long.txt").write_text("长" * 99 + "\n", encoding="utf-8")
    words = ["deploy/python/predict.py", "--device", "cpu", "--model_dir", exported, "--input_file", "long.txt"]
    result = succeed(*words, "--format", "jsonl", cwd=tmp_path)
    assert "1 of 1 text is longer than 32 tokens and cut" in result.stderr
    other = succeed(*words, "--format", "jsonl", "--max_seq_length", 64, cwd=tmp_path)
    assert f"--max_seq_length 64: {exported} was trained with 32" in other.stderr and other.stdout != result.stdout
