"""train.py --distill_from: the similarities of another encoder's embeddings are followed."""

import numpy as np
import pytest
from conftest import refuse, succeed
from training import START, embeddings


@pytest.fixture(scope="module")
def texts(sample):
    return sample / "train_unsupervised.csv"


def test_a_teacher_is_followed(texts, tmp_path):
    """The student's similarities come closer to the teacher's than without it."""
    succeed("train.py", *START, "--train_set_file", texts, "--epochs", 0, "--pooling", "first_last_avg", "--whiten",
            "--save_dir", "teacher", cwd=tmp_path)
    teacher = embeddings(tmp_path / "teacher" / "model_0_whitened", texts, tmp_path)
    np.save(tmp_path / "teacher.npy", teacher)
    wanted = (teacher @ teacher.T)[np.triu_indices(len(teacher), 1)]
    agreement = {}
    for name, flags in (("without", []), ("with", ["--distill_from", "teacher.npy", "--distill_weight", 5])):
        succeed("train.py", *START, "--train_set_file", texts, "--epochs", 6, "--pooling", "mean", "--save_dir", name,
                "--learning_rate", 2e-4, *flags, cwd=tmp_path)
        own = embeddings(tmp_path / name / "model_48", texts, tmp_path)
        agreement[name] = np.corrcoef((own @ own.T)[np.triu_indices(len(own), 1)], wanted)[0, 1]
    assert agreement["with"] > agreement["without"] + 0.03, agreement
    np.save(tmp_path / "short.npy", teacher[1:])
    (tmp_path / "text.npy").write_text("not an array")
    for name, told in (("short.npy", "float32 [127, 256] instead of float32 [128, dimensions]"),
                       ("text.npy", "not an .npy file")):
        assert told in refuse("train.py", *START, "--train_set_file", texts, "--distill_from", name, cwd=tmp_path)
