"""Checkpoints that come from elsewhere, files and folders of weights; losses that are no numbers."""

import argparse
import functools
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

from simcse import files
from simcse.console import InputError
from simcse.encoder import weights as w
from simcse.text import lines as line_reading
from simcse.text.textfile import TextFile
from simcse.training import checkpoints, trainer

import numpy as np
import pytest
from conftest import ENCODER, refuse, run_script, succeed
from training import saving_flags, weights


@pytest.fixture
def flags(sample):
    return functools.partial(saving_flags, sample)


@pytest.mark.parametrize("keep", range(6))
def test_how_many_are_kept(tmp_path, keep):
    """After each save the newest `keep`, however few there are by then; 0: all."""
    for number in range(1, 6):
        (tmp_path / f"model_{number}").mkdir()
        checkpoints.remove_old(str(tmp_path), number, keep)
        assert checkpoints.saved_steps(str(tmp_path)) == list(range(1, number + 1))[-keep if keep else 0 :]


def test_safetensors_is_the_same_checkpoint(flags, sample, tmp_path):
    succeed("train.py", *flags("--epochs", 1, "--save_dir", "pdparams"), cwd=tmp_path)
    other = tmp_path / "safetensors" / "model_16"
    shutil.copytree(tmp_path / "pdparams" / "model_16", other)
    w.write_weights(str(other / "model_state.safetensors"), w.read_weights(str(other / w.PARAMS_FILE), "--flag"))
    (other / w.PARAMS_FILE).unlink()
    for kind in ("pdparams", "safetensors"):
        succeed("inference.py", "--device", "cpu", "--params_path", f"{kind}/model_16", "--input_file",
                sample / "corpus.csv", "--output_file", f"{kind}.npy", cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "pdparams.npy"), np.load(tmp_path / "safetensors.npy"))
    (tmp_path / "safetensors" / "model_16" / "model_state.safetensors").write_bytes(b"\x10" * 100)
    line = refuse("inference.py", "--device", "cpu", "--params_path", "safetensors/model_16", cwd=tmp_path)
    assert "not a paddle checkpoint" in line


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_malicious_pickle_does_not_run(flags, tmp_path):
    """As a checkpoint, as an encoder, and hidden in the state of an array."""
    array = np.zeros(1, dtype=object)
    array[0] = Evil()
    for content in (Evil(), {"ptm.x": Evil()}, {"ptm.x": array}):
        (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps(content))
        line = refuse("inference.py", "--device", "cpu", "--params_path", tmp_path, cwd=tmp_path)
        assert "could run code and was not loaded" in line
    shutil.copytree(ENCODER, tmp_path / "encoder")
    (tmp_path / "encoder" / "model_state.pdparams").write_bytes(pickle.dumps({"x": Evil()}))
    line = refuse("train.py", *flags("--model_name_or_path", tmp_path / "encoder"), cwd=tmp_path)
    assert "could run code and was not loaded" in line
    assert not (tmp_path / "pwned").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert os.path.exists("pwned"), "it would have run"
    os.remove("pwned")


def test_large_arrays_in_pieces_and_bfloat16_are_read(tmp_path):
    """As paddle.save writes them: pieces where pickles are limited, bfloat16 by its bits."""
    path = str(tmp_path / "model_state.pdparams")
    state = {"a@@.0": np.arange(3.0), "a@@.1": np.arange(3.0, 6.0), "StructuredToParameterName@@": {"a": "b"},
             "UnpackBigParamInfor@@": {"a": {"OriginShape": (2, 3), "slices": ["a@@.0", "a@@.1"]}},
             "b": ("name", np.array([0x3F80, 0xC000], "uint16"))}
    with open(path, "wb") as file:
        pickle.dump(state, file, protocol=2)
    read = w.read_weights(path, "--flag")
    assert read.keys() == {"a", "b"}
    np.testing.assert_array_equal(read["a"], np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(read["b"], np.array([1.0, -2.0], "float32"))


@pytest.mark.parametrize("kind", ["pdparams", "safetensors"])
def test_weights_survive_the_disk_and_damage_is_found(tmp_path, kind):
    path = str(tmp_path / f"w.{kind}")
    state = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.array([1.5], "float32")}
    w.write_weights(path, state)
    read = w.read_weights(path, "--flag")
    assert all((read[name] == state[name]).all() for name in state) and read.keys() == state.keys()
    with open(path, "rb") as file:
        whole = file.read()
    for damaged in (b"", whole[: len(whole) // 2], b"\x00" * 50):
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(InputError, match="--flag .*: not a paddle checkpoint"):
            w.read_weights(path, "--flag")


def test_a_folder_takes_the_place_of_another_at_once(tmp_path):
    path = tmp_path / "out"
    for content in ("old", "new"):
        with files.new_folder(str(path)) as folder, open(os.path.join(folder, "a"), "w") as file:
            file.write(content)
        (path / "kept").write_text("kept")
    assert (path / "a").read_text() == "new" and (path / "kept").read_text() == "kept"
    with pytest.raises(RuntimeError), files.new_folder(str(path)) as folder:
        raise RuntimeError
    assert sorted(os.listdir(path)) == ["a", "kept"] and os.listdir(tmp_path) == ["out"]


def test_a_loss_that_is_no_number_stops_with_lines(flags, tmp_path):
    """Weights with a NaN from the start: the first batch's lines, exit code 1, and nothing is saved over them."""
    succeed("train.py", *flags("--epochs", 0), cwd=tmp_path)
    path = tmp_path / "checkpoints" / "model_0" / "model_state.pdparams"
    state = weights(path.parent)
    state["emb_reduce_linear.bias"] = state["emb_reduce_linear.bias"] + np.nan
    w.write_weights(str(path), state)
    result = run_script("train.py", *flags("--init_from_ckpt", path, "--save_dir", "after"), cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: the loss of step 1 is nan (batch: lines " in result.stderr
    assert "error: after step 0 weights contain NaN or Inf; checkpoint not saved\n" in result.stderr
    assert "--max_grad_norm" in result.stderr and os.listdir(tmp_path / "after") == []


def test_the_message_of_a_loss_counts_the_lines_that_it_leaves_out():
    run = object.__new__(trainer.Trainer)
    run.texts = SimpleNamespace(line_number=lambda row: row + 1)
    run.step = 11
    run.checked_step = 11
    message = run._describe_loss(float("nan"), SimpleNamespace(rows=range(512)))
    assert "the loss of step 12 is nan (batch: lines 1, 2, 3, " in message
    assert message.endswith(" 99, 100 and 412 more of --train_set_file)")


def test_a_loss_that_becomes_no_number_leaves_the_weights_before_it(flags, tmp_path):
    result = run_script("train.py", *flags("--learning_rate", 1e30, "--warmup_proportion", 0, "--quiet"), cwd=tmp_path)
    assert result.returncode == 1 and "(batch: lines " in result.stderr, "an error is said with --quiet, too"


def test_weights_that_are_no_numbers_are_not_saved(flags, tmp_path):
    """The loss of a run of one step is a number, and the weights after it are none: its end saves and measures none."""
    result = run_script("train.py", *flags("--learning_rate", 3e38, "--warmup_proportion", 0, "--weight_decay", 1e5,
                                           "--epochs", 1, "--batch_size", 10**4, "--quiet"), cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "error: after step 1 weights contain NaN or Inf; checkpoint not saved\nA lower --learn" in result.stderr
    assert not result.stdout and os.listdir(tmp_path / "checkpoints") == []


def test_max_grad_norm(flags, tmp_path):
    """A tiny norm changes the weights other than none does, AdamW's epsilon being what it is."""
    for name, more in (("free", []), ("clipped", ["--max_grad_norm", 1e-9])):
        succeed("train.py", *flags("--epochs", 1, "--save_dir", name, *more), cwd=tmp_path)
    free, clipped = (weights(tmp_path / name / "model_16") for name in ("free", "clipped"))
    start = {name: abs(free[name] - clipped[name]).max() for name in free}
    assert max(start.values()) > 1e-5


def test_a_step_that_is_saved_again_leaves_no_other_weights(tmp_path, monkeypatch):
    """They would be loaded instead of the new ones, and trained on from."""
    run = object.__new__(trainer.Trainer)
    run.args = argparse.Namespace(save_dir=str(tmp_path), keep_checkpoints=0)
    run.step, run.last_saved_step, run.model, run.optimization, run.settings = 1, None, None, None, None
    run.best = None
    run.check_weights = lambda skipped: None
    run.write_model = lambda folder: Path(folder, w.PARAMS_FILE).write_text("")
    monkeypatch.setattr(trainer, "write_state", lambda *_, **__: None)
    (tmp_path / "model_1").mkdir()
    for name in ("model_state.safetensors", "notes.txt"):
        (tmp_path / "model_1" / name).write_text("")
    run.save()
    assert sorted(os.listdir(tmp_path / "model_1")) == [w.PARAMS_FILE, "notes.txt"]


def test_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(line_reading, "SCAN_BYTES", 4)
    path = tmp_path / "file.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb\rc\n\n\nd\r\ne")
    texts = TextFile(str(path), "--flag")
    assert [(text, texts.line_number(row)) for row, text in enumerate(texts)] == [
        ("a", 1), ("b", 3), ("c", 4), ("d", 7), ("e", 8)]


def test_a_save_dir_that_cannot_be_used(flags, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "--save_dir file: file exists" in refuse("train.py", *flags("--save_dir", "file"), cwd=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(InputError, match="--save_dir .*: 0.0 GB are free, and a checkpoint takes 2.0 GB"):
        checkpoints.prepare_save_dir(str(tmp_path / "new"), 2 * 10**9)


def test_record_of_the_state_is_plain_json(flags, tmp_path):
    succeed("train.py", *flags("--epochs", 1), cwd=tmp_path)
    record = json.loads((tmp_path / "checkpoints" / "model_16" / "training_state.json").read_text())
    assert record["step"] == 16 and record["run"]["batch_size"] == 8 and record["schedule"]["last_epoch"] == 16


def test_a_model_is_known_by_its_content(tmp_path, monkeypatch):
    """Its weights, its record but for the names in it, its tokenizer, its encoder; however they are called."""
    monkeypatch.chdir(tmp_path)
    for folder in ("ck", "tiny"):
        (tmp_path / folder).mkdir()
    record = {"model_name_or_path": "tiny", "versions": {"paddlepaddle": "3"}, "pooling": "mean"}

    def digest(name=None, **changed):
        files = {"ck/model_state.pdparams": "1", "ck/vocab.txt": "甲", "ck/tokenizer_config.json": "{}",
                 "ck/simcse_config.json": json.dumps(record), "tiny/config.json": "{}", "tiny/vocab.txt": "甲",
                 **changed}
        for path, content in files.items():
            (tmp_path / path).unlink(missing_ok=True)
            if content is not None:
                (tmp_path / path).write_text(content, encoding="utf-8")
        return w.model_digest("ck/model_state.pdparams", name)

    same = digest()
    renamed = {**record, "model_name_or_path": "./tiny", "versions": {}, "step": 4, "measures": {}, "run_digest": "1"}
    assert digest(**{"ck/simcse_config.json": json.dumps(renamed)}) == same
    assert digest("tiny") == digest("./tiny") == digest(f"{tmp_path}/tiny")
    for path in ("ck/model_state.pdparams", "ck/vocab.txt", "ck/tokenizer_config.json"):
        assert digest(**{path: "乙"}) != same, path
    assert digest(**{"ck/simcse_config.json": json.dumps({**record, "pooling": "pooler"})}) != same
    assert digest(**{"tiny/vocab.txt": "乙"}) == same, "the tokenizer is the one beside the checkpoint"
    bare = {"ck/tokenizer_config.json": None, "ck/vocab.txt": None}
    assert digest(**bare, **{"tiny/vocab.txt": "乙"}) != digest(**bare), "the recorded encoder's is taken"
    alone = {**bare, "ck/simcse_config.json": None}
    assert digest(**alone) == digest("rocketqa-zh-base-query-encoder", **alone) != digest("ernie-1.0", **alone)
