"""The benchmark program: its rows and its errors. No time is tested."""

import json

from conftest import refuse, succeed


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
