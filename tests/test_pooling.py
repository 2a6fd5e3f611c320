"""Every pooling: against its definition, and through training, checkpoint, engine and exported graphs."""

import importlib.util
import json

import model as m
import train
from data import Batch, Inputs
from simcse.console import InputError
from simcse.encoder import weights
from simcse.encoder.engine import make_engine
from simcse.encoder.paddle_engine import PaddleEngine, export_graph
from simcse.encoder.pooling import POOLINGS, describe_poolings
from simcse.encoder.table import TableEngine
from simcse.text.tokens import pad
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import paddle
import pytest
from conftest import ENCODER, ROOT
from paddlenlp.transformers import BertConfig, BertModel
from test_model import SIZES, ids, tiny


def texts_of_3_to_9_tokens():
    """Token ids, [CLS] and [SEP] included."""
    return [row[: 3 + number].tolist() for number, row in enumerate(ids(7))]


# ------------------------------------------------------------------------------------------------------- by definition
# Of one text: its pooler's output, [hidden], and of its tokens the first layer's input and all layers' outputs,
# [length, hidden] each.
DEFINITIONS = {
    "pooler": lambda pooler, layers: pooler,
    "mean": lambda pooler, layers: layers[-1][1:-1].mean(axis=0),
    "first_last_avg": lambda pooler, layers: ((layers[0] + layers[-1]) / 2)[1:-1].mean(axis=0),
    "first_avg": lambda pooler, layers: layers[0][1:-1].mean(axis=0)}


def test_every_pooling_has_a_definition():
    assert DEFINITIONS.keys() == POOLINGS.keys()


def expected_embeddings(network, pooling, texts):
    """Text by text, without padding, by an encoder of which all tokens are computed."""
    layers = network.ptm.encoder.layers
    patched = [(layer, layer.__dict__.pop("forward")) for layer in layers if "forward" in layer.__dict__]
    rows = []
    for text in texts:
        outputs = network.ptm(paddle.to_tensor([text]), output_hidden_states=True)
        rows.append(DEFINITIONS[pooling](outputs[1].numpy()[0], [layer.numpy()[0] for layer in outputs[2]]))
    for layer, forward in patched:
        layer.forward = forward
    rows = np.stack(rows) @ network.emb_reduce_linear.weight.numpy() + network.emb_reduce_linear.bias.numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["ernie", "bert"])
@pytest.mark.parametrize("pooling", DEFINITIONS)
def test_pooling_is_its_definition(pooling, kind, tmp_path):
    """Texts of three to nine tokens in one padded batch, in dynamic graph and in the static one."""
    texts = texts_of_3_to_9_tokens()
    network = tiny(pooling=pooling)
    if kind == "bert":
        network = m.SimCSE(BertModel(BertConfig(**SIZES)), output_emb_size=8, pooling=pooling)
    network.eval()
    assert len(network.ptm.encoder.layers) == network.ptm.config.num_hidden_layers == (
        0 if pooling == "first_avg" else SIZES["num_hidden_layers"])
    expected = expected_embeddings(network, pooling, texts)
    batch = pad(texts, 0)
    np.testing.assert_allclose(network.embed(*batch).numpy(), expected, atol=1e-6)
    engine = make_engine(network, "fp32")
    np.testing.assert_allclose(engine.embed(*batch), expected, atol=1e-5)
    if pooling == "first_avg":  # the graph is what is deployed
        assert isinstance(engine, TableEngine)
        export_graph(network, str(tmp_path))
        np.testing.assert_allclose(PaddleEngine(str(tmp_path), "fp32").embed(*batch), expected, atol=1e-5)
        with pytest.raises(InputError, match="--precision bf16: pooling first_avg is computed in fp32"):
            make_engine(network, "bf16")


# ------------------------------------------------------------------------------------------------ any entry of POOLINGS
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", POOLINGS)
def test_trained_saved_loaded_and_exported_it_is_the_same(name, raw, tmp_path):
    """The vectors after a step of training: of the network, the loaded checkpoint, the engine and every format."""
    if raw and POOLINGS[name].pool_without_pooler is None:
        pytest.skip("it embeds as it is trained")
    network = tiny(pooling=name, with_pooler=not raw)
    batch = pad(texts_of_3_to_9_tokens(), 0)
    before = network.embed(*batch).numpy()
    network.train()
    optimizer = paddle.optimizer.Adam(1e-2, parameters=network.parameters())
    network.loss(network(Batch(Inputs(ids()), Inputs(ids(seed=1))))).value.backward()
    optimizer.step()
    expected = network.embed(*batch).numpy()
    assert abs(expected - before).max() > 1e-3, "training changes it"

    folder = str(tmp_path / "model_1")
    m.save_checkpoint(folder, network, load_tokenizer(str(ENCODER)), m.make_record(network, "an encoder", 16))
    loaded, _, record = m.load_model(f"{folder}/{weights.PARAMS_FILE}")
    assert record["pooling"] == loaded.pooling == name
    np.testing.assert_array_equal(loaded.embed(*batch).numpy(), expected)
    np.testing.assert_allclose(make_engine(loaded, "fp32").embed(*batch), expected, atol=1e-5)
    export_graph(loaded, str(tmp_path))
    np.testing.assert_allclose(PaddleEngine(str(tmp_path), "fp32").embed(*batch), expected, atol=1e-5)
    can_export = importlib.util.find_spec("paddle2onnx") and not paddle.__version__.startswith("2.")
    if can_export and importlib.util.find_spec("onnxruntime"):
        from simcse.encoder.onnx import export_onnx, onnx_graph

        export_onnx(loaded, str(tmp_path))
        np.testing.assert_allclose(onnx_graph(str(tmp_path))(*batch), expected, atol=1e-5)
    if can_export and importlib.util.find_spec("openvino"):
        from simcse.encoder.openvino import OpenVinoEngine, export_openvino

        export_openvino(loaded, str(tmp_path))
        engine = OpenVinoEngine(str(tmp_path), "fp32")
        np.testing.assert_allclose(engine.embed(*batch), expected, atol=1e-5)


@pytest.mark.parametrize("name", POOLINGS)
def test_an_entry_says_what_its_function_reads(name):
    """Whether the pooler is used, and so trained; and that a last layer of the first token alone changes nothing."""
    network = tiny(pooling=name)
    batch = pad(texts_of_3_to_9_tokens(), 0)
    network.train()
    network.loss(network(Batch(Inputs(ids()), Inputs(ids(seed=1))))).value.backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert any("pooler" in name for name in trained) == POOLINGS[name].uses_pooler
    assert len(trained) > (20 if len(network.ptm.encoder.layers) else 5)
    before = network.embed(*batch).numpy()
    for layer in network.ptm.encoder.layers:
        layer.__dict__.pop("forward", None)
    np.testing.assert_allclose(network.embed(*batch).numpy(), before, atol=1e-6)
    network.ptm.pooler.dense.bias.set_value(network.ptm.pooler.dense.bias + 1.0)
    assert (abs(network.embed(*batch).numpy() - before).max() > 1e-3) == POOLINGS[name].uses_pooler


@pytest.mark.parametrize("name", POOLINGS)
def test_a_text_of_no_token_is_a_number(name):
    network = tiny(pooling=name)
    batch = pad([[1, 2], [1, 5, 6, 2]], 0)
    for engine in (network, make_engine(network, "fp32")):
        assert np.isfinite(np.asarray(engine.embed(*batch))).all()
        assert np.isfinite(np.asarray(engine.embed(*pad([[1, 2]], 0)))).all()


def test_an_unknown_pooling_is_an_error(tmp_path):
    """In the network, and in the record of a checkpoint."""
    with pytest.raises(ValueError, match=f"pooling 'cls' is none of {', '.join(POOLINGS)}"):
        tiny(pooling="cls")
    network, folder = tiny(), tmp_path / "model_1"
    m.save_checkpoint(str(folder), network, load_tokenizer(str(ENCODER)), m.make_record(network, "an encoder", 16))
    path = folder / weights.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "pooling": "cls"}))
    with pytest.raises(InputError, match=r"--params_path .*simcse_config.json: pooling 'cls' is none of pooler"):
        m.load_model(str(folder / weights.PARAMS_FILE))


def test_a_checkpoint_without_layers_is_not_trained_on_with_a_pooling_that_needs_them(tmp_path):
    network = tiny(pooling="first_avg")
    folder = str(tmp_path / "model_1")
    m.save_checkpoint(folder, network, load_tokenizer(str(ENCODER)), m.make_record(network, "an encoder", 16))
    with pytest.raises(InputError, match="--pooling first_avg and has no layers, which --pooling mean needs"):
        m.load_model(f"{folder}/{weights.PARAMS_FILE}", pooling="mean")


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("page, start", [("better-recall.md", "| `--pooling` |"), ("training.md", "* `--pooling`")])
def test_every_pooling_is_documented(language, page, start):
    text = (ROOT / "docs" / language / page).read_text(encoding="utf-8")
    line, = (line for line in text.splitlines() if line.startswith(start))
    assert [name for name in POOLINGS if f"`{name}`" not in line] == []


def test_the_help_of_training_describes_every_pooling_and_names_those_with_a_choice(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.parse_args()
    shown = " ".join(capsys.readouterr().out.split())
    assert describe_poolings() in shown
    assert "for --pooling pooler: evaluation and later stages use the pooler and the fc" in shown
