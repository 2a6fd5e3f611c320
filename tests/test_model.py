"""The network, its loss and its checkpoints, function by function, on a tiny encoder with random weights."""

import errno
import json
import os
import pickle
from dataclasses import asdict

import model as m
from data import Batch, Inputs
from simcse import console
from simcse.console import InputError
from simcse.encoder import paddle_patches, pretrained, weights
from simcse.encoder.encoder import Encoder
from simcse.encoder.engine import make_engine
from simcse.flags import checkpoint_file
from simcse.text.tokens import pad
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import paddle
import paddlenlp
import pytest
from conftest import ENCODER
from paddlenlp.transformers import BertConfig, BertModel, ErnieConfig, ErnieModel

SIZES = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 40}


def tiny(output_emb_size=8, dropout=0.0, encoder_dropout=0.0, **options):
    paddle.seed(1)
    config = ErnieConfig(hidden_dropout_prob=encoder_dropout, attention_probs_dropout_prob=encoder_dropout, **SIZES)
    return m.SimCSE(ErnieModel(config), dropout=dropout, output_emb_size=output_emb_size, **options)


def ids(rows=6, length=9, seed=0):
    return np.random.default_rng(seed).integers(1, 200, (rows, length))


def tensors(*arrays):
    return [paddle.to_tensor(array) for array in arrays]


def test_parameter_names_are_the_originals():
    names = set(tiny().state_dict())
    assert {"emb_reduce_linear.weight", "emb_reduce_linear.bias", "ptm.pooler.dense.weight"} <= names
    assert all(name.startswith(("ptm.", "emb_reduce_linear.")) for name in names)
    for none in (None, 0):
        network = tiny(output_emb_size=none)
        assert not any("emb_reduce_linear" in name for name in network.state_dict())
        assert network.embed(ids(), np.zeros_like(ids())).shape == (6, 16)


@pytest.mark.parametrize("with_pooler", [True, False])
@pytest.mark.parametrize("size", [0, 8])
def test_embedding_is_first_token_pooler_fc_norm(with_pooler, size):
    network = tiny(output_emb_size=size)
    network.eval()
    (batch,) = tensors(ids())
    sequence, pooled = network.ptm(batch)
    expected = (pooled if with_pooler else sequence[:, 0]).numpy()
    if size:
        expected = expected @ network.emb_reduce_linear.weight.numpy() + network.emb_reduce_linear.bias.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = network.get_pooled_embedding(batch, with_pooler=with_pooler).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)
    network.with_pooler = with_pooler
    np.testing.assert_allclose(network.embed(ids(), np.zeros_like(ids())), expected, atol=1e-6)


def test_loss_is_equation_1():
    """Against the formula written out in numpy."""
    random = np.random.default_rng(0)
    query, title = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in random.standard_normal((2, 5, 8)))
    for margin, scale in ((0.0, 20), (0.2, 20), (0.3, 1)):
        logits = scale * (query @ title.T - margin * np.eye(5))
        expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))
        settings = m.LossSettings(margin, scale)
        assert float(m.contrastive_loss(*tensors(query, title), settings)) == pytest.approx(expected, rel=1e-6)
        assert m.mean_loss(query, title, 5, margin, scale) == pytest.approx(expected, rel=1e-6)
        halves = [m.mean_loss(query[part], title[part], 9, margin, scale) for part in (slice(0, 3), slice(3, 5))]
        assert m.mean_loss(query, title, 3, margin, scale) == pytest.approx(np.dot(halves, [0.6, 0.4]), rel=1e-6)


def test_loss_of_no_number_is_no_number():
    vectors = np.ones((4, 2), "float32")
    vectors[1] = np.nan
    assert np.isnan(float(m.contrastive_loss(*tensors(vectors, vectors), m.LossSettings())))


def test_one_pass_of_both_views_equals_two():
    """Loss and gradients, dropout off: the forward pass of 2B rows against one pass for each side."""
    gradients, losses, settings = [], [], m.LossSettings(margin=0.1)
    (batch,) = tensors(ids())
    for together in (True, False):
        network = tiny(loss_settings=settings)
        if together:
            loss = network.loss(network(Batch(Inputs(batch), Inputs(batch)))).value
        else:
            query, title = network.get_pooled_embedding(batch), network.get_pooled_embedding(batch)
            loss = m.contrastive_loss(query, title, settings)
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, gradients[1][name], atol=1e-5, err_msg=name)


def test_sides_of_other_lengths_and_cosine_sim():
    network = tiny()
    network.eval()
    query, title = ids(length=5), ids(length=9, seed=1)
    cosine = network.cosine_sim(*tensors(query, title)).numpy()
    expected = (network.embed(query, query * 0) * network.embed(title, title * 0)).sum(axis=1)
    np.testing.assert_allclose(cosine, expected, atol=1e-6)


def test_texts_of_one_group_are_seen_under_two_dropouts(monkeypatch):
    """And without dropout each is itself, in its place."""
    monkeypatch.setitem(m.PASS_TOKENS, "cpu", 0)
    network = tiny(dropout=0.5)
    batch, _ = pad([row[: 3 + number % 4].tolist() for number, row in enumerate(ids(8))], 0)
    for mode in (network.train, network.eval):
        mode()
        query, title, _ = network(Batch(Inputs(batch), Inputs(batch)))
        cosines = (query * title).sum(axis=-1).numpy()
        assert (cosines < 0.999).all() if network.training else (cosines > 0.999).all()
    np.testing.assert_allclose(query.numpy(), network.embed(batch, batch * 0).numpy(), atol=1e-6)


def test_dropout_makes_two_views():
    network = tiny(dropout=0.5)
    network.train()
    (batch,) = tensors(ids())
    a, b = network.get_pooled_embedding(batch), network.get_pooled_embedding(batch)
    assert float((a * b).sum(axis=-1).mean()) < 0.99
    assert m.SimCSE(network.ptm).dropout.p == 0.1 and m.SimCSE(network.ptm, dropout=0.0).dropout.p == 0.0


def test_padding_and_batching_change_nothing():
    tokenizer, texts = load_tokenizer(str(ENCODER)), ["语义索引", "召回一批语义相关的文本" * 3, "短", "SimCSE"] * 3
    network = m.SimCSE(pretrained.load_pretrained(str(ENCODER)), output_emb_size=32)
    one_by_one = Encoder(network, tokenizer, 24, 1).encode(texts)
    np.testing.assert_allclose(Encoder(network, tokenizer, 24, 5).encode(texts), one_by_one, atol=1e-5)
    assert one_by_one.shape == (12, 32) and one_by_one.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(one_by_one, axis=1), 1, atol=1e-5)
    with pytest.raises(InputError, match="--max_seq_length 514.*513 positions"):
        Encoder(network, tokenizer, 514)


# ---------------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture
def saved(tmp_path):
    network = tiny(loss_settings=m.LossSettings(margin=0.25, scale=7))
    network.with_pooler = False
    folder = tmp_path / "model_1"
    m.save_checkpoint(str(folder), network, load_tokenizer(str(ENCODER)),
                            m.make_record(network, "an encoder", 48))
    return network, folder


def test_round_trip(saved):
    network, folder = saved
    loaded, _, record = m.load_model(str(folder / weights.PARAMS_FILE))
    np.testing.assert_array_equal(loaded.embed(ids(), ids() * 0), network.embed(ids(), ids() * 0))
    assert loaded.loss_settings == m.LossSettings(margin=0.25, scale=7)
    assert asdict(loaded.loss_settings).items() <= record.items(), "a checkpoint records every setting of the loss"
    assert (loaded.with_pooler, loaded.output_emb_size) == (False, 8)
    assert record["model_name_or_path"] == "an encoder" and record["max_seq_length"] == 48
    assert sorted(path.name for path in folder.iterdir()) == [
        "model_state.pdparams", "simcse_config.json", "tokenizer_config.json", "vocab.txt"]
    assert [path.name for path in folder.parent.iterdir()] == ["model_1"], "no temporary folder is left"


def test_a_record_older_than_a_setting_of_the_loss_counts_as_its_default():
    assert m.recorded_loss_settings({"scale": 7, "pooling": "mean"}) == m.LossSettings(scale=7)
    assert m.recorded_loss_settings({}) == m.LossSettings()


def test_settings_of_the_loss_are_checked_when_a_record_is_read():
    assert asdict(m.LossSettings()).keys() <= weights.RECORD_FIELDS.keys()


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("ptm.pooler.dense.bias"), r"missing: ptm\.pooler\.dense\.bias"),
    (lambda s: s.update({"ptm.extra": s["ptm.pooler.dense.bias"]}), r"unexpected: ptm\.extra"),
    (lambda s: s.update({"ptm.pooler.dense.bias": paddle.zeros([3])}),
     r"wrongly shaped: ptm\.pooler\.dense\.bias \[3\] instead of \[16\]"),
    (lambda s: s.pop("emb_reduce_linear.bias"), r"missing: emb_reduce_linear\.bias"),
    (lambda s: [s.pop(name) for name in list(s) if name.startswith("ptm.")], "not a SimCSE checkpoint")])
def test_loading_is_strict(saved, change, message):
    path = str(saved[1] / weights.PARAMS_FILE)
    state = paddle.load(path)
    change(state)
    paddle.save(state, path)
    with pytest.raises(InputError, match=message):
        m.load_model(path)


@pytest.mark.parametrize("size", [0, 16])
def test_a_contradicting_output_emb_size_is_an_error(saved, size):
    with pytest.raises(InputError, match=f"--output_emb_size {size}.* has 8"):
        m.load_model(str(saved[1] / weights.PARAMS_FILE), output_emb_size=size)
    assert m.load_model(str(saved[1] / weights.PARAMS_FILE), output_emb_size=8)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2])])
def test_a_damaged_checkpoint_is_an_input_error(saved, content):
    path = saved[1] / weights.PARAMS_FILE
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a .*checkpoint"):
        m.load_model(str(path))


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    network, folder = saved
    before = (folder / weights.PARAMS_FILE).read_bytes()
    monkeypatch.setattr(m, "write_record", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        m.save_checkpoint(str(folder), tiny(), None, {})
    assert (folder / weights.PARAMS_FILE).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["model_1"]


def test_weights_of_another_file_do_not_outlive_a_save(saved):
    """They would be loaded instead of the new ones; other files of the user's stay."""
    network, folder = saved
    weights.write_weights(str(folder / "model_state.safetensors"), weights.read_weights(
        str(folder / weights.PARAMS_FILE), "--flag"))
    (folder / "notes.txt").write_text("kept")
    m.save_checkpoint(str(folder), network, load_tokenizer(str(ENCODER)), {})
    assert checkpoint_file(str(folder)) == str(folder / weights.PARAMS_FILE)
    assert (folder / "notes.txt").read_text() == "kept"


def test_another_encoder_of_automodel(tmp_path):
    """BERT, with vocabulary and config in a folder, as a checkpoint from which later stages need nothing else."""
    encoder = BertModel(BertConfig(**SIZES))
    encoder.save_pretrained(str(tmp_path / "bert"))
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(0x4E00, 0x4E00 + 195))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (tmp_path / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    network = m.SimCSE(pretrained.load_pretrained(str(tmp_path / "bert"), dropout=0.3), output_emb_size=4)
    assert network.ptm.config.hidden_dropout_prob == 0.3 and type(network.ptm).__name__ == "BertModel"
    tokenizer = load_tokenizer(str(tmp_path / "bert"))
    m.save_checkpoint(str(tmp_path / "ck"), network, tokenizer,
                            m.make_record(network, str(tmp_path / "bert"), 32))
    os.rename(tmp_path / "bert", tmp_path / "gone")
    loaded, tokenizer, _ = m.load_model(str(tmp_path / "ck" / weights.PARAMS_FILE))
    texts = ["一丁七", "万"]
    got, expected = (Encoder(each, tokenizer, 16, 2).encode(texts) for each in (loaded, network))
    np.testing.assert_array_equal(got, expected)


def test_an_encoder_with_missing_layers_is_an_error(tmp_path, capsys):
    encoder = ErnieModel(ErnieConfig(**SIZES))
    encoder.save_pretrained(str(tmp_path))
    path = str(tmp_path / "model_state.pdparams")
    state = paddle.load(path)
    no_pooler = {name: value for name, value in state.items() if "pooler" not in name}
    paddle.save(no_pooler, path)
    pretrained.load_pretrained(str(tmp_path))
    assert "has no trained pooler" in capsys.readouterr().err
    pretrained.load_pretrained(str(tmp_path), uses_pooler=False)
    assert capsys.readouterr().err == "", "nobody reads it"
    paddle.save({name: value for name, value in no_pooler.items() if "layers.1.linear1" not in name}, path)
    for uses_pooler in (True, False):
        with pytest.raises(InputError, match=r"lack .*layers\.1\.linear1"):
            pretrained.load_pretrained(str(tmp_path), uses_pooler=uses_pooler)


def raise_after(cause, error):
    """Raise an error while another one is handled, as paddlenlp does."""
    try:
        raise cause
    except type(cause):
        raise error  # noqa: B904


@pytest.mark.parametrize("cause, error, reason", [
    (KeyError(), OSError("Can't load the model\nMore"), "neither a folder with an encoder nor one that can be fetched "
     "by that name: Can't load the model"),
    (OSError(errno.ENOSPC, "No space left on device"), OSError("Can't load the model"),
     "cannot be loaded: [Errno 28] No space left on device"),
    (KeyError(), MemoryError(), "cannot be loaded: out of memory: MemoryError"),
    (KeyError(), ValueError("config.json: no JSON"), "cannot be loaded: config.json: no JSON")])
def test_only_an_encoder_that_is_not_found_is_called_so(monkeypatch, cause, error, reason):
    monkeypatch.setattr(console.settings, "memory_flags", ())
    monkeypatch.setattr(paddlenlp.transformers.AutoModel, "from_pretrained",
                        lambda *_, **__: raise_after(cause, error))
    with pytest.raises(InputError) as raised:
        pretrained.load_pretrained("a-name")
    assert str(raised.value) == f"--model_name_or_path a-name: {reason}"


def test_weights_under_another_name_are_an_error_with_advice(monkeypatch, tmp_path):
    (tmp_path / "bert.safetensors").touch()
    monkeypatch.setattr(paddlenlp.transformers.AutoModelForMaskedLM, "from_pretrained",
                        lambda *_, **__: raise_after(KeyError(), OSError("no metadata")))
    with pytest.raises(InputError, match=r": cannot be loaded; bert\.safetensors may have weights of Hugging Face "
                                         r"transformers: name.*\(PaddleNLP says: no metadata\)$"):
        pretrained.load_pretrained(str(tmp_path), kind=pretrained.MASKED_LM)


def test_record_is_plain_json(saved):
    record = json.loads((saved[1] / weights.CONFIG_FILE).read_text(encoding="utf-8"))
    assert record["encoder_class"] == "ErnieModel" and record["versions"]["paddlepaddle"] == paddle.__version__
    for content, message in (("{", "not valid JSON"), ("[]", "not a JSON object")):
        (saved[1] / weights.CONFIG_FILE).write_text(content)
        with pytest.raises(InputError, match=f"simcse_config.json: {message}"):
            m.load_model(str(saved[1] / weights.PARAMS_FILE))


@pytest.mark.parametrize("field, value, message", [
    ("max_seq_length", "x", 'max_seq_length: expected an integer >= 3 or null, got "x"'),
    ("max_seq_length", -5, "max_seq_length: expected an integer >= 3 or null, got -5"),
    ("max_positions", True, "max_positions: expected an integer >= 3, got true"),
    ("scale", [1], r"scale: expected a number >= 0, got \[1\]"),
    ("encoder_config", 5, "encoder_config: expected an object, got 5"),
    ("encoder_config", {"hidden_size": "x"}, "encoder_config: no ErnieModel can be made of it: "),
    ("encoder_class", "Ernie", "encoder_class: paddlenlp has no encoder Ernie"),
    ("encoder_class", None, "encoder_class: expected a string, got null"),
    ("pooling", "median", "pooling 'median' is none of pooler")])
def test_an_odd_value_in_a_record_is_an_input_error(saved, field, value, message):
    path = saved[1] / weights.CONFIG_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, field: value}), encoding="utf-8")
    with pytest.raises(InputError, match=f"simcse_config.json: {message}"):
        m.load_model(str(saved[1] / weights.PARAMS_FILE))


def test_a_record_that_lacks_the_encoder_is_an_input_error(saved):
    path = saved[1] / weights.CONFIG_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["encoder_class"]
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="simcse_config.json: encoder_class is missing"):
        m.load_model(str(saved[1] / weights.PARAMS_FILE))


def test_a_checkpoint_of_the_other_stack_loads(saved):
    """paddlenlp 3 writes a quantization_config that paddlenlp 2.8 does not read, and may others."""
    network, folder = saved
    path = folder / weights.CONFIG_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    assert "quantization_config" not in record["encoder_config"]
    record["encoder_config"]["quantization_config"] = {"of_another_version": "dynamic"}
    path.write_text(json.dumps(record), encoding="utf-8")
    loaded, _, _ = m.load_model(str(folder / weights.PARAMS_FILE))
    np.testing.assert_array_equal(loaded.embed(ids(), ids() * 0), network.embed(ids(), ids() * 0))


def test_last_layer_of_first_token_changes_nothing():
    """Output, gradients and recomputation against the untouched encoder."""
    network, whole = tiny(), tiny()
    for layer in whole.ptm.encoder.layers:
        layer.__dict__.pop("forward", None)
    batch, types = tensors(ids(), ids() * 0)
    padded = paddle.concat([batch, paddle.zeros([6, 3], "int64")], axis=1)
    assert network.ptm(padded)[0].shape == [6, 1, 16] and whole.ptm(padded)[0].shape == [6, 12, 16]
    results = []
    for each in (network, whole):
        loss = each.loss(each(Batch(Inputs(padded), Inputs(padded)))).value
        loss.backward()
        results.append((float(loss), {name: p.grad.numpy() for name, p in each.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        np.testing.assert_allclose(gradient, results[1][1][name], atol=1e-5, err_msg=name)


def test_an_encoder_of_another_kind_is_left_alone():
    class Encoder(paddle.nn.Layer):
        pass

    paddle_patches.compute_first_token_only(Encoder())
    pre_norm = Encoder()
    pre_norm.encoder = paddle.nn.TransformerEncoder(
        paddle.nn.TransformerEncoderLayer(16, 2, 32, normalize_before=True), 2)
    paddle_patches.compute_first_token_only(pre_norm)
    assert "forward" not in pre_norm.encoder.layers[-1].__dict__


def test_fast_bias_gradients_are_the_same():
    from simcse.encoder import paddle_patches

    gradients = []
    (batch,) = tensors(ids())
    for fast in (True, False):
        network = tiny()
        if fast:
            paddle_patches.train_faster_on_cpu(network)
            assert sum("forward" in layer.__dict__ for layer in network.sublayers()) > 10
        network.loss(network(Batch(Inputs(batch), Inputs(batch)))).value.backward()
        gradients.append({name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, gradients[1][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["ernie", "bert"])
def test_engine_is_the_network(kind):
    """Paddle Inference on float32 against the dynamic graph, dropout left as it was; streamed like encoded."""
    tokenizer, texts = load_tokenizer(str(ENCODER)), ["语义索引" * n for n in range(1, 30)]
    sizes = {**SIZES, "vocab_size": 17964}
    encoder = ErnieModel(ErnieConfig(**sizes)) if kind == "ernie" else BertModel(BertConfig(**sizes))
    network = m.SimCSE(encoder, output_emb_size=8)
    engine = make_engine(network, "fp32")
    assert engine.embedding_size == 8 and engine.max_positions == 40 and network.dropout.p == 0.1
    assert encoder.encoder.layers[0].dropout1.p == 0.1 and encoder.encoder.layers[0].self_attn.dropout == 0.1
    expected = Encoder(network, tokenizer, 30).encode(texts)
    encoder = Encoder(engine, tokenizer, 30)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simcse.encoder.encoder.WINDOW", 11)
        blocks = list(encoder.stream(texts))
    assert [len(block) for block in blocks] == [11, 11, 7]
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-5)
    assert encoder.encode([]).shape == (0, 8)
