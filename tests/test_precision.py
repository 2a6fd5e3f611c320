"""What bfloat16 costs on a CPU: cosines and recall on real text."""

import model as m
from simcse import machine
from simcse.encoder.encoder import Encoder
from simcse.encoder.engine import make_engine
from simcse.index.exact import exact_search
from simcse.measures import mean_percent, measure_queries, rank_first_targets
from simcse.text.textfile import distinct, read_text_pairs

import numpy as np
import pytest
from conftest import ENCODER, read_texts, succeed


@pytest.fixture(scope="module")
def half_trained(real_data, tmp_path_factory):
    """24 steps on csl: as it comes, the encoder has all its vectors in one corner, where a bit decides on ranks."""
    folder = tmp_path_factory.mktemp("half_trained")
    lines = (real_data / "csl" / "recall" / "train_unsupervised.csv").read_text(encoding="utf-8").splitlines(True)
    (folder / "train.csv").write_text("".join(lines[:384]), encoding="utf-8")
    succeed("train.py", "--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file", "train.csv",
            "--batch_size", 16, "--max_seq_length", 32, "--output_emb_size", 256, "--infer_with_fc_pooler", cwd=folder)
    return folder / "checkpoints" / "model_24" / "model_state.pdparams"


@pytest.mark.parametrize("name", ["csl", pytest.param("lcqmc", marks=pytest.mark.slow)])
def test_bfloat16_recalls_what_float32_does(real_data, half_trained, name):
    """The corpus and 1,000 queries, of which one is 0.1 points: cosine to float32 at least 0.999, Recall@k within 0.3
    on average, and nowhere 0.6 lower."""
    if not machine.CPU_HAS_BF16:
        pytest.skip("this processor has neither AVX-512 BF16 nor AMX")
    network, tokenizer, _ = m.load_model(str(half_trained))
    corpus = distinct(read_texts(real_data / name / "recall" / "corpus.csv"))
    pairs = read_text_pairs(str(real_data / name / "recall" / "dev.csv"), "--flag")
    queries = distinct(query for query, _ in pairs)[:1000]
    row_of = {text: row for row, text in enumerate(corpus)}
    targets = [{row_of.get(target, -1) for query, target in pairs if query == each} for each in queries]
    vectors, recalls = [], []
    for precision in ("fp32", "bf16"):
        encoder = Encoder(make_engine(network, precision), tokenizer, 32)
        embeddings = [encoder.encode(texts) for texts in (queries, corpus)]
        vectors.append(np.concatenate(embeddings))
        ranks = rank_first_targets(exact_search(*embeddings, 50)[0], targets)
        values = measure_queries([[rank] for rank in ranks], ["recall"])
        recalls.append([mean_percent(hits) for hits in values.values()])
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.999
    lower = [value - other for value, other in zip(*recalls)]
    assert abs(np.mean(lower)) < 0.3 and max(lower) < 0.6 and recalls[0][0] > 10, recalls
