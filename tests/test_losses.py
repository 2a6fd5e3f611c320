"""The losses of training against formulas written out in numpy, and poolings against their definitions."""

import model as m
from data import Batch, DuplicateKeys, Inputs
from simcse.console import InputError
from simcse.encoder.engine import make_engine
from simcse.encoder.paddle_engine import CpuEngine, export_graph
from simcse.encoder.table import TableEngine
from simcse.flags import POOLINGS
from simcse.text.tokens import pad

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import BertConfig, BertModel
from test_model import SIZES, ids, tensors, tiny


def vectors(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def cross_entropy(logits):
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))


# ---------------------------------------------------------------------------------------------------------- losses
def test_hard_negatives_are_more_candidates():
    query, title, negative = vectors(3, 5, 8)
    logits = 20 * (query @ np.concatenate([title, negative]).T - 0.1 * np.eye(5, 10))
    query, title, negative = tensors(query, title, negative)
    got = m.contrastive_loss(query, title, m.LossSettings(margin=0.1), negative=negative)
    assert float(got) == pytest.approx(cross_entropy(logits), rel=1e-5)


def test_what_says_the_same_is_no_negative():
    """Queries 0 and 3 are one; title 2 is query 1's text; hard negative 0 is title 1; title 4 is title 0."""
    keys = np.array([[1, 11, 12], [2, 12, 90], [3, 2, 91], [1, 13, 92], [5, 11, 93]])
    keys = DuplicateKeys(*tensors(*keys.T))
    hidden = m.same_texts(keys).numpy()
    expected = np.zeros((5, 10), bool)
    expected[range(5), range(5)] = True
    for row, column in ((0, 3), (3, 0), (1, 2), (0, 4), (4, 0), (1, 5)):
        expected[row, column] = True
    np.testing.assert_array_equal(hidden, expected)
    query, title, negative = vectors(3, 5, 8)
    candidates = np.concatenate([title, negative])
    logits = np.where(expected & ~np.eye(5, 10, dtype=bool), -np.inf, 20 * query @ candidates.T)
    query, title, negative = tensors(query, title, negative)
    got = m.contrastive_loss(query, title, m.LossSettings(), negative=negative, duplicate_keys=keys)
    assert float(got) == pytest.approx(cross_entropy(logits), rel=1e-5)


def test_keys_of_texts_against_themselves():
    keys = paddle.to_tensor([4, 5, 4])
    expected = [[True, False, True], [False, True, False], [True, False, True]]
    np.testing.assert_array_equal(m.same_texts(DuplicateKeys(keys, keys)).numpy(), expected)


# -------------------------------------------------------------------------------------------------------- poolings
def expected_pooling(network, pooling, texts):
    """Text by text, without padding."""
    rows = []
    for text in texts:
        outputs = network.ptm(paddle.to_tensor([text]), output_hidden_states=True)
        last, first = outputs[0].numpy()[0], outputs[2][0].numpy()[0]
        tokens = {"mean": last, "first_last_avg": (first + last) / 2, "first_avg": first}.get(pooling)
        rows.append({"pooler": outputs[1].numpy()[0], "cls": last[0]}[pooling] if tokens is None
                    else tokens[1:-1].mean(axis=0))
    rows = np.stack(rows)
    if network.output_emb_size:
        rows = rows @ network.emb_reduce_linear.weight.numpy() + network.emb_reduce_linear.bias.numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["ernie", "bert"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_and_the_exported_graph(pooling, kind, tmp_path):
    """Texts of three to nine tokens in one padded batch, in dynamic graph and in the static one."""
    texts = [row[: 3 + number].tolist() for number, row in enumerate(ids(7))]
    network = tiny(pooling=pooling)
    if kind == "bert":
        network = m.SimCSE(BertModel(BertConfig(**SIZES)), output_emb_size=8, pooling=pooling)
    network.eval()
    assert len(network.ptm.encoder.layers) == network.ptm.config.num_hidden_layers == (
        0 if pooling == "first_avg" else SIZES["num_hidden_layers"])
    if pooling in ("pooler", "cls"):
        layer = network.ptm.encoder.layers[-1]
        first_only, layer.forward = layer.forward, type(layer).forward.__get__(layer)
    expected = expected_pooling(network, pooling, texts)
    if pooling in ("pooler", "cls"):
        layer.forward = first_only
    batch = pad(texts, 0)
    np.testing.assert_allclose(network.embed(*batch).numpy(), expected, atol=1e-6)
    engine = make_engine(network, "fp32")
    np.testing.assert_allclose(engine.embed(*batch), expected, atol=1e-5)
    if pooling == "first_avg":  # the graph is what is deployed
        assert isinstance(engine, TableEngine)
        export_graph(network, str(tmp_path))
        np.testing.assert_allclose(CpuEngine(str(tmp_path)).embed(*batch), expected, atol=1e-5)
        with pytest.raises(InputError, match="--precision bf16: pooling first_avg is computed in fp32"):
            make_engine(network, "bf16")


@pytest.mark.parametrize("pooling", ["mean", "first_last_avg", "first_avg"])
def test_a_text_of_no_token_is_a_number(pooling):
    network = tiny(pooling=pooling)
    batch = pad([[1, 2], [1, 5, 6, 2]], 0)
    for engine in (network, make_engine(network, "fp32")):
        assert np.isfinite(np.asarray(engine.embed(*batch))).all()
        assert np.isfinite(np.asarray(engine.embed(*pad([[1, 2]], 0)))).all()


@pytest.mark.parametrize("pooling", ["cls", "mean", "first_last_avg"])
def test_a_pooler_that_is_not_asked_is_not_trained(pooling):
    network = tiny(pooling=pooling)
    network.train()
    network.loss(network(Batch(Inputs(ids()), Inputs(ids(seed=1))))).backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert not any("pooler" in name for name in trained) and len(trained) > 20
