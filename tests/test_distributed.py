"""Several processes as one: gradients over ranks, in chunks, and both; the corpus shared out; errors on one rank."""

import os
import signal
import subprocess
import sys
import time

import model as m
from data import ShuffledBatches
from simcse.encoder.weights import read_record, read_weights
from simcse.training.checkpoints import saved_steps
from simcse.training.gradients import Embeddings, backward

import gradients
import numpy as np
import paddle
import pytest
from conftest import ENCODER, ROOT, launch, succeed
from gradients import CASES, batch_of, texts, tiny
from training import train_flags


# ------------------------------------------------------------------------------------------------------ gradients
@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    result, _ = launch("tests/gradients.py", folder, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return {name: [dict(np.load(folder / f"{name}_{rank}.npz")) for rank in (0, 1)] for name in [*CASES, "shares"]}


TABLE_TENSORS = 6  # of first_avg: the table, its norm's two, the fc's two, and the loss


def assert_same(got, expected, at_least=20):
    assert got.keys() == expected.keys() and len(got) >= at_least
    for name, gradient in got.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5, rtol=1e-4, err_msg=name)


def mean(parts):
    return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}


@pytest.mark.parametrize("name", ["cross", "cross_cached", "cross_triples", "cross_triples_cached",
                                  "cross_table", "cross_table_cached"])
def test_negatives_of_all_ranks_are_one_process_with_a_larger_batch(of_ranks, name):
    expected = gradients.gradients(texts(0) + texts(1), columns=3 if "triples" in name else 1,
                                   pooling="first_avg" if "table" in name else "pooler")
    for rank in of_ranks[name]:
        assert_same(rank, expected, TABLE_TENSORS if "table" in name else 20)
    of_rank_alone = {"triples": "triples", "table": "table"}.get(name.split("_")[1] if "_" in name else "", "plain")
    assert abs(expected["loss"] - of_ranks[of_rank_alone][0]["loss"]) > 0.1


@pytest.mark.parametrize("name", ["plain", "cached"])
def test_without_them_gradients_are_the_mean_of_the_ranks(of_ranks, name):
    alone = [gradients.gradients(texts(rank)) for rank in (0, 1)]
    expected = mean(alone)
    for rank in (0, 1):
        got = of_ranks[name][rank]
        assert got["loss"] == pytest.approx(alone[rank]["loss"], abs=1e-5)
        assert_same({**got, "loss": 0}, {**expected, "loss": 0})


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_a_cached_step_of_a_table_is_a_plain_one(chunk):
    ids = texts(1, 10)
    assert_same(gradients.gradients(ids, chunk=chunk, pooling="first_avg"),
                gradients.gradients(ids, pooling="first_avg"), TABLE_TENSORS)


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_a_cached_step_is_a_plain_one(chunk):
    """Dropout on: against the same chunks encoded once, all graphs kept. Dropout off: against one pass over all."""
    ids = texts(1, 10)
    network = tiny(0.3)
    paddle.seed(7)
    batch = batch_of(ids)
    views = [network(part) for part in batch.chunks(chunk)]
    query, title = (paddle.concat([view[side] for view in views]) for side in (0, 1))
    loss = network.loss(Embeddings(query, title), batch.duplicate_keys).value
    loss.backward()
    expected = {"loss": loss.numpy(), **{name: p.grad.numpy() for name, p in network.named_parameters()
                                         if p.grad is not None}}
    assert_same(gradients.gradients(ids, dropout=0.3, chunk=chunk), expected)
    assert_same(gradients.gradients(ids, chunk=chunk), gradients.gradients(ids))
    assert abs(gradients.gradients(ids)["loss"] - expected["loss"]) > 1e-3, "dropout was on"


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("keys, device", [(True, "cpu"), (False, "cpu"), (True, "gpu:0")])
def test_texts_of_like_length_together_are_all_in_one_pass(monkeypatch, columns, chunk, keys, device):
    """Loss and gradients, dropout off; the passes that there are, and their tokens; on what looks like a GPU, too, and
    nothing is read back from it."""
    results, tokens, encode = [], [], m.SimCSE.get_pooled_embedding

    def counted(model, ids, *types, **more):
        tokens[-1].append(ids.size)
        return encode(model, ids, *types, **more)

    def read(*_):
        raise AssertionError("the host waits for the device")

    def backward_alone(*args):
        with monkeypatch.context() as reading:
            for name in ("numpy", "item", "tolist", "__array__", "__float__", "__bool__", "__int__"):
                reading.setattr(paddle.Tensor, name, read)
            return backward(*args)

    monkeypatch.setattr(gradients, "backward", backward_alone)
    monkeypatch.setattr(m.SimCSE, "get_pooled_embedding", counted)
    monkeypatch.setattr(paddle.device, "get_device", lambda: device)
    for cost in (10**6, 0):
        monkeypatch.setitem(m.PASS_TOKENS, "cpu" if device == "cpu" else "fp32", cost)
        tokens.append([])
        results.append(gradients.gradients(texts(1, 18), chunk=chunk, keys=keys, columns=columns))
    assert_same(*results)
    assert len(tokens[0]) == (6 if chunk else 1) < len(tokens[1]) and sum(tokens[0]) > sum(tokens[1])


def test_duplicates_are_no_negatives():
    """A batch in which a text stands twice, against the loss written out without the two pairs."""
    ids = texts(1)
    network = tiny()
    batch = batch_of(ids)
    keys, vectors = batch.duplicate_keys.query, network.embed(*batch.query).numpy()
    logits = 20 * (vectors @ vectors.T - 0.1 * np.eye(6))
    logits[0, 5] = logits[5, 0] = -np.inf
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))
    assert keys[0] == keys[5] and len(set(keys.tolist())) == 5
    assert gradients.gradients(ids)["loss"] == pytest.approx(expected, rel=1e-5)
    assert gradients.gradients(ids, keys=False)["loss"] > expected + 0.1


# ---------------------------------------------------------------------------------------------------------- shares
@pytest.mark.parametrize("count, batch_size, ranks", [(23, 4, 1), (23, 4, 2), (24, 4, 3), (3, 2, 4), (1, 3, 2)])
def test_batches_are_those_of_paddles_sampler(count, batch_size, ranks):
    for rank in range(ranks):
        theirs = paddle.io.DistributedBatchSampler(range(count), batch_size, ranks, rank, shuffle=True)
        ours = ShuffledBatches(count, batch_size, rank, ranks)
        for epoch in range(3):
            assert [rows.tolist() for rows in ours.epoch(epoch)] == list(theirs)
        assert len(ours) == len(theirs)


def test_ranks_encode_their_shares_and_have_all(of_ranks):
    for count in gradients.COUNTS:
        for rank in (0, 1):
            numbers, by = of_ranks["shares"][rank][str(count)].T
            assert numbers.tolist() == list(range(count)) and by.sum() == count // 2 and (np.diff(by) >= 0).all()


@pytest.mark.parametrize("engine, shards, ranks", [
    ("hnswlib", 1, 3),  # one shard: eight pieces of 15 documents, the last of 14
    ("exact", 3, 2),  # three pieces, of which the second belongs to rank 1
    ("exact", 8, 2)])  # four shards a rank, which exchange nothing
def test_recall_on_several_ranks_is_the_same_file(checkpoint, sample, tmp_path, engine, shards, ranks):
    flags = ["--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
             "--similar_text_pair", sample / "dev.csv", "--recall_num", 20, "--index_path", "index",
             "--ann_engine", engine]
    if shards > 1:  # otherwise it is the default
        flags += ["--index_shards", shards]
    results = []
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
        if name == "one":
            succeed("recall.py", *flags, cwd=tmp_path / name)
        else:
            result, logs = launch("recall.py", *flags, cwd=tmp_path / name, ranks=ranks)
            assert result.returncode == 0, (result.stdout[-2000:], logs)
            assert "119 vectors for 120 documents" in logs[0]
            assert "encoding and indexing 119 of 120 documents" in logs[0] and "encoding" not in logs[1]
            assert "wrote" in logs[0] and "wrote" not in logs[1]
        results.append((tmp_path / name / "recall_result_dir" / "recall_result.txt").read_bytes())
        assert sorted(os.listdir(tmp_path / name / "index")) == [
            "corpus.csv", "documents.npy", "keys.npy", "manifest.json", "row_map.npy",
            *(f"shard_{n}.bin" for n in range(shards)), "vector_keys.npy"]
    assert results[0] == results[1] and results[0].count(b"\n") == 60 * 20
    for path in (tmp_path / "one" / "index").iterdir():
        assert path.read_bytes() == (tmp_path / "several" / "index" / path.name).read_bytes(), path.name


# ---------------------------------------------------------------------------------------------------------- errors
@pytest.mark.default_stack
def test_an_error_on_one_rank_ends_all_with_its_message(sample, tmp_path):
    """Rank 1 alone finds its training file changed into another encoding."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('PADDLE_TRAINER_ID') == '1':\n    import builtins\n    real = builtins.open\n"
        "    builtins.open = lambda path, *more, **named: real('gbk.csv' if path == 'train.csv' else path, *more, "
        "**named)\n")
    (tmp_path / "train.csv").write_text((sample / "train_unsupervised.csv").read_text(encoding="utf-8"),
                                        encoding="utf-8")
    (tmp_path / "gbk.csv").write_bytes("语义索引\n".encode("gbk"))
    started = time.monotonic()
    result, logs = launch("train.py", "--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file",
                          "train.csv", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode != 0
    assert "train.py: error: --train_set_file train.csv:1: not UTF-8" in logs[1] and "GBK" in logs[1]
    assert "saved" not in logs[0] and time.monotonic() - started < 120


@pytest.mark.default_stack
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_ranks_end_with_the_launcher(sample, tmp_path, number):
    """Ctrl-C is passed on, and rank 0 saves, where there is time; killed, it leaves processes that see that it is gone.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo", "--log_dir",
         "ranks", str(ROOT / "train.py"), "--device", "cpu", "--model_name_or_path", str(ENCODER), "--train_set_file",
         str(sample / "train_unsupervised.csv"), "--batch_size", "4", "--max_seq_length", "8", "--epochs", "10000"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    log = tmp_path / "ranks" / "workerlog.0"
    wait_for(lambda: log.exists() and "global step 10," in log.read_text(encoding="utf-8"))
    ranks = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == process.pid]
    assert len(ranks) == 2
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in ranks))
    saved = [name for name in os.listdir(tmp_path / "checkpoints") if not name.startswith(".")]
    # On Ctrl-C the launcher gives them four seconds, which a busy machine may not have.
    assert len(saved) == 1 if number == signal.SIGKILL else len(saved) <= 1
    for name in saved:
        assert f"saved ./checkpoints/{name}" in log.read_text(encoding="utf-8")
        assert "training_state.json" in os.listdir(tmp_path / "checkpoints" / name)


def test_a_rank_whose_launcher_is_gone_before_it_joins_ends():
    code = ("import os, signal\nfrom simcse import ranks\nranks.PARENT -= 1  # the process that was its parent\n"
            "ranks.end_with_launcher()\nsignal.pause()\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == -signal.SIGUSR1


def test_a_loss_that_is_no_number_on_one_rank_ends_both(sample, tmp_path):
    """Before an evaluation: neither waits for the other, and the weights, which all ranks' gradients have spoilt, are
    not saved."""
    (tmp_path / "train.py").write_text(f"""import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import simcse.training.gradients as gradients
from simcse.machine import RANK
whole, steps = gradients.backward, []

def broken(*args):
    steps.append(1)
    loss = whole(*args)
    return loss._replace(value=loss.value * float("nan")) if RANK and len(steps) == 2 else loss

gradients.backward = broken
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    result, logs = launch(tmp_path / "train.py", *train_flags(sample, "--eval_steps", 2, "--save_dir", "out"),
                          cwd=tmp_path, timeout=120)
    assert result.returncode and not any("Traceback" in log for log in logs), logs
    assert "error: the loss of step 2 is nan (batch: lines" in logs[1] and "error" not in logs[0], logs


@pytest.mark.default_stack
def test_an_error_of_one_rank_that_encodes_ends_all(checkpoint, sample, tmp_path):
    """Rank 0, which has the only shard, waits for the second piece of rank 1, which never comes."""
    (tmp_path / "recall.py").write_text(f"""import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from simcse.console import InputError
from simcse.encoder.encoder import Encoder
from simcse.machine import RANK
whole, pieces = Encoder.embed, []

def broken(*args):
    pieces.append(1)
    if RANK == 1 and len(pieces) == 2:
        raise InputError("the second piece")
    return whole(*args)

Encoder.embed = broken
runpy.run_path({str(ROOT / "recall.py")!r}, run_name="__main__")
""")
    result, logs = launch(tmp_path / "recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file",
                          sample / "corpus.csv", "--query", "语义", "--index_path", "index", cwd=tmp_path, timeout=120)
    assert result.returncode and logs[1].endswith("recall.py: error: the second piece\n"), logs
    assert "encoding and indexing 119 of 120 documents" in logs[0] and not (tmp_path / "index").exists()


@pytest.mark.default_stack
def test_two_ranks_broken_and_resumed_are_two_unbroken(sample, tmp_path):
    flags = ["--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file", sample / "train_unsupervised.csv",
             "--batch_size", 4, "--max_seq_length", 16, "--epochs", 1, "--save_steps", 6, "--cross_device_negatives",
             "--resume"]
    result, logs = launch("train.py", *flags, "--save_dir", "whole", cwd=tmp_path)
    assert result.returncode == 0, logs
    (tmp_path / "sitecustomize.py").write_text(dies_after("broken/model_6"))
    first, _ = launch("train.py", *flags, "--save_dir", "broken", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    last = saved_steps(str(tmp_path / "broken"))[-1]
    assert first.returncode != 0 and last < 16
    second, logs = launch("train.py", *flags, "--save_dir", "broken", cwd=tmp_path)
    assert second.returncode == 0 and f"resuming from broken/model_{last}" in logs[0], logs
    one, other = (read_weights(str(tmp_path / name / "model_16" / "model_state.pdparams"), "--flag")
                  for name in ("whole", "broken"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    result, logs = launch("train.py", *flags, "--save_dir", "broken", cwd=tmp_path, ranks=1)
    assert result.returncode != 0 and "the number of processes is 1, the checkpoint has 2" in logs[0]


def dies_after(path):
    """A sitecustomize.py by which rank 1 dies when there is such a path."""
    return ("import os, threading, time\n"
            "def watch():\n"
            f"    while not os.path.exists({path!r}):\n"
            "        time.sleep(0.01)\n"
            "    os._exit(9)\n"
            "if os.environ.get('PADDLE_TRAINER_ID') == '1':\n"
            "    threading.Thread(target=watch, daemon=True).start()\n")


def parent_of(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_two_processes_train_one_model(sample, tmp_path):
    """paddle.distributed.launch with gloo: both ranks work, rank 0 alone logs and saves, and measures what one process
    does. Both stop early after the same step, where an evaluation of much the same weights is not better."""
    result, logs = launch("train.py", *train_flags(
        sample, "--test_set_file", sample / "dev.csv", "--save_dir", tmp_path / "ck", "--batch_size", 4,
        "--visualdl_dir", tmp_path / "log", "--eval_steps", 6, "--learning_rate", 1e-12, "--save_best",
        "--early_stopping", 1), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "global step 10," in logs[0] and "recall@1=" in logs[0]
    assert "global step" not in logs[1] and "saved" not in logs[1]
    assert "stopping early after step 12: 1 evaluation in a row" in logs[0] and "stopping early" not in logs[1]
    assert logs[0].count("recall@50=") == 2, "after steps 6 and 12; the last one once, although the run ends there"
    assert sorted(os.listdir(tmp_path / "ck")) == ["model_12", "model_best"]
    assert read_record(str(tmp_path / "ck" / "model_best"))["step"] == 6
    alone = succeed("train.py", *train_flags(sample, "--test_set_file", sample / "dev.csv", "--epochs", 0, "--save_dir",
                                             "alone", "--init_from_ckpt", tmp_path / "ck" / "model_12"), cwd=tmp_path)
    assert alone.stdout.removeprefix("global step 0") in logs[0] and "recall@50=" in alone.stdout
