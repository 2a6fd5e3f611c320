"""Loss and gradients of training steps on a tiny network, as one process or as one of several; used by
test_distributed.py, which also runs this file under paddle.distributed.launch:

    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo tests/gradients.py FOLDER
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import data
import model as m
from simcse import console, ranks
from simcse.machine import RANK
from simcse.training.gradients import backward

import numpy as np
import paddle
from paddlenlp.transformers import ErnieConfig, ErnieModel

SIZES = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 40}
ROWS = 6
COUNTS = (1, 5, 6)  # of texts that ranks share out
# What each rank does: options of `gradients`.
CASES = {
    "plain": {}, "cross": {"cross": True}, "cached": {"chunk": 4}, "cross_cached": {"cross": True, "chunk": 4},
    "triples": {"columns": 3}, "cross_triples": {"columns": 3, "cross": True},
    "cross_triples_cached": {"columns": 3, "cross": True, "chunk": 4},
    "table": {"pooling": "first_avg"}, "cross_table": {"cross": True, "pooling": "first_avg"},
    "cross_table_cached": {"cross": True, "pooling": "first_avg", "chunk": 4}}


def texts(number: int, rows: int = ROWS) -> list[list[int]]:
    """Token ids of other lengths; the last one of every odd batch is the first one again."""
    random = np.random.default_rng(number)
    ids = [random.integers(5, 200, random.integers(4, 12)).tolist() for _ in range(rows)]
    return [*ids[:-1], ids[0]] if number % 2 else ids


def rotated(ids: list, by: int) -> list:
    """Every ROWS texts rotated among themselves."""
    return [text for start in range(0, len(ids), ROWS) for text in (ids[start : start + ROWS] * 2)[by : by + ROWS]]


def batch_of(ids: list[list[int]], keys: bool = True, columns: int = 1) -> data.Batch:
    """The texts under two dropouts; or, of several columns, each with the one after it as its title and the one after
    that as its hard negative."""
    texts = [rotated(ids, by) for by in range(columns)]
    sides = texts if columns > 1 else texts * 2
    names = ("query", "title", "hard_negative")
    duplicate_keys = None
    if keys:
        duplicate_keys = data.DuplicateKeys(**{name: data.hash_token_ids(side) for name, side in zip(names, sides)})
    inputs = {name: data.Inputs.of(side, 0) for name, side in zip(names, sides)}
    return data.Batch(**inputs, duplicate_keys=duplicate_keys)


def tiny(dropout: float = 0.0, pooling: str = "pooler", **loss_settings) -> m.SimCSE:
    paddle.seed(1)
    encoder = ErnieModel(ErnieConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **SIZES))
    network = m.SimCSE(encoder, dropout=dropout, output_emb_size=8, pooling=pooling,
                       loss_settings=m.LossSettings(margin=0.1, **loss_settings))
    network.train()
    return network


def gradients(ids: list[list[int]], dropout: float = 0.0, chunk: int | None = None, cross: bool = False,
              keys: bool = True, columns: int = 1, pooling: str = "pooler") -> dict[str, np.ndarray]:
    """The loss of a step, and its gradients."""
    model = tiny(dropout, pooling, cross_device_negatives=cross)
    network = paddle.DataParallel(model) if paddle.distributed.get_world_size() > 1 else model
    paddle.seed(7)
    loss = backward(network, model, batch_of(ids, keys, columns), lambda loss: loss, chunk)
    named = {name: tensor.grad.numpy() for name, tensor in model.named_parameters() if tensor.grad is not None}
    return {"loss": loss.value.numpy(), **named}


def shares(count: int) -> np.ndarray:
    """Of so many texts on all ranks, each its number and the rank that encoded it."""
    return ranks.encode_shares(lambda numbers: np.array([[number, RANK] for number in numbers], "float32").reshape(
        len(numbers), 2), range(count))


def main(folder: str) -> None:
    paddle.set_device("cpu")
    ranks.join_ranks()
    for name, options in CASES.items():
        np.savez(os.path.join(folder, f"{name}_{RANK}.npz"), **gradients(texts(RANK), **options))
    np.savez(os.path.join(folder, f"shares_{RANK}.npz"), **{str(count): shares(count) for count in COUNTS})


if __name__ == "__main__":
    console.run(lambda: main(sys.argv[1]))  # which ends ranks the safe way
