"""How training computes its gradients, by the command line: a batch at once, or in chunks."""

from conftest import ENCODER, ROOT, read_texts, succeed


def test_memory_of_a_cached_step_does_not_grow_with_the_batch(sample, tmp_path):
    """Peak memory of batches of 32 and of 192, plain and in chunks of 8."""
    texts = read_texts(sample / "train_unsupervised.csv")
    (tmp_path / "measured.py").write_text(
        f"import resource, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n")
    peak = {}
    for batch, more in ((32, []), (192, []), (32, ["--chunk_size", 8]), (192, ["--chunk_size", 8])):
        lines = [f"{n}{text}\n" for n in range(2) for text in texts][:batch]  # one step
        (tmp_path / "train.csv").write_text("".join(lines), encoding="utf-8")
        result = succeed(tmp_path / "measured.py", "--device", "cpu", "--model_name_or_path", ENCODER,
                         "--train_set_file", "train.csv", "--batch_size", batch, "--max_seq_length", 64, "--save_dir",
                         "ck", *more, cwd=tmp_path)
        peak[batch, bool(more)] = int(result.stdout) / 1024
    plain, cached = (peak[192, how] - peak[32, how] for how in (False, True))
    assert plain > 250 and cached < plain / 5, peak
