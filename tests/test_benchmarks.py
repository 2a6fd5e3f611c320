"""The benchmark program: its rows and its errors. No time is tested."""

import json

import pytest
from conftest import refuse, run_script, succeed


def test_rows_hold_both_sides_and_their_ratio(sample, tmp_path):
    result = succeed("benchmarks/run.py", "tokenize", "--data_dir", sample, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["case"].split(",")[0] for row in rows] == ["titles", "corpus"]
    for row in rows:
        assert {"name", "case", "ours", "reference", "ratio", "unit", "machine"} == set(row)
        assert row["name"] == "tokenize" and row["unit"] == "texts/s" and row["ours"] > 0 and row["reference"] > 0
        assert abs(row["ratio"] - row["ours"] / row["reference"]) < 0.01
        assert row["case"] in result.stdout


def test_mistakes_are_one_line(sample, tmp_path):
    assert "no such measurement: tokenise; there are tokenize, encode" in refuse("benchmarks/run.py", "tokenise")
    (tmp_path / "empty").mkdir()
    assert "empty has no dev.csv" in refuse("benchmarks/run.py", "tokenize", "--data_dir", tmp_path / "empty")


def test_quality_shows_the_commands_of_its_recipes(tmp_path):
    """And every command is one that its script takes, files aside."""
    shown = succeed("benchmarks/quality.py", "--show", "--data_dir", tmp_path).stdout
    lines = [line.strip() for line in shown.splitlines() if "    python " in line]
    scripts = ("train", "recall", "predict", "scripts/pretrain", "scripts/mine_negatives", "scripts/make_pairs")
    beginnings = tuple(f"python {script}.py " for script in scripts)
    assert len(lines) > 30 and all(line.startswith(beginnings) for line in lines)
    assert "--pooling first_last_avg --whiten" in shown and "recall.py ... --hybrid_bm25" in shown
    assert "no such recipe: plane; there are untrained, plain" in refuse("benchmarks/quality.py", "plane", "--data_dir",
                                                                         tmp_path)


@pytest.mark.slow
def test_quality_runs_a_recipe_and_keeps_what_it_found(real_data, tmp_path):
    """On a part of LCQMC: BM25 and training with hard negatives; the second time nothing is run but BM25."""
    folder = tmp_path / "lcqmc" / "recall"
    folder.mkdir(parents=True)
    for name, most in (("dev.csv", 200), ("dev_labeled.csv", 20)):
        lines = (real_data / "lcqmc" / "recall" / name).read_text(encoding="utf-8").splitlines(True)[:most]
        (folder / name).write_text("".join(lines), encoding="utf-8")
        if name == "dev.csv":
            (folder / "corpus.csv").write_text("".join(line.split("\t")[1] for line in lines), encoding="utf-8")
    flags = ["triples", "--data_dir", tmp_path, "--data_sets", "lcqmc", "--seeds", 7, "--json", "q.json"]
    table = succeed("benchmarks/quality.py", *flags, cwd=tmp_path).stdout
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if "±" in line}
    assert rows.keys() == {"BM25", "BM25, first 62 characters", "triples"}
    results = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    name, = results.keys() - {"lcqmc/BM25"}
    kept = results[name]
    assert name.startswith("lcqmc/triples/7/")
    assert f"| triples | {kept['']['recall@1']:.1f} ± 0.0 |" in table and kept[""]["recall@50"] > 50
    again = run_script("benchmarks/quality.py", *flags, cwd=tmp_path, timeout=60)
    assert again.returncode == 0 and again.stdout == table
