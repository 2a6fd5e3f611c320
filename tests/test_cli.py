"""Help and usage errors: one line, exit code 2, before anything heavy is imported."""

import argparse
import json
import subprocess
import sys

from simcse import flags
from simcse.index.engines import ENGINES, LOCAL_ENGINES

import pytest
from conftest import ROOT, refuse, succeed

SCRIPTS = ["train.py", "recall.py", "evaluate.py", "predict.py", "inference.py", "export_model.py",
           "deploy/python/predict.py", "deploy/serving/server.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_flags_with_defaults(script):
    result = succeed(script, "--help")
    assert "usage:" in result.stdout and "(default:" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag", "1"], ["--max_seq_length", "x"]])
def test_nothing_heavy_is_imported_for_them(script, flags):
    code = (f"import runpy, sys\nsys.argv = [{script!r}, *{flags!r}]\n"
            f"sys.path.insert(0, {str((ROOT / script).parent)!r})\n"
            f"try:\n    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\nexcept SystemExit:\n    pass\n"
            "heavy = {'paddle', 'paddlenlp', 'hnswlib', 'visualdl', 'matplotlib', 'fastapi'}\n"
            "sys.exit(bool(heavy & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("script, flags, message", [
    ("evaluate.py", ["--recall_nm", 5], "no such flag: --recall_nm; did you mean --recall_num?"),
    ("recall.py", ["--corpus", "x"], "no such flag: --corpus"),
    ("recall.py", ["--corpus_file", "nowhere.csv"], "argument --corpus_file: nowhere.csv: no such file"),
    ("recall.py", ["--corpus_file", "."], "argument --corpus_file: .: is a directory"),
    ("predict.py", ["--params_path", "nowhere"], "argument --params_path: nowhere: no such file"),
    ("inference.py", [], "argument --params_path: checkpoints/model_20000/model_state.pdparams: no such file"),
    ("inference.py", ["--batch_size", 0], "argument --batch_size: expected an integer >= 1, got '0'"),
    ("inference.py", ["--max_seq_length", 2],
     "argument --max_seq_length: expected an integer >= 3 ([CLS], a token, [SEP]), got '2'"),
    ("inference.py", ["--text", " "], "argument --text: an empty text"),
    ("inference.py", ["--output_file", "v.txt"], "argument --output_file: v.txt: the name has to end in .npy"),
    ("train.py", [], "the following arguments are required: --train_set_file"),
    ("train.py", ["--dropout", 1.5], "argument --dropout: expected a number in [0, 1), got '1.5'"),
    ("train.py", ["--scale", "nan"], "argument --scale: expected a number > 0, got 'nan'"),
    ("train.py", ["--epochs", -1], "argument --epochs: expected an integer >= 0, got '-1'"),
    ("train.py", ["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ("train.py", ["--model_name_or_path", "./nowhere"], "argument --model_name_or_path: ./nowhere: no such folder"),
    ("recall.py", ["--params_path", "."], "argument --params_path: ./model_state.pdparams: no such file"),
    ("recall.py", ["--hnsw_m", 1], "argument --hnsw_m: expected an integer >= 2, got '1'"),
    ("deploy/python/predict.py", ["--model_dir", "nowhere"], "--model_dir nowhere: no exported graph"),
    ("deploy/python/predict.py", ["--model_dir", ".", "--max_seq_length", 2],
     "--max_seq_length: expected an integer >= 3, got 2"),
    ("deploy/python/predict.py", ["--model_dir", ".", "--benchmark", "maybe"],
     "argument --benchmark: 'maybe' is neither true nor false"),
    ("deploy/python/predict.py", ["--model_dir", ".", "--enable_mkldnn", "__import__('os').getcwd()"],
     "neither true nor false"),
    ("deploy/python/predict.py", ["--model_dir", ".", "--device", "cpu", "--use_tensorrt", "True"],
     "--use_tensorrt needs --device gpu")])
def test_usage_errors(tmp_path, script, flags, message):
    line = refuse(script, *flags, cwd=tmp_path)
    assert message in line and line.startswith(f"{script.rsplit('/')[-1]}: error: ")


@pytest.mark.parametrize("script, flags, message", [
    ("recall.py", ["--device", "cpu", "--precision", "fp16"], "--precision fp16 needs --device gpu"),
    ("recall.py", ["--ann_engine", "exact", "--hnsw_ef", 9], "--hnsw_ef needs --ann_engine hnswlib or milvus"),
    ("recall.py", ["--query", "x"], "--similar_text_pair and --query are mutually exclusive"),
    ("recall.py", ["--milvus_uri", "x.db"], "--milvus_uri needs --ann_engine milvus"),
    ("recall.py", ["--ann_engine", "milvus", "--recall_num", 16385], "--recall_num 16385: Milvus gives at most 16384"),
    ("recall.py", ["--milvus_index", "FLAT"], "--milvus_index needs --ann_engine milvus"),
    ("recall.py", ["--ann_engine", "milvus", "--milvus_uri", "http://h", "--hnsw_m", 8, "--milvus_index_params", "M=9"],
     "--hnsw_m and M of --milvus_index_params are mutually exclusive"),
    ("recall.py", ["--ann_engine", "milvus", "--milvus_uri", "http://h:1", "--milvus_index", "FLAT", "--hnsw_m", 8],
     "M (--milvus_index_params or --hnsw_m) is not for FLAT, which has no parameters"),
    ("recall.py", ["--ann_engine", "milvus", "--milvus_uri", "http://h:1", "--milvus_collection", "a-b"],
     "--milvus_collection a-b: expected at most 255 ASCII letters, digits and _, and no digit first"),
    ("recall.py", ["--ann_engine", "milvus", "--index_path", "x"], "are not for --ann_engine milvus"),
    ("recall.py", ["--ann_engine", "milvus", "--hnsw_m", 8], "--hnsw_m and --hnsw_ef are not for Milvus Lite"),
    ("recall.py", ["--index_shards", 0], "argument --index_shards: expected an integer >= 1, got '0'"),
    ("train.py", ["--gradient_cache"], "no such flag: --gradient_cache"),
    ("recall.py", ["--precision", "int8"], "--precision int8 needs --device cpu"),
    ("inference.py", ["--cpu_threads", 2], "--cpu_threads needs --device cpu"),
    ("predict.py", ["--device", "cpu", "--precision", "tf32"], "--precision tf32 needs --device gpu"),
    ("train.py", ["--device", "cpu", "--precision", "bf16"], "--precision bf16 needs --device gpu"),
    ("train.py", ["--cpu_threads", 1], "--cpu_threads needs --device cpu"),
    ("train.py", ["--chunk_size", 0], "expected an integer >= 1, got '0'")])
def test_flags_that_would_do_nothing(tmp_path, script, flags, message):
    (tmp_path / "file").write_text("a\tb\n")
    files = {"recall.py": ["--params_path", "--corpus_file", "--similar_text_pair"], "inference.py": ["--params_path"],
             "predict.py": ["--params_path", "--text_pair_file"], "train.py": ["--train_set_file"]}
    assert message in refuse(script, *[word for flag in files[script] for word in (flag, "file")], *flags, cwd=tmp_path)


@pytest.mark.parametrize("uri, message", [
    ("http://[::1", "'http://[::1': Invalid IPv6 URL"), ("http://h:abc", "'http://h:abc': Port could not be cast"),
    ("http://h:99999", "'http://h:99999': Port out of range"), ("http://", "'http://' is not of the form http://host:"),
    ("http://主机:19530", "is not of the form http://host:port"), ("recall", "is neither http://host:port nor"),
    ("http://user:geheim@h:0x", "give user:password in the environment as MILVUS_TOKEN, not in the address")])
def test_addresses_of_milvus_that_cannot_be(uri, message):
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        flags.milvus_uri(uri)
    assert message in str(refused.value) and "geheim" not in str(refused.value)
    assert flags.milvus_uri("https://h:1/database") == "https://h:1/database"


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['paddle'] = None\n")
    (tmp_path / "pairs.csv").write_text("a\tb\n")
    (tmp_path / "model_state.pdparams").write_text("")
    line = refuse("predict.py", "--params_path", ".", "--text_pair_file", "pairs.csv", cwd=tmp_path,
                  env={"PYTHONPATH": str(tmp_path)})
    assert "paddle is not installed" in line and "requirements.txt" in line


@pytest.mark.parametrize("engine, package, is_kept", [
    (name, package, is_kept) for name, engine in ENGINES.items() for package in engine.packages
    for is_kept in ([False, True] if name in LOCAL_ENGINES else [False])])
def test_a_missing_package_of_an_engine_is_found_before_the_model_is_loaded(tmp_path, engine, package, is_kept):
    """Whether --ann_engine names the engine or the kept index has it."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{package}'] = None\n")
    (tmp_path / "file").write_text("a\n")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text(json.dumps({"ann_engine": engine}))
    flags = ["--index_path", "index"] if is_kept else ["--ann_engine", engine, "--corpus_file", "file"]
    line = refuse("recall.py", "--params_path", "file", "--query", "x", *flags, cwd=tmp_path,
                  env={"PYTHONPATH": str(tmp_path)})
    assert line == (f"recall.py: error: --ann_engine {engine}: {package} is not installed; "
                    f"pip install -r {ENGINES[engine].requirements}")


def test_a_setting_that_the_kept_index_does_not_have(tmp_path):
    """The line names what was given: the setting, not --ann_engine."""
    (tmp_path / "file").write_text("a\n")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text('{"ann_engine": "exact"}')
    line = refuse("recall.py", "--params_path", "file", "--query", "x", "--index_path", "index", "--hnsw_ef", 9,
                  cwd=tmp_path)
    assert line.startswith("recall.py: error: --hnsw_ef needs --ann_engine hnswlib or milvus; the index in index has "
                           "ann_engine exact (")


def test_folder_without_a_graph(tmp_path):
    line = refuse("deploy/python/predict.py", "--model_dir", ".", "--device", "cpu", cwd=tmp_path)
    assert "--model_dir .: no exported graph" in line


def test_a_checkpoint_is_no_encoder_and_a_mistyped_folder_is_not_looked_up(tmp_path):
    (tmp_path / "simcse_config.json").write_text("{}")
    (tmp_path / "train.csv").write_text("a\n")
    line = refuse("train.py", "--train_set_file", "train.csv", "--model_name_or_path", str(tmp_path), cwd=tmp_path)
    assert "is a SimCSE checkpoint, not an encoder" in line
    line = refuse("train.py", "--train_set_file", "train.csv", "--model_name_or_path", tmp_path / "ernie", cwd=tmp_path)
    assert "no such folder" in line


def test_an_unknown_hub_name_is_one_line(tmp_path):
    (tmp_path / "train.csv").write_text("a\nb\n")
    line = refuse("train.py", "--device", "cpu", "--train_set_file", "train.csv", "--model_name_or_path",
                  "no-such-model-anywhere", cwd=tmp_path)
    assert "--model_name_or_path no-such-model-anywhere: neither a folder" in line


@pytest.mark.parametrize("flag, name", [("--train_set_file", "train.csv"), ("--test_set_file", "test.csv")])
def test_training_files_in_gbk_or_empty(tmp_path, flag, name):
    for content, message in (("语义\t索引\n".encode("gbk"), "GBK"), (b"", "the file is empty")):
        (tmp_path / "train.csv").write_text("语义索引\n", encoding="utf-8")
        (tmp_path / "test.csv").write_text("语义\t索引\n", encoding="utf-8")
        (tmp_path / name).write_bytes(content)
        line = refuse("train.py", "--device", "cpu", "--train_set_file", "train.csv", "--test_set_file", "test.csv",
                      cwd=tmp_path)
        assert flag in line and name in line and message in line
