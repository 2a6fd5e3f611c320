"""The graph that is kept beside a checkpoint: when it is used, and when it is made again."""

import json
import shutil

import model as m
from simcse.console import InputError
from simcse.device import set_gpu_precision
from simcse.encoder import kept_graph
from simcse.encoder.engine import open_engine
from simcse.encoder.weights import read_weights, write_weights

import numpy as np
import pytest
from conftest import FP32, ROOT, refuse, succeed

WEIGHTS, GRAPH = "model_state.pdparams", "model_state.graph"
KEPT = f"/{GRAPH}, for quicker starts"


@pytest.fixture
def trained_anew(checkpoint, tmp_path):
    """A copy of the checkpoint, without a graph."""
    return shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.graph"))


def start(checkpoint, *flags, **options):
    """The vector of a text, and whether the graph was made for it."""
    result = succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, "--text", "语义检索", "--format",
                     "jsonl", *FP32, *flags, **options)
    return json.loads(result.stdout)["embedding"], KEPT in result.stderr


def test_the_second_start_needs_no_paddlenlp(trained_anew, tmp_path):
    """And gives the same vector, to the bit."""
    first, made = start(trained_anew)
    assert made and sorted(path.name for path in (trained_anew / GRAPH).iterdir())[0] == "fingerprint.json"
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['paddlenlp'] = None\n")
    assert start(trained_anew, env={"PYTHONPATH": str(tmp_path)}) == (first, False)


def test_it_is_made_again_for_other_weights_and_another_record(trained_anew):
    first, _ = start(trained_anew)
    path = str(trained_anew / WEIGHTS)
    write_weights(path, {name: array * 1.1 for name, array in read_weights(path, "--flag").items()})
    other, made = start(trained_anew)
    assert made and other != first and start(trained_anew) == (other, False)
    record = json.loads((trained_anew / "simcse_config.json").read_text(encoding="utf-8"))
    record["with_pooler"] = not record["with_pooler"]
    (trained_anew / "simcse_config.json").write_text(json.dumps(record), encoding="utf-8")
    raw, made = start(trained_anew)
    assert made and raw != other and start(trained_anew) == (raw, False)


def test_it_is_made_again_where_it_is_another_versions_or_damaged(trained_anew):
    first, _ = start(trained_anew)
    fingerprint = trained_anew / GRAPH / "fingerprint.json"
    told = json.loads(fingerprint.read_text())
    for name in ("paddlepaddle", "libraries", "code"):
        fingerprint.write_text(json.dumps({**told, name: "another"}))
        assert start(trained_anew) == (first, True), name
    for path in sorted((trained_anew / GRAPH).iterdir()):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert start(trained_anew) == (first, True), path.name
    next(path for path in (trained_anew / GRAPH).iterdir() if path.suffix in (".pdiparams", ".bin")).unlink()
    assert start(trained_anew) == (first, True) and start(trained_anew) == (first, False)
    assert not [path.name for path in trained_anew.iterdir() if path.name.startswith(".")]


def test_where_it_cannot_be_kept_it_warns_and_goes_without(trained_anew, capsys):
    (trained_anew / GRAPH).write_text("a file is in the way")
    first, made = start(trained_anew)
    np.testing.assert_array_equal(m.Encoder.load(str(trained_anew), precision="fp32").encode(["语义检索"])[0],
                                  np.array(first, "float32"))
    warning = f"{trained_anew / GRAPH}: the exported graph cannot be kept there (not a directory), and every start "
    assert capsys.readouterr().err.count(warning) == 1
    assert not made and np.isfinite(first).all() and (trained_anew / GRAPH).read_text() == "a file is in the way"
    assert not [path.name for path in trained_anew.iterdir() if path.name.startswith(".")]


def test_an_originals_checkpoint(compat):
    """It has no record: the encoder is named by a flag, and its config is part of what the graph depends on."""
    flags = ["--model_name_or_path", compat / "ernie"]
    first, _ = start(compat, *flags)
    assert start(compat, *flags, "--output_emb_size", 256) == (first, False)
    line = refuse("inference.py", "--device", "cpu", "--params_path", compat, *flags, "--output_emb_size", 128)
    assert "--output_emb_size 128" in line and "has 256" in line


def test_all_code_that_shapes_the_graph_is_in_its_fingerprint():
    encoder_room = {path.name for path in (ROOT / "simcse" / "encoder").iterdir() if path.suffix == ".py"}
    assert {path.name for path in kept_graph.CODE} == encoder_room | {"model.py"}
    assert all(path.is_file() for path in kept_graph.CODE)


# --------------------------------------------------------------------------------------------------------- as a library
def test_encoder_load_gives_what_the_scripts_do(trained_anew):
    expected, _ = start(trained_anew)
    encoder = m.Encoder.load(str(trained_anew), precision="fp32")
    assert (encoder.max_seq_length, encoder.embedding_size, encoder.precision) == (32, 128, "fp32")
    np.testing.assert_array_equal(encoder.encode(["语义检索"])[0], np.array(expected, "float32"))
    assert m.Encoder.load(str(trained_anew / WEIGHTS), precision="fp32", max_seq_length=16).max_seq_length == 16


@pytest.mark.parametrize("settings, message", [
    ({"precision": "fp16"}, "--precision fp16: .* computes in fp32"),
    ({"precision": "x"}, "precision: expected auto, fp32, .*, got 'x'"),
    ({"precision": "fp32", "output_emb_size": 7}, "--output_emb_size 7: .* has 128"),
    ({"precision": "fp32", "max_seq_length": 600}, "--max_seq_length 600: the encoder has 513 positions")])
def test_encoder_load_refuses_what_it_cannot_do(trained_anew, settings, message):
    with pytest.raises(InputError, match=message):
        m.Encoder.load(str(trained_anew), **settings)


def test_what_is_no_checkpoint_or_no_export_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="model_state.pdparams: no such file"):
        m.Encoder.load(str(tmp_path))
    with pytest.raises(InputError, match="no exported graph; it has none of table.npz, inference.xml, "):
        open_engine(str(tmp_path))
    with pytest.raises(InputError, match="--precision int8: a GPU computes in fp32, fp16, bf16, tf32"):
        set_gpu_precision("int8")
