"""The figures that the original's scripts gave, recorded once: vectors, scores, losses, a training run, a recall."""

import json

import model as m
from simcse.encoder.encoder import Encoder
from simcse.text.textfile import read_text_pairs

import numpy as np
import paddle
import pytest
from conftest import ROOT, read_texts, succeed


@pytest.fixture(scope="module")
def flags(compat):
    return ["--params_path", compat / "model_state.pdparams", "--model_name_or_path", compat / "ernie",
            "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def expected(compat):
    return json.loads((compat / "expected.json").read_text())


def test_vectors(compat, flags, tmp_path):
    succeed("inference.py", *flags, "--input_file", compat / "titles.txt", "--output_file", tmp_path / "v.npy",
            "--max_seq_length", 60)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), np.load(compat / "title_embeddings.npy"), atol=1e-5)


def test_exported_vectors(compat, flags, tmp_path):
    succeed("export_model.py", *flags[:4], "--output_path", tmp_path / "output")
    succeed("deploy/python/predict.py", "--model_dir", tmp_path / "output", "--device", "cpu", "--max_seq_length", 60,
            "--precision", "fp32", "--input_file", compat / "titles.txt", "--output_file", tmp_path / "v.npy")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), np.load(compat / "title_embeddings.npy"), atol=1e-5)


def test_pair_scores(compat, flags, expected):
    result = succeed("predict.py", *flags, "--text_pair_file", compat / "pairs.tsv", "--output_emb_size", 256)
    scores = [float(line) for line in result.stdout.splitlines()]
    np.testing.assert_allclose(scores, expected["pair_scores"], atol=1e-5)


def test_losses(compat, expected):
    network, tokenizer, _ = m.load_model(str(compat / "model_state.pdparams"), str(compat / "ernie"))
    pairs = read_text_pairs(str(compat / "dev.csv"), "--flag")[:32]
    query, title = Encoder(network, tokenizer, 64, 32).encode_pairs(pairs)
    (losses,) = (value for key, value in expected.items() if key.startswith("eval_mode_losses"))
    assert len(losses) == 4
    for name, loss in losses.items():
        setting = dict(part.split("=") for part in name.split(","))
        got = m.mean_loss(query, title, 32, float(setting["margin"]), float(setting["scale"]))
        assert got == pytest.approx(loss, rel=1e-4), name


def test_recall_result(compat, flags, tmp_path):
    succeed("recall.py", *flags, "--corpus_file", compat / "corpus.csv", "--similar_text_pair", compat / "dev.csv",
            "--hnsw_m", 100, "--hnsw_ef", 100, "--recall_num", 50, "--max_seq_length", 60, "--batch_size", 64,
            cwd=tmp_path)
    got, want = ([line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()] for path in (
        tmp_path / "recall_result_dir" / "recall_result.txt", compat / "recall_result.txt"))
    assert len(got) == len(want) == 10000
    assert [line[0] for line in got] == [line[0] for line in want]
    scores = np.array([float(line[2]) for line in want])
    np.testing.assert_allclose([float(line[2]) for line in got], scores, atol=1e-5)
    # Neighbours whose scores differ by no more than 1e-5 may change places.
    gaps = np.abs(np.diff(scores)) > 1e-5
    clear = np.r_[True, gaps] & np.r_[gaps, True]
    assert clear.mean() > 0.8
    assert [got[i][1] for i in np.flatnonzero(clear)] == [want[i][1] for i in np.flatnonzero(clear)]
    evaluated = succeed("evaluate.py", "--similar_text_pair", compat / "dev.csv", cwd=tmp_path).stdout
    assert evaluated == "".join(f"recall@{k}=100.0\n" for k in (1, 5, 10, 20, 50))


def test_training(compat, tmp_path, request):
    """The steps of the original, each loss and the vectors after them; dropout is off, the order is Paddle's. The first
    ten of the 50, and no vectors, unless --slow is given."""
    slow = request.config.getoption("--slow")
    steps = 50 if slow else 10
    recorded = json.loads((compat / "training.json").read_text())
    settings = recorded["settings"]
    flags = [f"--{name}={settings[name]}" for name in (
        "batch_size", "learning_rate", "weight_decay", "warmup_proportion", "epochs", "max_seq_length", "dropout",
        "output_dropout", "scale", "margin", "output_emb_size")]
    # train.py as it is, with every loss written down on its way, and its end after so many.
    (tmp_path / "observe.py").write_text(
        f"import json, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport model\n"
        "formula, losses = model.contrastive_loss, []\n"
        "def observed(*args, **named):\n    loss = formula(*args, **named)\n    losses.append(float(loss))\n"
        f"    if len(losses) == {steps} < 50:\n        sys.exit()\n    return loss\n"
        "model.contrastive_loss = observed\nsys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    json.dump(losses, open('losses.json', 'w'))\n")
    succeed(tmp_path / "observe.py", ROOT / "train.py", "--device", "cpu", "--init_from_ckpt",
            compat / "model_state.pdparams", "--model_name_or_path", compat / "ernie", "--train_set_file",
            compat / "corpus.csv", "--infer_with_fc_pooler", *flags, cwd=tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text())
    np.testing.assert_allclose(losses, recorded["loss_at_step"][:steps], rtol=1e-3)
    if not slow:
        return
    network, tokenizer, _ = m.load_model(str(tmp_path / "checkpoints" / "model_50" / "model_state.pdparams"))
    vectors = Encoder(network, tokenizer, 60, 64).encode(read_texts(compat / "titles.txt"))
    np.testing.assert_allclose(vectors, np.load(compat / "title_embeddings_after_training.npy"), atol=1e-3)


def test_the_checkpoint_needs_no_flags_beside_its_encoder(compat):
    """What the original saved: no simcse_config.json; output_emb_size is read off the tensors."""
    network, _, record = m.load_model(str(compat / "model_state.pdparams"), str(compat / "ernie"))
    assert network.output_emb_size == 256 and record["with_pooler"] is True
    assert set(paddle.load(str(compat / "model_state.pdparams"))) == set(network.state_dict())
