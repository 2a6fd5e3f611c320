"""Every stage by its command line, one after another, on a small part of the sample data."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import ENCODER, FP32, ROOT, command, launch, refuse, succeed

import loading
import machine
import model as m
from ann_util import exact_search
from cli import README_TEXT
from data import read_text_pairs, read_texts
from deploy.python.predictor import make_engine
from metrics import first_hits, recall_at


def embed(checkpoint, texts, max_seq_length=64):
    """By the dynamic graph, in float32."""
    network, tokenizer, _ = loading.load_model(str(checkpoint / "model_state.pdparams"))
    return m.encode(network, tokenizer, texts, max_seq_length, 32)


def embed_as_stages_do(checkpoint, texts, max_seq_length):
    """By the engine that stages use where nothing is said of precision."""
    network, tokenizer, _ = loading.load_model(str(checkpoint / "model_state.pdparams"))
    return m.encode(make_engine(network), tokenizer, texts, max_seq_length)


# ------------------------------------------------------------------------------------------------------- training
def test_training_logs_evaluates_and_saves(trained):
    folder, result = trained
    line = r"global step 10, epoch: 3, batch: 2, loss: \d+\.\d{5}, speed: \d+\.\d\d step/s"
    assert re.search(line, result.stderr)
    evaluations = [line for line in result.stdout.splitlines() if line]
    assert [int(re.match(r"global step (\d+), recall@1=", line)[1]) for line in evaluations] == [2, 4, 6, 8, 10, 12]
    assert sorted(os.listdir(folder / "checkpoints")) == ["model_12", "model_3", "model_6", "model_9"]
    assert [name for name in os.listdir(folder / "log") if name.startswith("vdlrecords")]


def test_visualdl_log_holds_scalars(trained):
    from visualdl import LogReader

    (log,) = (trained[0] / "log").iterdir()
    reader = LogReader(file_path=str(log))
    tags = reader.get_tags()["scalar"]
    assert {"train/loss", "train/learning_rate", "train/speed", "eval/recall@1", "eval/recall@50"} <= set(tags)
    assert [record.id for record in reader.get_data("scalar", "eval/recall@50")] == [2, 4, 6, 8, 10, 12]


def test_the_last_evaluation_is_what_the_checkpoint_gives(trained, checkpoint, sample):
    pairs = read_text_pairs(str(sample / "dev.csv"), "--flag")
    queries, corpus = [list(dict.fromkeys(side)) for side in zip(*pairs)]
    rows, _ = exact_search(*[embed_as_stages_do(checkpoint, texts, 32) for texts in (queries, corpus)], 50)
    targets = [{corpus.index(target) for query, target in pairs if query == wanted} for wanted in queries]
    expected = recall_at(first_hits(rows, targets), (1, 5, 10, 20, 50))
    assert trained[1].stdout.splitlines()[-1] == "global step 12, " + ", ".join(
        f"recall@{k}={value}" for k, value in expected.items())


def test_record_beside_the_checkpoint(checkpoint):
    record = json.loads((checkpoint / "simcse_config.json").read_text(encoding="utf-8"))
    assert record["model_name_or_path"] == str(ENCODER) and record["encoder_config"]["hidden_size"] == 256
    assert {key: record[key] for key in ("output_emb_size", "with_pooler", "scale", "margin", "max_seq_length")} == {
        "output_emb_size": 128, "with_pooler": True, "scale": 20, "margin": 0.0, "max_seq_length": 32}
    assert set(record["versions"]) == {"paddlepaddle", "paddlenlp"}


def train_flags(sample, *more):
    return ["--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file", sample / "train_unsupervised.csv",
            "--max_seq_length", 16, "--batch_size", 8, *more]


def losses(result):
    return re.findall(r"loss: (\d+\.\d+)", result.stderr)


def test_the_same_seed_gives_the_same_run(sample, tmp_path):
    runs = [succeed("train.py", *train_flags(sample, "--seed", seed, "--save_dir", tmp_path / name))
            for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    assert len(losses(runs[0])) == 1 and losses(runs[0]) == losses(runs[1]) != losses(runs[2])
    weights = [m.paddle.load(str(tmp_path / name / "model_16" / "model_state.pdparams")) for name in "ab"]
    for name in weights[0]:
        np.testing.assert_array_equal(weights[0][name].numpy(), weights[1][name].numpy(), err_msg=name)


def test_spearman_on_three_columns_and_training_on(sample, checkpoint, tmp_path):
    """A labelled test set; --init_from_ckpt without --model_name_or_path; --epochs 0; the misspelt flag."""
    from scipy.stats import spearmanr

    pairs = read_text_pairs(str(sample / "test.csv"), "--flag")
    labels = [1 - row % 2 for row in range(len(pairs))]
    (tmp_path / "labeled.csv").write_text(
        "".join(f"{a}\t{b}\t{label}\n" for (a, b), label in zip(pairs, labels)), encoding="utf-8")
    result = succeed("train.py", "--device", "cpu", "--init_from_ckpt", checkpoint, "--epochs", 0, "--train_set_file",
                     sample / "train_unsupervised.csv", "--test_set_file", tmp_path / "labeled.csv",
                     "--max_seq_length", 32, "--infer_with_fc_pooler", "--warmup_proption", 0.1, cwd=tmp_path)
    first, second = (embed_as_stages_do(checkpoint, list(side), 32) for side in zip(*pairs))
    expected = 100 * spearmanr((first * second).sum(axis=1), labels)[0]
    assert float(re.search(r"global step 0, spearman=(\S+)", result.stdout)[1]) == pytest.approx(expected, abs=2e-3)
    assert expected > 10, "even the hardly trained network tells matching pairs"
    assert os.listdir(tmp_path / "checkpoints") == ["model_0"]


def test_without_infer_with_fc_pooler_later_stages_take_the_raw_first_token(sample, tmp_path):
    succeed("train.py", *train_flags(sample, "--epochs", 0, "--output_emb_size", 32, "--save_dir", tmp_path))
    network, tokenizer, _ = loading.load_model(str(tmp_path / "model_0" / "model_state.pdparams"))
    ids, types = map(m.paddle.to_tensor, m.np.split(np.array([tokenizer(["语义索引"], 16)[0], [0] * 6]), 2))
    raw = network.get_pooled_embedding(ids, types, with_pooler=False).numpy()
    np.testing.assert_allclose(embed(tmp_path / "model_0", ["语义索引"]), raw, atol=1e-6)


def test_ctrl_c_saves_and_ends_with_130(sample, tmp_path):
    process = subprocess.Popen(
        command("train.py", *train_flags(sample, "--epochs", 500, "--save_dir", tmp_path)), stderr=subprocess.PIPE,
        text=True)
    for line in process.stderr:
        if line.startswith("global step 10,"):
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130 and "Traceback" not in rest
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(r"model_\d+", folder.name)
    embed(folder, ["语义索引"])


def test_two_processes_train_one_model(sample, tmp_path):
    """paddle.distributed.launch with gloo: both ranks work, rank 0 alone logs, evaluates and saves."""
    result, logs = launch("train.py", *train_flags(
        sample, "--test_set_file", sample / "dev.csv", "--save_dir", tmp_path / "ck", "--batch_size", 4,
        "--visualdl_dir", tmp_path / "log"), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "global step 10," in logs[0] and "recall@1=" in logs[0]
    assert "global step" not in logs[1] and "saved" not in logs[1]
    assert os.listdir(tmp_path / "ck") == ["model_16"], "128 texts in batches of 4 on each of two ranks"


# --------------------------------------------------------------------------- recall, prediction, inference, export
@pytest.fixture(scope="module")
def recalled(checkpoint, sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recalled")
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--similar_text_pair_file", sample / "dev.csv", "--recall_num", 50, *FP32, cwd=folder)
    return folder


def test_recall_result_is_exact_search_here(recalled, checkpoint, sample):
    """120 documents, ef 100: the graph finds what the matrix product finds."""
    lines = (recalled / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    got = [line.split("\t") for line in lines]
    queries = [query for query, _ in read_text_pairs(str(sample / "dev.csv"), "--flag")]
    corpus = read_texts(str(sample / "corpus.csv"), "--flag")
    assert [line[0] for line in got] == [query for query in queries for _ in range(50)]
    rows, cosines = exact_search(embed(checkpoint, queries), embed(checkpoint, corpus), 50)
    np.testing.assert_allclose([float(line[2]) for line in got], cosines.ravel(), atol=1e-5)
    agree = np.mean([line[1] == corpus[row] for line, row in zip(got, rows.ravel())])
    assert agree > 0.98, "neighbours of equal score may change places"


def test_evaluate_after_recall(recalled, sample):
    result = succeed("evaluate.py", "--similar_text_pair", sample / "dev.csv", cwd=recalled)
    figures = {line.split("=")[0]: float(line.split("=")[1]) for line in result.stdout.splitlines()}
    pairs = read_text_pairs(str(sample / "dev.csv"), "--flag")
    lines = (recalled / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    documents = [line.split("\t")[1] for line in lines]
    assert len({query for query, _ in pairs}) == len(pairs)
    for k in (1, 5, 10, 20, 50):
        hits = [target in documents[50 * row : 50 * row + k] for row, (_, target) in enumerate(pairs)]
        assert figures.pop(f"recall@{k}") == pytest.approx(100 * np.mean(hits), abs=1e-3)
    assert not figures and np.mean(hits) > 0.5, "chance would be 50 of 120"


@pytest.mark.parametrize("flags, depth", [
    (["--recall_num", 500], 120), (["--recall_num", 60, "--hnsw_ef", 5, "--hnsw_m", 8], 60),
    (["--hnsw_max_elements", 1000], 10)])
def test_recall_num_beyond_corpus_and_ef(checkpoint, sample, tmp_path, flags, depth):
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint / "model_state.pdparams", "--corpus_file",
            sample / "corpus.csv", "--similar_text_pair", sample / "dev.csv", "--recall_result_dir", tmp_path / "new",
            "--recall_result_file", "r.txt", *flags)
    assert len((tmp_path / "new" / "r.txt").read_text(encoding="utf-8").splitlines()) == 60 * depth
    assert os.listdir(tmp_path / "new") == ["r.txt"]


def test_a_query_on_several_lines_and_a_corpus_of_one(checkpoint, tmp_path):
    (tmp_path / "dev.csv").write_text("问题\t甲\n问题\t乙\n", encoding="utf-8")
    (tmp_path / "corpus.csv").write_text("甲\n", encoding="utf-8")
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", "corpus.csv",
            "--similar_text_pair", "dev.csv", cwd=tmp_path)
    lines = (tmp_path / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["问题", "甲"]] * 2
    assert succeed("evaluate.py", "--similar_text_pair", "dev.csv", cwd=tmp_path).stdout.startswith("recall@1=100.0\n")


def test_predict_prints_cosines_alone(checkpoint, sample):
    result = succeed("predict.py", "--device", "cpu", "--params_path", checkpoint, "--text_pair_file",
                     sample / "test.csv", "--margin", 0.1, "--scale", 5, "--batch_size", 16, *FP32)
    pairs = read_text_pairs(str(sample / "test.csv"), "--flag")
    first, second = (embed(checkpoint, list(side)) for side in zip(*pairs))
    np.testing.assert_allclose([float(line) for line in result.stdout.splitlines()], (first * second).sum(axis=1),
                               atol=1e-5)
    loss = float(re.search(r"batches of 16: (\S+) \(margin 0.1, scale 5\)", result.stderr)[1])
    assert loss == pytest.approx(m.mean_loss(first, second, 16, 0.1, 5), abs=1e-4)


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
    texts = ["一", "二 三", *read_texts(str(sample / "corpus.csv"), "--flag")]
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
                               embed(checkpoint, read_texts(str(sample / "corpus.csv"), "--flag"), 128), atol=1e-5)


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
                     sample / "test.csv", "--max_seq_length", 64)
    same = succeed("predict.py", "--device", "cpu", "--params_path", checkpoint, "--text_pair_file",
                   sample / "test.csv")
    np.testing.assert_allclose(*[[float(line) for line in each.stdout.splitlines()] for each in (result, same)],
                               atol=1e-5)


@pytest.mark.parametrize("script, flags, message", [
    ("recall.py", ["--output_emb_size", 64], "--output_emb_size 64: .* has 128"),
    ("recall.py", ["--hnsw_max_elements", 5], "--hnsw_max_elements 5: the corpus has 120 documents"),
    ("recall.py", ["--max_seq_length", 600], "--max_seq_length 600: the encoder has 513 positions")])
def test_what_is_found_out_late_is_still_one_line(checkpoint, sample, tmp_path, script, flags, message):
    line = refuse(script, "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
                  "--similar_text_pair", sample / "dev.csv", *flags, cwd=tmp_path)
    assert re.search(message, line), line


def test_no_gpu_is_one_line(checkpoint):
    if m.paddle.device.is_compiled_with_cuda():
        pytest.skip("this paddle can use GPUs")
    line = refuse("inference.py", "--params_path", checkpoint)
    assert line.startswith("inference.py: error: --device gpu: no GPU") and "--device cpu" in line


def test_bfloat16_is_close_and_refused_where_there_is_none(checkpoint, sample, tmp_path):
    flags = ["--device", "cpu", "--params_path", checkpoint, "--input_file", sample / "corpus.csv", "--output_file",
             tmp_path / "v.npy", "--precision", "bf16"]
    if not machine.CPU_HAS_BF16:
        assert "--precision bf16: this processor" in refuse("inference.py", *flags)
        return
    succeed("inference.py", *flags)
    vectors = embed(checkpoint, read_texts(str(sample / "corpus.csv"), "--flag"))
    cosines = (np.load(tmp_path / "v.npy") * vectors).sum(axis=1)
    assert cosines.min() > 0.999 and (cosines < 1 - 1e-6).any(), "close, and not float32 under another name"


def test_an_index_is_kept_used_again_and_refused_for_anything_else(checkpoint, sample, tmp_path):
    def flags(*more):
        return ["--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
                "--similar_text_pair", sample / "dev.csv", "--index_path", tmp_path / "index", *more]

    first = succeed("recall.py", *flags("--recall_result_file", "first.txt"), cwd=tmp_path)
    assert "kept the index" in first.stderr and "encoding" in first.stderr
    assert re.search(r"ANN recall@10 against exact search, 60 queries: (1\.0|0\.9[89])", first.stderr)
    again = succeed("recall.py", *flags("--recall_result_file", "again.txt"), cwd=tmp_path)
    assert "using the index" in again.stderr and "encoding" not in again.stderr
    results = tmp_path / "recall_result_dir"
    assert (results / "first.txt").read_bytes() == (results / "again.txt").read_bytes()

    (tmp_path / "other.csv").write_text("另一个语料库\n" * 120, encoding="utf-8")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = m.paddle.load(str(other / "model_state.pdparams"))
    m.paddle.save({name: tensor * 1.01 for name, tensor in weights.items()}, str(other / "model_state.pdparams"))
    for more, what in ((["--corpus_file", tmp_path / "other.csv"], "corpus"), (["--params_path", other], "model"),
                       (["--max_seq_length", 9], "max_seq_length"), (["--hnsw_ef", 50], "hnsw_ef"),
                       (["--ann_engine", "exact"], "ann_engine")):
        assert f"was built with another {what};" in refuse("recall.py", *flags(*more), cwd=tmp_path)
    shard, kept_corpus = tmp_path / "index" / "shard_3.bin", tmp_path / "index" / "corpus.csv"
    whole = shard.read_bytes()
    for damaged in (b"", whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        shard.write_bytes(damaged)
        assert "damaged: shard_3.bin is not what was written" in refuse("recall.py", *flags(), cwd=tmp_path)
    shard.unlink()
    assert "damaged" in refuse("recall.py", *flags(), cwd=tmp_path)
    kept_corpus.write_bytes(kept_corpus.read_bytes()[:-1])
    line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--index_path", tmp_path / "index",
                  "--query", "x")
    assert "damaged: corpus.csv is not what was written" in line


def test_one_query_from_a_kept_index(checkpoint, sample, tmp_path):
    """Without the corpus, and with other settings of the graph than the defaults."""
    model = ["--device", "cpu", "--params_path", checkpoint, "--index_path", tmp_path / "index"]
    succeed("recall.py", *model, "--corpus_file", sample / "corpus.csv", "--similar_text_pair", sample / "dev.csv",
            "--hnsw_m", 16, "--index_shards", 3, cwd=tmp_path)
    lines = (tmp_path / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines(True)
    query = lines[0].split("\t")[0]
    os.mkdir(tmp_path / "elsewhere")
    result = succeed("recall.py", *model, "--query", query, "--top_k", 10, cwd=tmp_path / "elsewhere")
    assert result.stdout == "".join(lines[:10]) and not os.listdir(tmp_path / "elsewhere")
    twice = succeed("recall.py", *model, "--query", query, "--query", "语义", "--top_k", 2, cwd=tmp_path).stdout
    assert twice.startswith("".join(lines[:2])) and twice.count("\n") == 4
    line = refuse("recall.py", *model, "--query", "x", "--max_seq_length", 9)
    assert "was built with another max_seq_length;" in line


def test_exact_engine(checkpoint, sample, recalled, tmp_path):
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--similar_text_pair", sample / "dev.csv", "--recall_num", 50, "--ann_engine", "exact", *FP32,
            "--index_path", "index", cwd=tmp_path)
    exact, graph = [[line.split("\t") for line in (folder / "recall_result_dir" / "recall_result.txt").read_text(
        encoding="utf-8").splitlines()] for folder in (tmp_path, recalled)]
    np.testing.assert_allclose([float(line[2]) for line in exact], [float(line[2]) for line in graph], atol=1e-5)
    assert sum(len(np.load(path)) for path in (tmp_path / "index").glob("shard_*.bin")) == 120


def test_memory_of_a_cached_step_does_not_grow_with_the_batch(sample, tmp_path):
    """Peak memory of batches of 32 and of 192, plain and in chunks of 8."""
    texts = read_texts(str(sample / "train_unsupervised.csv"), "--flag")
    (tmp_path / "train.csv").write_text("".join(f"{n}{text}\n" for n in range(2) for text in texts[:96]),
                                        encoding="utf-8")
    (tmp_path / "measured.py").write_text(
        f"import resource, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n")
    peak = {}
    for batch, more in ((32, []), (192, []), (32, ["--gradient_cache", "--chunk_size", 8]),
                        (192, ["--gradient_cache", "--chunk_size", 8])):
        result = succeed(tmp_path / "measured.py", "--device", "cpu", "--model_name_or_path", ENCODER,
                         "--train_set_file", "train.csv", "--batch_size", batch, "--max_seq_length", 64, "--save_dir",
                         "ck", *more, cwd=tmp_path)
        peak[batch, bool(more)] = int(result.stdout) / 1024
    plain, cached = (peak[192, how] - peak[32, how] for how in (False, True))
    assert plain > 250 and cached < plain / 5, peak


def test_recompute_and_accumulation(sample, tmp_path):
    """Recomputing changes no loss, dropout included; accumulating takes a step for several batches."""
    plain, recomputed, accumulated = (
        succeed("train.py", *train_flags(sample, "--epochs", 2, "--save_dir", tmp_path / name, *more))
        for name, more in (("a", []), ("b", ["--use_recompute"]), ("c", ["--gradient_accumulation_steps", 3])))
    np.testing.assert_allclose([float(loss) for loss in losses(plain)], [float(loss) for loss in losses(recomputed)],
                               atol=2e-5)
    assert len(losses(plain)) == 3 and os.listdir(tmp_path / "a") == ["model_32"]
    assert os.listdir(tmp_path / "c") == ["model_12"], "16 batches an epoch, in threes: 6 steps, the last of 1 batch"
    assert "epoch: 2, batch: 4" in accumulated.stderr
