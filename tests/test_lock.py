"""One process at a time builds the index of a folder; the others wait for it, or are refused."""

import multiprocessing
import os
import threading
import time

import recall
from simcse.console import InputError
from simcse.index import lock
from simcse.index.lock import lock_folder
from simcse.index.manifest import Manifest

import pytest
from indexes import manifest_of


def _build(path, manifest, started, end):
    with lock_folder(path, Manifest(), manifest):
        started.set()
        end.wait(20)
        os.mkdir(path)


def test_two_builds_of_one_index(tmp_path, monkeypatch):
    """The later waits for the same index, and is refused for another before it has done anything."""
    path, context = str(tmp_path / "new" / "index"), multiprocessing.get_context("spawn")
    started, end = context.Event(), context.Event()
    manifest = manifest_of("hnswlib", 9, 32, 2, hnsw_m=16)
    other = context.Process(target=_build, args=(path, manifest, started, end))
    other.start()
    assert started.wait(30)
    with (pytest.raises(InputError, match="another process is building: was built with hnsw_m 16, not 32; name"),
          lock_folder(path, Manifest(build_settings={"hnsw_m": 32}), manifest)):
        raise AssertionError("two at a time")
    assert not os.path.exists(path)
    said = []
    monkeypatch.setattr(lock, "log", lambda line: (said.append(line), end.set()))  # which lets the first go on
    with lock_folder(path, Manifest(build_settings={"hnsw_m": 16}), manifest):
        assert os.path.isdir(path), "the first has built it"
    other.join(20)
    assert said == [f"waiting for the process that is building the index in {path}"]
    assert os.listdir(tmp_path / "new") == ["index"]


def test_others_wait_for_what_is_built_of_a_changed_corpus(tmp_path, monkeypatch):
    """It has the settings of the index before; how many shards it has follows from the corpus."""
    previous = manifest_of("hnswlib", 9, 32, 2, hnsw_m=16)
    previous.corpus = "before"
    built = []
    monkeypatch.setattr("ann_util.read_manifest", lambda path, wanted: previous)
    monkeypatch.setattr("recall.lock_folder", lambda path, wanted, manifest: built.append(manifest))
    recall.lock_unless_current(str(tmp_path), Manifest(corpus="now"))
    assert built[0].index_shards is None and built[0].build_settings["hnsw_m"] == 16


def test_two_who_waited_for_a_third_do_not_build_at_once(tmp_path, monkeypatch):
    """The lock that one of them gets is of a file that is removed, unless it looks again."""
    path, inside, most = str(tmp_path / "index"), [], []
    monkeypatch.setattr(lock, "log", lambda line: None)

    def build(number):
        for _ in range(20):
            with lock_folder(path, Manifest(), Manifest()):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.001)
                inside.remove(number)

    builders = [threading.Thread(target=build, args=(number,)) for number in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert len(most) == 80 and max(most) == 1 and os.listdir(tmp_path) == []
