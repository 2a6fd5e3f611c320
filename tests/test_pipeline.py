"""Every stage after training by its command line, on a small part of the sample data."""

import json
import os
import re

import model as m
from simcse import machine
from simcse.encoder.encoder import Encoder
from simcse.encoder.engine import make_engine
from simcse.flags import README_TEXT
from simcse.text.textfile import read_text_pairs

import numpy as np
import pytest
from conftest import ENCODER, FP32, read_texts, refuse, succeed
from training import embed


def embed_as_stages_do(checkpoint, texts, max_seq_length):
    """By the engine that stages use where nothing is said of precision."""
    network, tokenizer, _ = m.load_model(str(checkpoint / "model_state.pdparams"))
    return Encoder(make_engine(network), tokenizer, max_seq_length).encode(texts)


def test_predict_prints_cosines_alone(checkpoint, sample):
    result = succeed("predict.py", "--device", "cpu", "--params_path", checkpoint, "--text_pair_file",
                     sample / "test.csv", "--margin", 0.1, "--scale", 5, "--batch_size", 16, *FP32)
    pairs = read_text_pairs(str(sample / "test.csv"), "--flag")
    first, second = (embed(checkpoint, list(side)) for side in zip(*pairs))
    np.testing.assert_allclose([float(line) for line in result.stdout.splitlines()], (first * second).sum(axis=1),
                               atol=1e-5)
    loss = float(re.search(r"batches of 16: (\S+) \(margin 0.1, scale 5\)", result.stderr)[1])
    assert loss == pytest.approx(m.mean_loss(first, second, 16, 0.1, 5), abs=1e-4)


def test_no_cosine_is_past_1(exported, checkpoint, sample, tmp_path):
    """Of every text with itself, where rounding gives 1.0000001 now and then; predict.py, deployed, and recall.py."""
    texts = read_texts(sample / "corpus.csv")
    (tmp_path / "pairs").write_text("".join(f"{text}\t{text}\n" for text in texts), encoding="utf-8")
    pairs = ["--device", "cpu", "--text_pair_file", tmp_path / "pairs"]
    model = ["--params_path", checkpoint]
    succeed("recall.py", "--device", "cpu", *model, "--corpus_file", sample / "corpus.csv", "--similar_text_pair",
            tmp_path / "pairs", "--top_k", 1, "--ann_engine", "exact", "--recall_result_dir", tmp_path)
    for lines in (succeed("predict.py", *pairs, *model).stdout, (tmp_path / "recall_result.txt").read_text("utf-8"),
                  succeed("deploy/python/predict.py", *pairs, "--model_dir", exported).stdout):
        cosines = [float(line.split("\t")[-1]) for line in lines.splitlines()]
        assert len(cosines) == len(texts) and 0.999 < min(cosines) <= max(cosines) == 1


def test_inference_prints_shape_and_vectors(checkpoint):
    result = succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, *FP32)
    shape, vectors = result.stdout.split("\n", 1)
    assert shape == "[1, 128]" and vectors.startswith("[[")
    np.testing.assert_allclose(np.array(vectors.replace("[", "").replace("]", "").split(), float)[:3],
                               embed(checkpoint, [README_TEXT])[0, :3], atol=1e-6)


def test_inference_of_texts_and_files(checkpoint, sample, tmp_path):
    succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, "--text", "一", "--text", "二 三",
            "--input_file", sample / "corpus.csv", "--output_file", tmp_path / "v.npy", *FP32)
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.dtype == np.float32
    texts = ["一", "二 三", *read_texts(sample / "corpus.csv")]
    np.testing.assert_allclose(vectors, embed(checkpoint, texts), atol=1e-5)


def test_exported_folder(exported, checkpoint):
    names = set(os.listdir(exported))
    graph = "inference.pdmodel" if m.paddle.__version__.startswith("2.") else "inference.json"
    assert {graph, "inference.pdiparams", "simcse_config.json", "tokenizer_config.json", "vocab.txt"} <= names


@pytest.mark.parametrize("flags", [["--cpu_threads", 1], ["--enable_mkldnn", "False"],
                                   ["--batch_size", 7]])
def test_deployed_equals_dynamic(exported, checkpoint, sample, tmp_path, flags):
    succeed("deploy/python/predict.py", "--model_dir", exported, "--device", "cpu", "--input_file",
            sample / "corpus.csv", "--output_file", tmp_path / "v.npy", *FP32, *flags)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"),
                               embed(checkpoint, read_texts(sample / "corpus.csv")), atol=1e-5)


def test_deploy_prints_the_readmes_texts_and_benchmarks(exported, checkpoint, tmp_path):
    result = succeed("deploy/python/predict.py", f"--model_dir={exported}", "--device", "cpu", "--benchmark", "true",
                     "--save_log_path", tmp_path / "bench", *FP32, cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert lines[0] == "(1, 128)" and lines[1].startswith("[[")
    scores = json.loads(lines[-1])
    a, b, c = embed(checkpoint, ["中西方语言与文化的差异", "中西方文化差异以及语言体现中西方文化,差异,语言体现",
                                 "飞桨致力于让深度学习技术的创新与应用更简单"])
    np.testing.assert_allclose(scores, [a @ b, a @ c], atol=1e-5)
    (log,) = (tmp_path / "bench").iterdir()
    rows = json.loads(log.read_text())["results"]
    assert [row["batch_size"] for row in rows] == [1, 32]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in rows)


def test_deploy_scores_a_pair_file(exported, checkpoint, sample):
    result = succeed("deploy/python/predict.py", "--model_dir", exported, "--device", "cpu", "--text_pair_file",
                     sample / "test.csv", *FP32)
    same = succeed("predict.py", "--device", "cpu", "--params_path", checkpoint, "--text_pair_file",
                   sample / "test.csv", *FP32)
    np.testing.assert_allclose(*[[float(line) for line in each.stdout.splitlines()] for each in (result, same)],
                               atol=1e-5)


@pytest.mark.parametrize("script, flags, message", [
    ("recall.py", ["--output_emb_size", 64], "--output_emb_size 64: .* has 128"),
    ("recall.py", ["--hnsw_max_elements", 5], "--hnsw_max_elements 5: the corpus takes 119 vectors"),
    ("recall.py", ["--max_seq_length", 600], "--max_seq_length 600: the encoder has 513 positions")])
def test_what_is_found_out_late_is_still_one_line(checkpoint, sample, tmp_path, script, flags, message):
    line = refuse(script, "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
                  "--similar_text_pair", sample / "dev.csv", *flags, cwd=tmp_path)
    assert re.search(message, line), line


@pytest.mark.parametrize("script, flags", [
    ("train.py", ["--model_name_or_path", ENCODER, "--train_set_file", "train_unsupervised.csv"]),
    ("scripts/pretrain.py", ["--model_name_or_path", ENCODER, "--train_set_file", "train_unsupervised.csv"]),
    ("recall.py", ["--params_path", "CHECKPOINT", "--corpus_file", "corpus.csv", "--query", "语义"]),
    ("predict.py", ["--params_path", "CHECKPOINT", "--text_pair_file", "test.csv"]),
    ("inference.py", ["--params_path", "CHECKPOINT"]), ("deploy/python/predict.py", ["--model_dir", "EXPORTED"])])
def test_no_gpu_is_one_line(checkpoint, exported, sample, tmp_path, script, flags):
    """Of every stage, by the CPU build and by the GPU build on a machine without a GPU; nothing is written."""
    if m.paddle.device.is_compiled_with_cuda() and m.paddle.device.cuda.device_count():
        pytest.skip("there is a GPU")
    files = {"CHECKPOINT": checkpoint, "EXPORTED": exported, **{path.name: path for path in sample.iterdir()}}
    line = refuse(script, *[files.get(flag, flag) for flag in flags], cwd=tmp_path)
    assert line.startswith(f"{script.split('/')[-1]}: error: --device gpu: no GPU") and "--device cpu" in line
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_close_and_refused_where_there_is_none(checkpoint, sample, tmp_path):
    flags = ["--device", "cpu", "--params_path", checkpoint, "--input_file", sample / "corpus.csv", "--output_file",
             tmp_path / "v.npy", "--precision", "bf16"]
    if not machine.CPU_HAS_BF16:
        assert "--precision bf16: this processor" in refuse("inference.py", *flags)
        return
    succeed("inference.py", *flags)
    vectors = embed(checkpoint, read_texts(sample / "corpus.csv"))
    cosines = (np.load(tmp_path / "v.npy") * vectors).sum(axis=1)
    assert cosines.min() > 0.999 and (cosines < 1 - 1e-6).any(), "close, and not float32 under another name"
