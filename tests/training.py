"""What the tests of training share: flags of small runs, and what a run leaves."""

import model as m
from simcse.encoder import weights as w
from simcse.encoder.encoder import Encoder

import numpy as np
from conftest import ENCODER, FP32, succeed

NAME = "model_state.pdparams"
ON = ["--device", "cpu", "--batch_size", 16, "--max_seq_length", 16]
START = [*ON, "--model_name_or_path", ENCODER]


def weights(folder):
    return w.read_weights(str(folder / NAME), "--flag")


def losses(result):
    """Every loss that train.py logged, as text."""
    return [line.split("loss: ")[1].split(",")[0] for line in result.stderr.splitlines() if ", loss: " in line]


def train_flags(sample, *more):
    return ["--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file", sample / "train_unsupervised.csv",
            "--max_seq_length", 16, "--batch_size", 8, *more]


def saving_flags(sample, *more):
    """Of a run that saves every 4 of its 48 steps."""
    return train_flags(sample, "--epochs", 3, "--warmup_proportion", 0.2, "--output_emb_size", 32, "--save_steps", 4,
                       *more)


def embeddings(checkpoint, texts, cwd, *more):
    """Of a file of texts, by inference.py."""
    succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, "--input_file", texts, "--output_file",
            "v.npy", "--max_seq_length", 16, *FP32, *more, cwd=cwd)
    return np.load(cwd / "v.npy")


def embed(checkpoint, texts):
    """By the dynamic graph, in float32, at the length that is recorded."""
    network, tokenizer, record = m.load_model(str(checkpoint / NAME))
    return Encoder(network, tokenizer, record["max_seq_length"], 32).encode(texts)
