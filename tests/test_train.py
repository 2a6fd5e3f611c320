"""train.py by its command line: what it logs, evaluates and saves."""

import json
import os
import re

import model as m
from simcse.encoder.encoder import Encoder
from simcse.encoder.engine import make_engine
from simcse.index.exact import exact_search
from simcse.measures import rank_first_targets
from simcse.text.textfile import read_text_pairs

import numpy as np
import pytest
from conftest import ENCODER, succeed
from training import embed, losses, train_flags


def embed_as_stages_do(checkpoint, texts, max_seq_length):
    """By the engine that stages use where nothing is said of precision."""
    network, tokenizer, _ = m.load_model(str(checkpoint / "model_state.pdparams"))
    return Encoder(make_engine(network), tokenizer, max_seq_length).encode(texts)


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """A run of 12 steps, evaluated every 4, saved every 3: its folder, and what the process said."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, succeed(
        "train.py", "--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file",
        sample / "train_unsupervised.csv", "--test_set_file", sample / "dev.csv", "--max_seq_length", 32,
        "--output_emb_size", 128, "--infer_with_fc_pooler", "--eval_steps", 4, "--save_steps", 3, "--epochs", 3,
        "--save_best", cwd=folder)


def test_training_logs_evaluates_and_saves(trained):
    folder, result = trained
    line = r"global step 10, epoch: 3, batch: 2, loss: \d+\.\d{5}, speed: \d+\.\d\d step/s"
    assert re.search(line, result.stderr)
    logged = re.findall(r"global step (\d+), epoch", result.stderr)
    assert logged == ["10", "12"], "every 10 steps, and the last one"
    unexplained = [line for line in result.stderr.splitlines() if "arning" in line or "\033" in line]
    assert unexplained == [], "nothing on stderr is a library's"
    evaluations = [line for line in result.stdout.splitlines() if line]
    assert [int(re.match(r"global step (\d+), recall@1=", line)[1]) for line in evaluations] == [4, 8, 12]
    assert sorted(os.listdir(folder / "checkpoints")) == ["model_12", "model_3", "model_6", "model_9", "model_best"]
    assert [name for name in os.listdir(folder / "log") if name.startswith("vdlrecords")]


def test_visualdl_log_holds_scalars(trained):
    from visualdl import LogReader

    (log,) = (trained[0] / "log").iterdir()
    reader = LogReader(file_path=str(log))
    tags = reader.get_tags()["scalar"]
    assert {"train/loss", "train/learning_rate", "train/speed", "eval/recall@1", "eval/recall@50"} <= set(tags)
    assert [record.id for record in reader.get_data("scalar", "eval/recall@50")] == [4, 8, 12]


def test_the_last_evaluation_is_what_the_checkpoint_gives(trained, sample):
    checkpoint = trained[0] / "checkpoints" / "model_12"
    pairs = read_text_pairs(str(sample / "dev.csv"), "--flag")
    queries, corpus = [list(dict.fromkeys(side)) for side in zip(*pairs)]
    rows, _ = exact_search(*[embed_as_stages_do(checkpoint, texts, 32) for texts in (queries, corpus)], 50)
    targets = [{corpus.index(target) for query, target in pairs if query == wanted} for wanted in queries]
    ranks = rank_first_targets(rows, targets)
    assert trained[1].stdout.splitlines()[-1] == "global step 12, " + ", ".join(
        f"recall@{k}={round(100 * float(np.mean(ranks < k)), 3)}" for k in (1, 5, 10, 20, 50))


def test_model_best_is_a_checkpoint_of_the_best_evaluation(trained):
    evaluations = re.findall(r"global step (\d+), recall@1=([\d.]+)", trained[1].stdout)
    step, recall = max(evaluations, key=lambda evaluation: float(evaluation[1]))  # the first of equal ones
    folder = trained[0] / "checkpoints" / "model_best"
    record = json.loads((folder / "simcse_config.json").read_text(encoding="utf-8"))
    assert (record["step"], record["measures"]["recall@1"]) == (int(step), float(recall))
    assert "training_state.json" not in os.listdir(folder)
    m.load_model(str(folder / "model_state.pdparams"))


def test_record_beside_the_checkpoint(checkpoint):
    record = json.loads((checkpoint / "simcse_config.json").read_text(encoding="utf-8"))
    assert record["model_name_or_path"] == str(ENCODER) and record["encoder_config"]["hidden_size"] == 256
    assert {key: record[key] for key in ("output_emb_size", "with_pooler", "scale", "margin", "max_seq_length")} == {
        "output_emb_size": 128, "with_pooler": True, "scale": 20, "margin": 0.0, "max_seq_length": 32}
    assert set(record["versions"]) == {"paddlepaddle", "paddlenlp"}


def test_the_same_seed_gives_the_same_run(sample, tmp_path):
    runs = [succeed("train.py", *train_flags(sample, "--seed", seed, "--save_dir", tmp_path / name))
            for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    assert len(losses(runs[0])) == 2 and losses(runs[0]) == losses(runs[1]) != losses(runs[2])
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
    network, tokenizer, _ = m.load_model(str(tmp_path / "model_0" / "model_state.pdparams"))
    ids, types = map(m.paddle.to_tensor, m.np.split(np.array([tokenizer(["语义索引"], 16)[0], [0] * 6]), 2))
    raw = network.get_pooled_embedding(ids, types, with_pooler=False).numpy()
    np.testing.assert_allclose(embed(tmp_path / "model_0", ["语义索引"]), raw, atol=1e-6)
