"""Where results are written, and what the machine grants."""

import errno
import os
import re
import stat
import threading

from deploy.python import predictor
from simcse import machine
from simcse.console import InputError
from simcse.files import STDIN, check_not_input, check_writable, name_output, new_file, new_folder
from simcse.index import lock
from simcse.index.manifest import Manifest
from simcse.index.milvus_collection import (
    IDS,
    MAX_KEYS_PER_REQUEST,
    MAX_ROWS_PER_UPSERT,
    MESSAGE_BYTES,
    PASSAGE,
    TEXT,
    VECTOR,
    Collection,
    split_by_size,
)
from simcse.training.log import TrainingLog

import numpy as np
import pytest
from conftest import refuse


def test_a_link_is_followed(tmp_path):
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    for text in ("new", "newer"):
        with new_file(str(link)) as file:
            file.write(text)
        assert link.is_symlink() and target.read_text() == text
    folder = tmp_path / "elsewhere" / "folder"
    folder.mkdir()
    (folder / "users.txt").write_text("kept")
    link = tmp_path / "folder"
    link.symlink_to(folder)
    with new_folder(str(link)) as temporary:
        (tmp_path / temporary / "file").write_text("new")
    assert link.is_symlink() and sorted(os.listdir(folder)) == ["file", "users.txt"]
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["folder", "target"]


def test_a_named_pipe_is_written_to(tmp_path):
    """As a device is: neither is replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(str(pipe), "--output_file")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with new_file(str(pipe)) as file:
        file.write("text")
    reader.join(10)
    assert read == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path, is_folder, message in ((tmp_path, False, "is a folder"), (tmp_path / "file", True, "is not a folder"),
                                     (tmp_path / "file" / "below", False, "file is no folder"),
                                     ("/proc", True, "is a mount point")):
        with pytest.raises(InputError, match=f"--flag .*{message}"):
            check_writable(str(path), "--flag", is_folder=is_folder)
    for path in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="is the current folder, or the current one is in it; name another folder"):
            check_writable(str(path), "--flag", is_folder=True)
    with pytest.raises(InputError, match="--flag: an empty path"):
        check_writable("", "--flag", is_folder=True)
    check_writable(str(tmp_path / "new" / "file"), "--flag")
    check_writable("/dev/null", "--flag")


def test_a_file_that_is_read_is_not_written(tmp_path):
    (tmp_path / "read").write_text("text")
    (tmp_path / "link").symlink_to("read")
    (tmp_path / "hard_link").hardlink_to(tmp_path / "read")
    inputs = {"--input_file": [STDIN, str(tmp_path / "read")], "--query_file": None, "--corpus_file": "/dev/null"}
    for name in ("read", "link", "hard_link", "../" + tmp_path.name + "/read"):
        path = f"{tmp_path}/{name}"
        message = f"--output_file {path}: is the same file as --input_file {tmp_path}/read;"
        with pytest.raises(InputError, match=message):
            check_not_input(path, "--output_file", inputs)
    (tmp_path / "other").write_text("text")
    for path in ("new", "other", "/dev/null"):
        check_not_input(str(tmp_path / path), "--output_file", inputs)


@pytest.mark.parametrize("script, flags, message", [
    ("inference.py", ["--params_path", ".", "--output_file", "x.npy", "x.npy"], "--output_file x.npy: .* --input_file"),
    ("recall.py", ["--params_path", ".", "--query_file", "x.npy", "--corpus_file", "a", "--recall_result_dir", ".",
                   "--recall_result_file", "x.npy"], r"--recall_result_file ./x.npy: .* --query_file x.npy"),
    ("evaluate.py", ["--similar_text_pair", "a", "--recall_result_file", "a", "b", "--plot", "a.png"],
     "--plot a.png: .* --recall_result_file b"),
    ("deploy/python/predict.py", ["--input_file", "b", "--output_file", "x.npy"],
     "--output_file x.npy: .* --input_file b"),
    ("scripts/to_tsv.py", ["--input_file", "b", "--output_file", "x.npy"], "--output_file x.npy: .* --input_file b"),
    ("scripts/make_pairs.py", ["--corpus_file", "a", "--query_file", "b", "--output_file", "x.npy"],
     "--output_file x.npy: .* --query_file b"),
    ("scripts/mine_negatives.py", ["--similar_text_pair", "a", "--positive_scores", "b", "--recall_result_file", "a",
                                   "--output_file", "x.npy"], "--output_file x.npy: .* --positive_scores b")])
def test_each_script_refuses_to_write_what_it_reads(tmp_path, script, flags, message):
    for name in ("a", "x.npy"):
        (tmp_path / name).write_text("text\n")
    for name in ("b", "a.png"):
        (tmp_path / name).symlink_to("x.npy")
    (tmp_path / "model_state.pdparams").write_bytes(b"")
    assert re.search(message, refuse(script, *flags, cwd=tmp_path))
    assert (tmp_path / "x.npy").read_text() == "text\n"


def test_a_disk_that_is_full_is_named(tmp_path):
    message = "--flag /dev/full: cannot be written: no space left on device"
    with pytest.raises(InputError, match=message), new_file("/dev/full", flag="--flag") as file:
        file.write("text")
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    with pytest.raises(InputError, match=f"--flag {below}: cannot be written: "), new_file(str(below), flag="--flag"):
        pass
    for error in (BrokenPipeError(), ConnectionResetError(), FileNotFoundError(2, "no such file", "/elsewhere")):
        with pytest.raises(type(error)), name_output(str(tmp_path / "new"), "--flag"):
            raise error


def test_a_visualdl_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "log").write_text("")
    with pytest.raises(InputError, match=f"--visualdl_dir {tmp_path}/log: cannot be written: file exists"):
        TrainingLog(str(tmp_path / "log"), step=0, total_steps=1, steps_per_epoch=1)


def test_an_index_for_which_there_is_no_space_is_named(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.os, "write", write)
    index = tmp_path / "index"
    message = f"--index_path {index}: cannot be written: no space left on device"
    with pytest.raises(InputError, match=message), lock.lock_folder(str(index), Manifest(), Manifest()):
        pass
    assert not os.listdir(tmp_path)


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Control groups of a version: a group within another, whose files the test writes."""
    def write(line, **files):
        (tmp_path / "cgroup").write_text(line)
        for path, text in files.items():
            target = tmp_path / "fs" / path.replace("__", "/").replace("_DOT_", ".")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

    for module in (machine, predictor):
        monkeypatch.setattr(module, "CGROUPS", str(tmp_path / "fs"))
        monkeypatch.setattr(module, "CGROUP_OF_PROCESS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)))
    return write


def test_cores_and_memory_of_a_container_of_version_2(cgroup):
    cgroup("0::/box/inner\n", box__cpu_DOT_max="350000 100000\n", box__inner__cpu_DOT_max="max 100000\n",
           box__memory_DOT_max="500000000\n", box__memory_DOT_current="200000000\n",
           box__memory_DOT_stat="anon 1\ninactive_file 50000000\n", box__inner__memory_DOT_max="max\n",
           box__inner__memory_DOT_current="1\n", box__inner__memory_DOT_stat="inactive_file 0\n")
    assert machine.count_cores() == predictor.count_cores() == 3
    assert machine.available_memory() == 350_000_000


def test_cores_and_memory_of_a_container_of_version_1(cgroup):
    cgroup("4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n",
           **{"cpu,cpuacct__box__cpu_DOT_cfs_quota_us": "250000\n"},
           **{"cpu,cpuacct__box__cpu_DOT_cfs_period_us": "100000\n"},
           memory__box__memory_DOT_limit_in_bytes="400000000\n", memory__box__memory_DOT_usage_in_bytes="100000000\n",
           memory__box__memory_DOT_stat="total_inactive_file 7\n")
    assert machine.count_cores() == predictor.count_cores() == 2
    assert machine.available_memory() == 300_000_007


def test_messages_to_milvus_are_counted_in_bytes():
    def row(size):
        return {TEXT: "长" * size, PASSAGE: "", IDS: "", VECTOR: np.zeros(8, "float32")}

    rows = [row(20_000)] * 1500
    pieces = list(split_by_size(rows))
    assert sum(map(len, pieces)) == 1500 and len(pieces) == 3
    assert all(len(piece) * (3 * 20_000 + 32) <= MESSAGE_BYTES for piece in pieces)
    assert [len(piece) for piece in split_by_size([row(1)] * (MAX_ROWS_PER_UPSERT + 1))] == [MAX_ROWS_PER_UPSERT, 1]
    assert [len(piece) for piece in split_by_size([row(MESSAGE_BYTES)] * 2)] == [1, 1]
    assert list(split_by_size([])) == []
    collection = Collection("x.db", "texts")
    assert collection._keys_per_request([]) == MAX_KEYS_PER_REQUEST
    assert collection._keys_per_request([TEXT, IDS]) * 2 * 65535 <= MESSAGE_BYTES
