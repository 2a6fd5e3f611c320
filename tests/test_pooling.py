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
from simcse.encoder.table import TableEngine, TokenTable, token_fractions, write_table
from simcse.text.tokens import pad
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import paddle
import pytest
from conftest import ENCODER, ROOT
from paddlenlp.transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, ErnieConfig, ErnieModel
from test_model import SIZES, ids, tiny


def texts_of_3_to_9_tokens():
    """Token ids, [CLS] and [SEP] included."""
    return [row[: 3 + number].tolist() for number, row in enumerate(ids(7))]


# ------------------------------------------------------------------------------------------------------- by definition
# Of one text: its pooler's output, [hidden]; of its tokens the first layer's input and all layers' outputs, and what
# goes into the first layer without positions, [length, hidden] each.
DEFINITIONS = {
    "pooler": lambda pooler, layers, tokens: pooler,
    "cls": lambda pooler, layers, tokens: layers[-1][0],
    "mean": lambda pooler, layers, tokens: layers[-1][1:-1].mean(axis=0),
    "mean_all": lambda pooler, layers, tokens: layers[-1].mean(axis=0),
    "first_last_avg": lambda pooler, layers, tokens: ((layers[0] + layers[-1]) / 2)[1:-1].mean(axis=0),
    "first_avg": lambda pooler, layers, tokens: tokens[1:-1].mean(axis=0)}


def test_every_pooling_has_a_definition():
    assert DEFINITIONS.keys() == POOLINGS.keys()


def make_encoder(kind):
    """The same weights each time."""
    paddle.seed(1)
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**sizes)) if kind == "bert" else ErnieModel(ErnieConfig(**sizes))


def normed_tokens(encoder, text):
    """The layer norm of token, token type 0 and the mean position, by numpy."""
    tables = {name: tensor.numpy() for name, tensor in encoder.embeddings.state_dict().items()}
    rows = tables["word_embeddings.weight"][text]
    rows = rows + tables["position_embeddings.weight"].mean(axis=0) + tables["token_type_embeddings.weight"][0]
    if "task_type_embeddings.weight" in tables:
        rows = rows + tables["task_type_embeddings.weight"][0]
    rows = rows - rows.mean(axis=1, keepdims=True)
    rows = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + encoder.embeddings.layer_norm._epsilon)
    return rows * tables["layer_norm.weight"] + tables["layer_norm.bias"]


def expected_embeddings(encoder, network, texts):
    """Text by text, without padding, by an encoder of which all tokens are computed, and the network's fc."""
    encoder.eval()
    rows = []
    for text in texts:
        outputs = encoder(paddle.to_tensor([text]), output_hidden_states=True)
        layers = [layer.numpy()[0] for layer in outputs[2]]
        rows.append(DEFINITIONS[network.pooling](outputs[1].numpy()[0], layers, normed_tokens(encoder, text)))
    rows = np.stack(rows) @ network.emb_reduce_linear.weight.numpy() + network.emb_reduce_linear.bias.numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["ernie", "bert"])
@pytest.mark.parametrize("pooling", DEFINITIONS)
def test_pooling_is_its_definition(pooling, kind, tmp_path):
    """Texts of three to nine tokens in one padded batch, in dynamic graph and in the static one."""
    texts = texts_of_3_to_9_tokens()
    network = m.SimCSE(make_encoder(kind), output_emb_size=8, pooling=pooling)
    network.eval()
    assert network.ptm.config.num_hidden_layers == (0 if pooling == "first_avg" else SIZES["num_hidden_layers"])
    expected = expected_embeddings(make_encoder(kind), network, texts)
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
def test_training_reaches_what_the_pooling_uses(name):
    """Of the layers and the pooler."""
    network = tiny(pooling=name)
    network.train()
    network.loss(network(Batch(Inputs(ids()), Inputs(ids(seed=1))))).value.backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert any("pooler" in name for name in trained) == POOLINGS[name].uses_pooler
    if POOLINGS[name].removes_layers:
        assert len(trained) == 5, "the table, its norm, the fc"
    else:
        assert len(trained) > 20


@pytest.mark.parametrize("name", [name for name, pooling in POOLINGS.items() if not pooling.removes_layers])
def test_an_entry_says_what_its_function_reads(name):
    """A last layer of the first token alone changes nothing, and the pooler changes what uses it."""
    network = tiny(pooling=name)
    batch = pad(texts_of_3_to_9_tokens(), 0)
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
    with pytest.raises(ValueError, match=f"pooling 'median' is none of {', '.join(POOLINGS)}"):
        tiny(pooling="median")
    network, folder = tiny(), tmp_path / "model_1"
    m.save_checkpoint(str(folder), network, load_tokenizer(str(ENCODER)), m.make_record(network, "an encoder", 16))
    path = folder / weights.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "pooling": "median"}))
    with pytest.raises(InputError, match=r"--params_path .*simcse_config.json: pooling 'median' is none of pooler"):
        m.load_model(str(folder / weights.PARAMS_FILE))


def test_a_checkpoint_without_layers_is_not_trained_on_with_a_pooling_that_needs_them(tmp_path):
    network = tiny(pooling="first_avg")
    folder = str(tmp_path / "model_1")
    m.save_checkpoint(folder, network, load_tokenizer(str(ENCODER)), m.make_record(network, "an encoder", 16))
    with pytest.raises(InputError, match="--pooling first_avg and has no layers, which --pooling mean needs"):
        m.load_model(f"{folder}/{weights.PARAMS_FILE}", pooling="mean")


def test_a_table_is_trained_as_the_sum_over_all_its_tokens_is(monkeypatch):
    """The loss and all gradients of the sparse product, against those through the embeddings of padded texts."""
    gradients = {}
    for sparse in (True, False):
        if not sparse:
            monkeypatch.setattr(TokenTable, "can_average", lambda table: False)
        network = tiny(pooling="first_avg")
        network.train()
        assert network._pools_by_table() == sparse
        sides = [Inputs(pad([row[:length].tolist() for row, length in zip(ids(6, seed=seed), lengths)], 0)[0])
                 for seed, lengths in [(0, [3, 9, 2, 5, 5, 8]), (1, [9, 4, 4, 3, 7, 6])]]
        value = network.loss(network(Batch(*sides))).value
        value.backward()
        gradients[sparse] = {"loss": value.numpy()}
        gradients[sparse] |= {name: tensor.grad.numpy() for name, tensor in network.named_parameters()}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        np.testing.assert_allclose(gradient, gradients[False][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_token_like_padding_within_a_text_leaves_its_sep_in_place():
    """A tokenizer may give the padding's id to a text that spells it out."""
    fractions = token_fractions(np.array([[1, 7, 0, 8, 2], [1, 7, 2, 0, 0], [1, 2, 0, 0, 0]]), 0, 10).toarray()
    expected = np.zeros((3, 10))
    expected[0, [7, 8]] = 0.5
    expected[1, 7] = 1
    np.testing.assert_array_equal(fractions, expected)


def test_tables_and_layers_leave_out_the_same_tokens(monkeypatch):
    """Padding within a text, too, where the norm has a bias that makes its row other than 0."""
    network = tiny(pooling="first_avg")
    network.ptm.layer_norm.bias.set_value(network.ptm.layer_norm.bias + 1.0)
    network.eval()
    batch = pad([[1, 7, 0, 8, 2], [1, 7, 2], [1, 9, 8, 7, 2]], 0)
    by_table = network.embed(*batch).numpy()
    monkeypatch.setattr(TokenTable, "can_average", lambda table: False)
    np.testing.assert_allclose(network.embed(*batch).numpy(), by_table, atol=1e-6)


def test_a_token_beyond_the_table_is_refused():
    with pytest.raises(InputError, match="token ids go from 5 to 10; the encoder has 10 tokens"):
        token_fractions(np.array([[1, 5, 10, 2]]), 0, 10)


def test_an_encoder_that_adds_more_to_its_tokens_is_refused():
    """The table would leave it out without a word."""
    encoder = ErnieModel(ErnieConfig(**SIZES))
    encoder.embeddings.glyph_embeddings = paddle.nn.Embedding(8, SIZES["hidden_size"])
    with pytest.raises(InputError, match="ErnieModel also adds glyph_embeddings.weight to its token embeddings"):
        m.SimCSE(encoder, pooling="first_avg")
    with pytest.raises(InputError, match="ErnieModel has task_id 1; only task 0 is supported"):
        m.SimCSE(ErnieModel(ErnieConfig(use_task_id=True, task_id=1, **SIZES)), pooling="first_avg")


def test_a_table_leaves_the_config_of_its_encoder_as_it_was():
    encoder = ErnieModel(ErnieConfig(**SIZES))
    assert TokenTable(encoder).config.num_hidden_layers == 0
    assert encoder.config.num_hidden_layers == SIZES["num_hidden_layers"]


def test_dropout_of_tokens_is_drawn_for_each_place():
    """So that there is no sum over equal tokens to take."""
    network = tiny(pooling="first_avg", encoder_dropout=0.5)
    network.eval()
    assert network._pools_by_table(), "evaluation drops nothing"
    network.train()
    assert not network._pools_by_table()


def test_layers_leave_a_checkpoint_of_another_pooling(tmp_path):
    """Its table is that of the encoder that was trained."""
    network = tiny(pooling="mean")
    folder = str(tmp_path / "model_1")
    m.save_checkpoint(folder, network, load_tokenizer(str(ENCODER)), m.make_record(network, "an encoder", 16))
    loaded = m.load_model(f"{folder}/{weights.PARAMS_FILE}", pooling="first_avg").model
    texts = texts_of_3_to_9_tokens()
    expected = expected_embeddings(network.ptm, loaded, texts)
    np.testing.assert_allclose(loaded.embed(*pad(texts, 0)).numpy(), expected, atol=1e-6)


def test_a_table_with_positions_is_refused(tmp_path):
    """A checkpoint and an exported folder of earlier versions: their vectors were others."""
    network, folder = tiny(pooling="mean"), str(tmp_path / "model_1")
    record = {**m.make_record(network, "an encoder", 16), "pooling": "first_avg"}
    m.save_checkpoint(folder, network, load_tokenizer(str(ENCODER)), record)
    with pytest.raises(InputError, match="was made by an earlier version, in which --pooling first_avg had"):
        m.load_model(f"{folder}/{weights.PARAMS_FILE}")
    exported = tmp_path / "exported"
    exported.mkdir()
    assert write_table(tiny(pooling="first_avg"), str(exported))
    np.savez(exported / weights.TABLE_FILE, tokens=np.zeros((2, 2)), positions=np.zeros((2, 2)))
    with pytest.raises(InputError, match=f"{weights.TABLE_FILE}: a table of an earlier version; train and export it"):
        TableEngine(str(exported))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", None])
def test_a_damaged_table_is_one_line(tmp_path, content):
    assert write_table(tiny(pooling="first_avg"), str(tmp_path))
    path = tmp_path / weights.TABLE_FILE
    if content is None:
        np.savez(path, embeddings=np.zeros((2, 2)), shift=np.zeros(2), pad=0, normalizes=True)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{weights.TABLE_FILE}: damaged: .*; export it again"):
        TableEngine(str(tmp_path))


def test_an_encoder_whose_layers_cannot_go_is_refused():
    """ELECTRA's token embeddings are smaller than its layers."""
    with pytest.raises(InputError, match="--pooling: ElectraModel has no token embeddings that can be used without"):
        m.SimCSE(ElectraModel(ElectraConfig(embedding_size=8, **SIZES)), pooling="first_avg")


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
