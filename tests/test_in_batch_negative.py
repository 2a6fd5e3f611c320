"""Checkpoints of PaddleNLP's in_batch_negative, the sibling of SimCSE that trains on pairs, and what it computes.

Its network is written here a second time, from its published description, and run by paddle alone: encoder, pooled
output, `emb_reduce_linear`, dropout, L2 norm. Its training saves the weights, and the tokenizer beside them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import model as m
from data import Batch, Inputs
from deploy.python import predictor
from simcse.console import InputError
from simcse.encoder.encoder import Encoder
from simcse.text.textfile import read_text_pairs

import numpy as np
import paddle
import pytest
from conftest import ENCODER, FP32, read_texts, succeed
from paddle import nn
from paddlenlp.transformers import ErnieConfig, ErnieModel, ErnieTokenizer
from training import losses, weights

LENGTH = 64  # of recall and prediction there, and here of a checkpoint that records none
MARGIN, SCALE = 0.2, 30  # of its training


class BatchNegative(nn.Layer):
    """The network of in_batch_negative.

    Args:
        encoder: gives the states of all tokens, and the pooled output.
        size: of the vectors; 0: without a linear layer.
    """

    def __init__(self, encoder, size):
        super().__init__()
        self.ptm = encoder
        self.dropout = nn.Dropout(0.1)
        self.size = size
        if size:
            self.emb_reduce_linear = nn.Linear(encoder.config.hidden_size, size)

    def forward(self, input_ids, token_type_ids):
        _, vectors = self.ptm(input_ids, token_type_ids)
        if self.size:
            vectors = self.emb_reduce_linear(vectors)
        vectors = self.dropout(vectors)
        return vectors / vectors.norm(axis=-1, keepdim=True)


@dataclass
class Trained:
    """What its training leaves.

    Attributes:
        network: in evaluation mode.
        tokenizer: PaddleNLP's.
        encoder: the folder of the encoder that it was trained from.
        path: the file of weights.
    """

    network: BatchNegative
    tokenizer: ErnieTokenizer
    encoder: Path
    path: Path

    @property
    def flags(self):
        """The flags of a program that reads the checkpoint."""
        return ["--params_path", self.path, "--model_name_or_path", self.encoder]

    def ids(self, texts):
        """Token ids and types as that application makes them, int64 [texts, longest]."""
        encoded = self.tokenizer(list(texts), max_length=LENGTH, truncation=True, padding=True,
                                 return_attention_mask=False)
        return np.array(encoded["input_ids"], "int64"), np.array(encoded["token_type_ids"], "int64")

    def embed(self, texts):
        """Vectors, float32 [texts, size]."""
        with paddle.no_grad():
            return self.network(*map(paddle.to_tensor, self.ids(texts))).numpy()


@pytest.fixture(scope="module", params=[(256, True), (0, False)], ids=["256", "0, no tokenizer"])
def trained(request, tmp_path_factory):
    """A checkpoint of an encoder whose weights are drawn so wide that vectors of different texts differ."""
    size, has_tokenizer = request.param
    folder = tmp_path_factory.mktemp("in_batch_negative")
    tokenizer = ErnieTokenizer.from_pretrained(str(ENCODER))
    paddle.seed(5)
    config = ErnieConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=80, initializer_range=0.3)
    encoder = ErnieModel(config)
    encoder.save_pretrained(str(folder / "encoder"))
    tokenizer.save_pretrained(str(folder / "encoder"))
    network = BatchNegative(encoder, size)
    for parameter in encoder.parameters():  # training has moved the weights away from those of the encoder's folder
        parameter.set_value(parameter + 0.05 * paddle.randn(parameter.shape))
    checkpoint = folder / "checkpoints" / "model_40"
    checkpoint.mkdir(parents=True)
    paddle.save(paddle.DataParallel(network).state_dict(), str(checkpoint / "model_state.pdparams"))
    if has_tokenizer:
        tokenizer.save_pretrained(str(checkpoint))
    network.eval()
    return Trained(network, tokenizer, folder / "encoder", checkpoint / "model_state.pdparams")


@pytest.fixture(scope="module")
def pairs(sample):
    return read_text_pairs(str(sample / "dev.csv"), "--flag")


def loss_of_pairs(query, title):
    """The training loss of one batch: cross-entropy over its titles, the positives' cosines less the margin."""
    logits = SCALE * (query @ title.T - MARGIN * np.eye(len(query)))
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))


def test_it_loads_strictly(trained):
    """The tensors have SimCSE's names and no others; size and pooler follow from them."""
    size = trained.network.size
    model, _, record = m.load_model(str(trained.path), str(trained.encoder))
    assert model.output_emb_size == size and model.with_pooler and record["max_seq_length"] is None
    state = weights(trained.path.parent)
    assert state.keys() == model.state_dict().keys()
    assert {name for name in state if not name.startswith("ptm.")} == (
        {"emb_reduce_linear.weight", "emb_reduce_linear.bias"} if size else set())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name])
    with pytest.raises(InputError, match="--output_emb_size 128: .* has (256|no fc; give 0, or leave the flag out)$"):
        m.load_model(str(trained.path), str(trained.encoder), 128)


def test_vectors(trained, sample):
    """By the network, and by the graph that is kept beside the checkpoint."""
    texts = read_texts(sample / "corpus.csv")
    expected = trained.embed(texts)
    assert np.triu(expected @ expected.T, 1).max() < 1 - 1e-4, "the vectors tell the texts apart"
    model, tokenizer, _ = m.load_model(str(trained.path), str(trained.encoder))
    np.testing.assert_allclose(Encoder(model, tokenizer, LENGTH, 32).encode(texts), expected, atol=1e-5)
    encoder = m.Encoder.load(str(trained.path), model_name_or_path=str(trained.encoder), precision="fp32")
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)


def test_cosines(trained, sample):
    pairs = read_text_pairs(str(sample / "test.csv"), "--flag")
    expected = [trained.embed([pair[side] for pair in pairs]) for side in (0, 1)]
    result = succeed("predict.py", "--device", "cpu", *trained.flags, *FP32, "--text_pair_file", sample / "test.csv",
                     "--output_emb_size", trained.network.size, "--margin", MARGIN, "--scale", SCALE, "--batch_size",
                     len(pairs))
    cosines = [float(line) for line in result.stdout.splitlines()]
    np.testing.assert_allclose(cosines, (expected[0] * expected[1]).sum(axis=1), atol=1e-5)
    logged = float(result.stderr.split(f"contrastive loss in batches of {len(pairs)}: ")[1].split()[0])
    assert logged == pytest.approx(loss_of_pairs(*expected), rel=1e-4)


def test_the_loss_of_a_batch(trained, pairs):
    sides = [[pair[side] for pair in pairs[:16]] for side in (0, 1)]
    query, title = map(trained.embed, sides)
    settings = m.LossSettings(margin=MARGIN, scale=SCALE)
    model, _, _ = m.load_model(str(trained.path), str(trained.encoder), loss_settings=settings)
    batch = Batch(*(Inputs(*trained.ids(side)) for side in sides))
    assert float(model.loss(model(batch)).value) == pytest.approx(loss_of_pairs(query, title), rel=1e-4)


def test_recall(trained, sample, pairs, tmp_path):
    """Against brute force, with the flags of that application's recall.py."""
    documents = read_texts(sample / "corpus.csv")
    queries = [pair[0] for pair in pairs]
    succeed("recall.py", "--device", "cpu", *trained.flags, *FP32, "--corpus_file", sample / "corpus.csv",
            "--similar_text_pair_file", sample / "dev.csv", "--output_emb_size", trained.network.size, "--recall_num",
            5, "--hnsw_m", 100, "--hnsw_ef", 100, "--hnsw_max_elements", 1000, "--batch_size", 64, "--max_seq_length",
            LENGTH, cwd=tmp_path)
    result = tmp_path / "recall_result_dir" / "recall_result.txt"
    lines = [line.split("\t") for line in result.read_text(encoding="utf-8").splitlines()]
    assert [line[0] for line in lines] == [query for query in queries for _ in range(5)]
    cosines = trained.embed(queries) @ trained.embed(documents).T
    best = -np.sort(-cosines, axis=1)[:, :5]
    np.testing.assert_allclose(np.reshape([float(line[2]) for line in lines], best.shape), best, atol=1e-5)
    row_of = {document: row for row, document in enumerate(documents)}
    found = np.reshape([row_of[line[1]] for line in lines], best.shape)
    np.testing.assert_allclose(np.take_along_axis(cosines, found, axis=1), best, atol=1e-5)


def test_the_exported_graph(trained, sample, tmp_path):
    succeed("export_model.py", *trained.flags, "--output_path", tmp_path)
    graph = predictor.load_predictor(str(tmp_path), precision="fp32")
    texts = read_texts(sample / "corpus.csv")[:20]
    np.testing.assert_allclose(graph.embed(*trained.ids(texts)), trained.embed(texts), atol=1e-5)
    assert (tmp_path / "tokenizer.json").is_file(), "deploy/python reads it"


def test_training_goes_on_from_it(trained, pairs, tmp_path):
    """The loss of its first step is that application's; what it saves is again a checkpoint for that application."""
    rows = "".join(f"{query}\t{title}\n" for query, title in pairs[:16])
    (tmp_path / "train.csv").write_text(rows, encoding="utf-8")
    result = succeed("train.py", "--device", "cpu", "--init_from_ckpt", trained.path, "--model_name_or_path",
                     trained.encoder, "--train_set_file", "train.csv", "--batch_size", 16, "--max_seq_length", LENGTH,
                     "--margin", MARGIN, "--scale", SCALE, "--infer_with_fc_pooler", "--keep_duplicate_negatives",
                     "--max_grad_norm", 5, "--dropout", 0, "--output_dropout", 0, cwd=tmp_path)
    first_loss, = map(float, losses(result))
    expected = loss_of_pairs(*(trained.embed([pair[side] for pair in pairs[:16]]) for side in (0, 1)))
    assert first_loss == pytest.approx(expected, rel=1e-4)

    saved = tmp_path / "checkpoints" / "model_1"
    record = json.loads((saved / "simcse_config.json").read_text(encoding="utf-8"))
    assert (record["margin"], record["scale"], record["with_pooler"]) == (MARGIN, SCALE, True)
    before, after = weights(trained.path.parent), paddle.load(str(saved / "model_state.pdparams"))
    assert {name: array.shape for name, array in before.items()} == {
        name: tuple(tensor.shape) for name, tensor in after.items()}
    assert any(abs(before[name] - tensor.numpy()).max() > 1e-5 for name, tensor in after.items())
