"""How training computes its gradients, by the command line: in chunks, again, summed up over batches."""

import os

import numpy as np
from conftest import ENCODER, ROOT, succeed
from training import losses, train_flags

from data import read_texts


def test_memory_of_a_cached_step_does_not_grow_with_the_batch(sample, tmp_path):
    """Peak memory of batches of 32 and of 192, plain and in chunks of 8."""
    texts = read_texts(str(sample / "train_unsupervised.csv"), "--flag")
    (tmp_path / "measured.py").write_text(
        f"import resource, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n")
    peak = {}
    for batch, more in ((32, []), (192, []), (32, ["--gradient_cache", "--chunk_size", 8]),
                        (192, ["--gradient_cache", "--chunk_size", 8])):
        lines = [f"{n}{text}\n" for n in range(2) for text in texts][:batch]  # one step
        (tmp_path / "train.csv").write_text("".join(lines), encoding="utf-8")
        result = succeed(tmp_path / "measured.py", "--device", "cpu", "--model_name_or_path", ENCODER,
                         "--train_set_file", "train.csv", "--batch_size", batch, "--max_seq_length", 64, "--save_dir",
                         "ck", *more, cwd=tmp_path)
        peak[batch, bool(more)] = int(result.stdout) / 1024
    plain, cached = (peak[192, how] - peak[32, how] for how in (False, True))
    assert plain > 250 and cached < plain / 5, peak


def test_recompute_and_accumulation(sample, tmp_path):
    """Recomputing changes no loss, dropout included; accumulating takes a step for several batches."""
    plain, recomputed, accumulated = (
        succeed("train.py", *train_flags(sample, "--save_dir", tmp_path / name, *more))
        for name, more in (("a", []), ("b", ["--use_recompute"]), ("c", ["--gradient_accumulation_steps", 3, "--epochs",
                                                                         2])))
    np.testing.assert_allclose([float(loss) for loss in losses(plain)], [float(loss) for loss in losses(recomputed)],
                               atol=2e-5)
    assert len(losses(plain)) == 1 and os.listdir(tmp_path / "a") == ["model_16"]
    assert os.listdir(tmp_path / "c") == ["model_12"], "16 batches an epoch, in threes: 6 steps, the last of 1 batch"
    assert "epoch: 2, batch: 4" in accumulated.stderr
