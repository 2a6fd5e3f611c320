"""Train an encoder further on texts of its domain, by masked language modelling (Gururangan et al. 2020,
arXiv:2004.10964), before SimCSE.

    python scripts/pretrain.py --device cpu --train_set_file recall/train_unsupervised.csv --save_dir encoder
    python train.py --device cpu --model_name_or_path encoder/model_900 --train_set_file recall/train_unsupervised.csv

Its checkpoints are encoders, as train.py's --model_name_or_path takes them. It runs on several processes, stops and
goes on as train.py does.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import data
from simcse import console, flags
from simcse.machine import RANK, RANKS
from simcse.text import textfile, tokens, wordpiece

import numpy as np

MASKED, KEPT = 0.8, 0.9  # of the chosen tokens 80 % become [MASK], 10 % any token, 10 % stay (Devlin et al. 2019)


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    group = parser.add_argument_group("data")
    group.add_argument("--train_set_file", type=flags.readable_file, required=True, help="training texts, one a line")
    flags.add_data_arguments(group)
    start = parser.add_argument_group("start")
    start.add_argument("--model_name_or_path", type=flags.model_name, default=flags.DEFAULT_MODEL,
                       help="pretrained encoder, hub name or folder")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--mlm_probability", type=flags.proportion, default=0.15,
                              help="part of the tokens that are predicted, whole words at a time")
    flags.add_optimization_arguments(optimization)
    flags.add_run_arguments(parser.add_argument_group("device"), parser.add_argument_group("output"))
    return flags.check_run_arguments(parser, parser.parse_args(), start, optimization)


class MaskedBatch(NamedTuple):
    """The texts of one step.

    Attributes:
        input_ids, token_type_ids: int64 [batch, length].
        places, labels: of the tokens to predict, where they are among all batch * length, and their ids, int64.
        rows: the texts' rows in the training file.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    rows: Sequence[int]


def starts_of(encoding: Any) -> list[int]:
    """Where in its text each token between [CLS] and [SEP] starts."""
    return [start for start, _ in encoding.offsets[1:-1]]


class MaskedBatches:
    """Makes the batches: whole words masked (Sun et al. 2019, ERNIE, arXiv:1904.09223; Cui et al.
    2019, arXiv:1906.08101), words being jieba's. Texts are one a row."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, args: argparse.Namespace) -> None:
        if not isinstance(tokenizer, wordpiece.WordPiece):
            raise console.InputError("--model_name_or_path: the encoder's tokenizer is not ERNIE's or BERT's")
        import jieba

        jieba.setLogLevel(logging.WARNING)
        jieba.initialize()
        self.texts, self.tokenizer, self.args, self.jieba = texts, tokenizer, args, jieba
        self.mask, self.ordinary = tokenizer.vocab["[MASK]"], np.array(
            [number for token, number in tokenizer.vocab.items() if not (token[0] == "[" and token[-1] == "]")])

    def words(self, text: str, places: Sequence[int]) -> np.ndarray:
        """The number of the word, from 0, that each token is of; int64 [tokens].

        Args:
            places: where in the text each token starts.
        """
        starts = [start for _, start, _ in self.jieba.tokenize(text)]
        return np.searchsorted(starts, places, side="right") - 1

    def choose(self, words: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Which tokens to predict: a word, and more of them while they are --mlm_probability of the tokens or less;
        bool [tokens]."""
        chosen, budget = np.zeros(len(words), bool), self.args.mlm_probability * len(words)
        for word in random.permutation(np.unique(words)):
            same = words == word
            if not chosen.any() or same.sum() <= budget - chosen.sum():
                chosen |= same
        return chosen

    def make(self, rows: Sequence[int], epoch: int) -> MaskedBatch:
        """The batch of some rows of the training file, in an epoch from 0."""
        texts = [self.texts[row] for row in rows]
        encodings = self.tokenizer.encode(texts, self.args.max_seq_length)
        input_ids, types = tokens.pad([encoding.ids for encoding in encodings], self.tokenizer.pad_token_id)
        chosen = np.zeros(input_ids.shape, bool)
        for line, (row, text, encoding) in enumerate(zip(rows, texts, encodings)):
            random, starts = np.random.default_rng([self.args.seed, epoch, row]), starts_of(encoding)
            chosen[line, 1 : 1 + len(starts)] = self.choose(self.words(text, starts), random)
        labels = input_ids[chosen]
        random = np.random.default_rng([self.args.seed, epoch, *rows])
        lot, other = random.random(len(labels)), random.choice(self.ordinary, len(labels))
        input_ids[chosen] = np.where(lot < MASKED, self.mask, np.where(lot < KEPT, other, labels))
        return MaskedBatch(input_ids, types, np.flatnonzero(chosen), labels, rows)


def masked_lm(name: str, dropout: float, precision: str = "fp32") -> Any:
    """The network: an encoder and the head that predicts its tokens, random where the encoder comes without one.

    Args:
        name: as in `load_pretrained`.
        dropout: hidden and attention dropout rate.
        precision: of matrix products, as in `SimCSE`.

    Raises:
        InputError: see `load_pretrained`; or there is no such head for the encoder.
    """
    from simcse.device import casting
    from simcse.encoder.pretrained import freeze_pooler, load_pretrained

    import paddle
    import paddle.nn.functional as F

    network = load_pretrained(name, dropout, "AutoModelForMaskedLM", may_start_at_random="cls")
    if not hasattr(network, "cls"):
        raise console.InputError(
            f"--model_name_or_path {name}: {type(network).__name__} has no head that is known here")
    encoder = getattr(network, network.base_model_prefix)
    freeze_pooler(encoder)

    class MaskedLM(paddle.nn.Layer):
        """The mean cross-entropy of the tokens to predict, a scalar; arguments as in `MaskedBatch`."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.max_positions = getattr(network.config, "max_position_embeddings", 512)

        def forward(self, input_ids, token_type_ids, places, labels):
            with casting(precision):
                hidden = encoder(input_ids, token_type_ids=token_type_ids)[0]
                logits = network.cls(hidden.reshape([-1, hidden.shape[-1]]).index_select(places))
            losses = F.softmax_with_cross_entropy(logits.astype("float32"), labels.unsqueeze(-1))
            return losses.sum() / max(1, len(labels))

    return MaskedLM()


def train(args: argparse.Namespace, texts: textfile.TextFile) -> Any:
    """The training loop; returns the `Run`."""
    from simcse.encoder.encoder import check_length, check_texts
    from simcse.files import new_folder
    from simcse.training.trainer import Run

    import paddle

    name = args.resume or args.model_name_or_path
    model, tokenizer = masked_lm(name, args.dropout, args.precision), wordpiece.load_tokenizer(name)
    check_length(model, args.max_seq_length)
    check_texts(texts.spread(tokens.WINDOW), tokenizer, args.max_seq_length)

    def write(folder: str, also) -> None:
        with new_folder(folder) as temporary:
            model.network.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            also(temporary)

    sampler = data.ShuffledBatches(len(texts), args.batch_size, RANK, RANKS)
    batches = MaskedBatches(texts, tokenizer, args)
    run = Run(args, model, texts, len(sampler), write)
    for batch in run.batches(data.batches_after(run.step, args.epochs, sampler, batches.make)):
        loss = run.network(*map(paddle.to_tensor, batch[:4]))
        run.scaler.scale(loss).backward()
        run.update(loss, batch)
    return run


def main() -> None:
    args = parse_args()
    texts = textfile.TextFile(args.train_set_file, "--train_set_file")

    flags.announce_training(args, args.model_name_or_path, console.count(len(texts), "training text"))

    from simcse.training.trainer import run_training

    run_training(args, lambda: train(args, texts))


if __name__ == "__main__":
    console.run(main)
