"""int8 in OpenVINO: what is quantized, how near it stays, where it is kept, and who runs it."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import model as m
from simcse.console import InputError
from simcse.encoder import engine, int8_check
from simcse.encoder import openvino as int8
from simcse.encoder.engine import make_engine
from simcse.encoder.int8_check import COMPARISONS_FILE, TextSource, read_comparisons
from simcse.encoder.kept_graph import FINGERPRINT_FILE, KeptGraph
from simcse.encoder.paddle_patches import read_signal_stack
from simcse.index.manifest import Manifest
from simcse.text.prefixes import NO_PREFIXES

import numpy as np
import pytest
from conftest import ENCODER, FP32, ROOT, Service, contents, read_texts, refuse, run_script, succeed

for package in ("openvino", "nncf", "paddle2onnx"):
    pytest.importorskip(package, reason=f"no {package}: pip install -r requirements-openvino.txt", exc_type=ImportError)
INT8 = ["--device", "cpu", "--precision", "int8"]


@pytest.fixture(scope="module")
def quantized(checkpoint, sample, tmp_path_factory):
    """A copy of the checkpoint beside which recall.py has made the int8 graph, the index that it kept, and its run."""
    folder = tmp_path_factory.mktemp("int8")
    shutil.copytree(checkpoint, folder / "model", ignore=shutil.ignore_patterns("*.graph"))
    result = succeed("recall.py", *INT8, "--params_path", folder / "model", "--corpus_file", sample / "corpus.csv",
                     "--query", "语义检索", "--index_path", folder / "index")
    return folder / "model", folder / "index", result


@pytest.fixture(scope="module")
def int8_export(quantized, tmp_path_factory):
    """The graph beside the checkpoint, exported by the command line: folder and process."""
    folder = tmp_path_factory.mktemp("int8") / "output"
    result = succeed("export_model.py", "--params_path", quantized[0], "--output_path", folder, "--format", "openvino",
                     "--precision", "int8")
    return folder, result


def vectors(script, folder, texts, path, *flags, env=None):
    """What a script writes of a file of texts, and what it says."""
    result = succeed(*script, folder, "--device", "cpu", "--input_file", texts, "--output_file", path, *flags, env=env)
    return np.load(path), result.stderr


STAGE = ("inference.py", "--params_path")
DEPLOYED = ("deploy/python/predict.py", "--model_dir")


def test_recall_makes_it_once_and_says_what_it_costs(quantized, sample):
    folder, index, result = quantized
    assert result.stdout.startswith("语义检索\t") and result.stdout.count("\n") == 10
    assert ("int8 graph calibrated with 60 texts of corpus.csv; cosine to fp32 on 60 texts of "
            f"{sample / 'corpus.csv'}: 0.99") in result.stderr
    assert "encoding and indexing 119 of 120 documents in int8" in result.stderr
    record = json.loads((folder / "model_state.int8" / "simcse_config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((sample / "corpus.csv").read_bytes()).hexdigest()
    assert record["calibration"] == {"file": "corpus.csv", "sha256": digest, "texts": 60}
    assert Manifest.load(str(index), "", "").calibration == digest
    assert record["precision"] == "int8" and 0.99 < record["int8_cosines"]["lowest"] <= record["int8_cosines"]["mean"]


def test_a_second_start_needs_openvino_alone_and_is_near_fp32(quantized, sample, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(['nncf', 'paddle2onnx', 'onnx', 'paddlenlp']))\n")
    found, said = vectors(STAGE, quantized[0], sample / "corpus.csv", tmp_path / "v.npy", "--precision", "int8",
                          env={"PYTHONPATH": str(tmp_path)})
    assert "quantizing" not in said and "calibrated with 60 texts of corpus.csv; cosine to fp32 on 60 texts" in said
    exact, _ = vectors(STAGE, quantized[0], sample / "corpus.csv", tmp_path / "exact.npy", *FP32)
    cosines = (found * exact).sum(axis=1)
    assert cosines.min() > 0.98 and abs(found - exact).max() > 1e-3  # near, and not the same
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)


def test_weights_are_int8_but_for_the_fc_and_attention_has_none(quantized):
    """The encoder's 4 layers have 6 products with weights and 2 without each."""
    import openvino

    graph = openvino.Core().read_model(quantized[0] / "model_state.int8" / "inference.xml")
    products = [each for each in graph.get_ordered_ops() if each.get_type_name() == "MatMul"]

    def sources(node):
        """The kinds and types of what a product's inputs are made of, up to what is not mere conversion."""
        found, stack = set(), [each.get_source_output().get_node() for each in node.inputs()]
        while stack:
            source = stack.pop()
            found.add((source.get_type_name(), source.get_element_type().get_type_name()))
            if source.get_type_name() in ("Convert", "Multiply", "Subtract"):
                stack += [each.get_source_output().get_node() for each in source.inputs()]
        return found

    of_int8 = [bool({("Constant", "i8"), ("Constant", "u8")} & sources(each)) for each in products]
    assert len(products) == 4 * 8 + 1 + 1 and sum(of_int8) == 4 * 6 + 1  # the pooler's is one, the fc's is not
    assert not of_int8[-1] and ("Constant", "f32") in sources(products[-1])
    fed = [("FakeQuantize", "f32") in sources(each) for each in products]
    assert fed == of_int8, "activations are quantized where weights are"


def test_the_export_is_the_kept_graph_and_runs_without_paddle(quantized, int8_export, sample, tmp_path):
    folder, result = int8_export
    assert "cosine of int8 to fp32 0.99" in result.stderr and "quantizing" not in result.stderr
    assert set(os.listdir(folder)) == {"inference.xml", "inference.bin", "simcse_config.json", "tokenizer.json",
                                       "tokenizer_config.json", "vocab.txt"}
    kept = quantized[0] / "model_state.int8" / "inference.bin"
    assert (folder / "inference.bin").read_bytes() == kept.read_bytes()
    assert kept.stat().st_size < 0.8 * (quantized[0] / "model_state.pdparams").stat().st_size
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(['nncf', 'paddle', 'onnxruntime', 'simcse']))\n")
    deployed, said = vectors(DEPLOYED, folder, sample / "corpus.csv", tmp_path / "deployed.npy",
                             env={"PYTHONPATH": str(tmp_path)})
    assert "predict.py: cpu" in said and "int8 calibrated with 60 texts of corpus.csv; " in said
    stage, _ = vectors(STAGE, quantized[0], sample / "corpus.csv", tmp_path / "stage.npy", "--precision", "int8")
    np.testing.assert_allclose(deployed, stage, atol=1e-5)
    assert "--precision fp32: --model_dir" in (line := refuse(*DEPLOYED, folder, "--device", "cpu", *FP32))
    assert "was exported in int8" in line


def test_openvino_in_fp32_is_the_network(checkpoint, exported, sample, tmp_path):
    folder = tmp_path / "output"
    succeed("export_model.py", "--params_path", checkpoint, "--output_path", folder, "--format", "openvino")
    found, _ = vectors(DEPLOYED, folder, sample / "corpus.csv", tmp_path / "found.npy", *FP32)
    expected, _ = vectors(DEPLOYED, exported, sample / "corpus.csv", tmp_path / "expected.npy", *FP32)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert f"--output_path {folder}: holds inference." in refuse("export_model.py", "--params_path", checkpoint,
                                                                 "--output_path", folder)


def test_the_service_finds_what_recall_does(quantized, int8_export, exported, tmp_path):
    pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
    from deploy.serving.opening import open_searcher

    model, index, result = quantized
    args = SimpleNamespace(model_dir=str(exported), index_path=str(index), milvus_uri=None, device="cpu", cpu_threads=0,
                           precision=None, distinct=False, query_prefix=None)
    with pytest.raises(InputError, match="--precision int8: --model_dir .* was exported in fp32.* names another"):
        open_searcher(args)
    service = Service(tmp_path, "--model_dir", int8_export[0], "--index_path", index)
    try:
        hits, = service.ask("/search", {"queries": ["语义检索"], "top_k": 10})[2]["results"]
        assert "int8 graph calibrated with 60 texts of corpus.csv\n" in service.log.read_text(encoding="utf-8")
    finally:
        service.stop()
    expected = [line.split("\t")[1:] for line in result.stdout.splitlines()]
    assert [hit["document"] for hit in hits] == [document for document, _ in expected]
    np.testing.assert_allclose([hit["cosine"] for hit in hits], [float(cosine) for _, cosine in expected], atol=1e-4)


@pytest.fixture
def arguments(checkpoint, tmp_path):
    """Flags of a stage in fp32, of a copy of the checkpoint without a graph."""
    folder = shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.graph", "*.int8"))
    return SimpleNamespace(params_path=str(folder / "model_state.pdparams"), model_name_or_path=None,
                           output_emb_size=None, device="cpu", cpu_threads=0, precision="fp32", calibration_file=None,
                           max_seq_length=64, batch_size=16, query_prefix=None, document_prefix=None)


def test_float_graphs_are_openvinos_on_a_processor_with_amx(arguments, monkeypatch, capsys):
    monkeypatch.setattr(engine, "CPU_HAS_AMX", False)
    slow = m.load_encoder_for(arguments)
    monkeypatch.setattr(engine, "CPU_HAS_AMX", True)
    stack = read_signal_stack().address
    first, again = m.load_encoder_for(arguments), m.load_encoder_for(arguments)
    assert read_signal_stack().address == stack, "Ctrl-C would be a segmentation fault when both are freed"
    assert capsys.readouterr().err.count("kept the graph") == 2
    assert [type(each.engine) for each in (slow, first, again)] == [engine.PaddleEngine, *[engine.OpenVinoEngine] * 2]
    texts = [f"第{number}条" + "语义检索" * (number % 7) for number in range(300)]
    vectors = [each.encode(texts, warn=False) for each in (slow, first, again)]
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
    np.testing.assert_array_equal(vectors[2], vectors[1])


def test_what_openvino_cannot_run_paddle_does(arguments, monkeypatch, capsys):
    def refuse_it(model, folder):
        raise InputError("paddle2onnx cannot convert the network: it is strange")

    monkeypatch.setattr(engine, "CPU_HAS_AMX", True)
    monkeypatch.setattr(int8, "export_onnx", refuse_it)
    for _ in range(2):
        assert type(m.load_encoder_for(arguments).engine) is engine.PaddleEngine
    assert capsys.readouterr().err.count("it is strange; Paddle Inference runs it instead\n") == 1


def test_batches_under_way_keep_their_results(quantized):
    """Four of different lengths, the last read first."""
    opened = engine.OpenVinoEngine(str(quantized[0] / "model_state.int8"), "int8")
    batches = [np.random.default_rng(length).integers(5, 1000, (3, length)) for length in (9, 5, 7, 6)]
    alone = [np.asarray(opened.embed(ids, ids * 0)) for ids in batches]
    pending = [opened.embed(ids, ids * 0) for ids in batches]
    for expected, embeddings in reversed([*zip(alone, pending)]):
        assert isinstance(embeddings, int8.PendingEmbeddings)
        np.testing.assert_array_equal(np.asarray(embeddings), expected)


@pytest.fixture
def copied(quantized, tmp_path):
    """A copy of the checkpoint with its int8 graph: the file of weights."""
    return str(shutil.copytree(quantized[0], tmp_path / "model") / "model_state.pdparams")


def test_a_file_is_compared_with_the_network_once(copied, sample, capsys):
    texts = read_texts(sample / "train_unsupervised.csv")
    remembered = Path(copied).with_name("model_state.int8") / COMPARISONS_FILE
    loads = []
    for start in range(4):
        if start == 2:
            remembered.write_text('{"a": 1}')  # damaged: it is compared again
        m.Encoder.load(copied, precision="int8", calibration_texts=texts)
        stderr = capsys.readouterr().err
        assert "calibrated with 60 texts of corpus.csv; cosine to fp32 on 64 texts of calibration_texts: 0.99" in stderr
        loads.append("the network is loaded" in stderr)
    assert loads == [True, False, True, False]


def test_calibrated_on_english_it_is_refused_for_chinese_and_not_kept(copied, sample, tmp_path):
    english = tmp_path / "english.txt"
    english.write_text("".join(f"sentence number {number} about retrieval\n" for number in range(32)))
    before = contents(Path(copied).with_name("model_state.int8"))
    line = refuse("inference.py", *INT8, "--params_path", copied, "--input_file", sample / "corpus.csv",
                  "--calibration_file", english)
    assert f"--precision int8: cosine to fp32 on 60 texts of {sample / 'corpus.csv'}: 0." in line
    assert "below 0.98; the graph was calibrated with 16 texts of english.txt: calibrate it with texts like" in line
    assert contents(Path(copied).with_name("model_state.int8")) == before


def test_it_is_of_the_calibration_file_that_is_named(copied, sample, tmp_path):
    """One calibrated with another file is not used; without a file any is."""
    one, other = sample / "corpus.csv", sample / "train_unsupervised.csv"
    folder = shutil.copytree(KeptGraph(copied, "int8").folder, tmp_path / "exported",
                             ignore=shutil.ignore_patterns(FINGERPRINT_FILE, COMPARISONS_FILE))
    for calibration_file, is_current in ((None, True), (one, False), (other, False)):
        assert KeptGraph(copied, "int8", None, calibration_file).is_current() == is_current
    assert KeptGraph(copied, "int8", None, one).keep(str(folder), {"output_emb_size": 128})
    for calibration_file, is_current in ((None, True), (one, True), (other, False)):
        assert KeptGraph(copied, "int8", None, calibration_file).is_current() == is_current
    assert not read_comparisons(KeptGraph(copied, "int8").folder)


def test_few_texts_are_refused_and_nothing_is_kept(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    for flags, texts_are in ([], "1 text is"), (["--calibration_file", tmp_path / "few"], "3 texts are"):
        (tmp_path / "few").write_text("一\n二\n三\n", encoding="utf-8")
        line = refuse("inference.py", *INT8, "--params_path", folder, "--text", "语义", *flags)
        assert f"has no int8 graph beside it yet, and {texts_are} too few" in line
    assert not (folder / "model_state.int8").exists()


def encoder_of(vector_of):
    """An encoder of texts by a function; it knows no text that is "[UNK]"."""
    def tokenize(texts):
        return SimpleNamespace(ids=texts, unknown=[row for row, text in enumerate(texts) if text == "[UNK]"])

    return SimpleNamespace(max_seq_length=64, prefixes=NO_PREFIXES, tokenize=tokenize,
                           embed=lambda inputs: np.array([vector_of(text) for text in inputs.ids], "float32"))


def test_each_source_is_compared_once_and_a_far_one_refused(capsys):
    near, far = [f"近 {number}" for number in range(1000)], ["近", "远", "[UNK]"]
    network = encoder_of(lambda text: [1, 0])
    graph = encoder_of(lambda text: [-1, 0] if text == "远" else [0, 0] if text == "[UNK]" else [1, 0])
    loads = []

    def load():
        loads.append(1)
        return network

    def check(sources, known):
        record = {"file": "corpus.csv", "sha256": None, "texts": 60}
        return int8_check.check_int8(graph, load, sources, calibration=record, known=known)

    source = TextSource("near.csv", near)
    known = check([source, source, TextSource("none", []), TextSource("unknown.csv", ["[UNK]"])], {})
    assert capsys.readouterr().err == (
        "int8 graph calibrated with 60 texts of corpus.csv; cosine to fp32 on 63 texts of near.csv: 1.0000 on the "
        "mean, 1.0000 at lowest; unknown.csv has no text that the encoder knows\n")
    assert check([source], known) == dict([*known.items()][:1]) and len(loads) == 1
    with pytest.raises(InputError, match="cosine to fp32 on 2 texts of far.csv: 0.0000 on the mean, -1.0000 at lowest; "
                                         "the mean is below 0.98; the graph was calibrated with 60 texts of .*bf16 or"):
        check([source, TextSource("far.csv", far)], known)


@pytest.mark.parametrize("rows", [32, 64, 65, 150, 500, 6092])
def test_a_long_file_is_compared_on_other_texts_than_it_calibrates(rows):
    texts = [str(row) for row in range(rows)]
    calibration = int8_check.choose_calibration(TextSource("corpus.csv", texts), "weights").texts
    sample = int8_check.pick_sample(texts)
    assert 16 <= len(calibration) <= 128 and 32 <= len(sample) <= 64
    assert rows <= 64 or not {*calibration} & {*sample}
    assert rows > 64 or sample == texts
    pairs = int8_check.pick_sample([(text, text) for text in texts])
    assert pairs[::2] == sample


def test_first_avg_has_no_products_to_quantize():
    from simcse.encoder.pretrained import load_pretrained

    network = m.SimCSE(load_pretrained(str(ENCODER)), pooling="first_avg")
    with pytest.raises(InputError, match="--precision int8: pooling first_avg is computed in fp32"):
        make_engine(network, "int8")


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_is_one_line(checkpoint, sample, tmp_path, package):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    result = run_script("inference.py", *INT8, "--params_path", checkpoint, "--input_file", sample / "corpus.csv",
                        env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{package} is not installed; pip install -r requirements-openvino.txt" in result.stderr.splitlines()[-1]


def test_recall_of_real_text_stays(real_data, tmp_path):
    """Recall@k of 300 titles among 1,500 abstracts, whitened, within 1 of fp32's."""
    from simcse.measures import rank_first_targets

    folder, recall = real_data / "csl" / "recall", {}
    texts = read_texts(folder / "corpus.csv")[:1500]
    pairs = [line.split("\t") for line in (folder / "dev.csv").read_text(encoding="utf-8").splitlines()]
    pairs = [(query, target) for query, target in pairs if target in set(texts)][:300]
    (tmp_path / "texts").write_text("\n".join(texts[:500]), encoding="utf-8")
    succeed("train.py", "--device", "cpu", "--epochs", 0, "--pooling", "first_last_avg", "--whiten", "--max_seq_length",
            64, "--model_name_or_path", ENCODER, "--train_set_file", tmp_path / "texts", cwd=tmp_path)
    for precision in ("int8", "fp32"):
        encoder = m.Encoder.load(str(tmp_path / "checkpoints" / "model_0_whitened"), precision=precision,
                                 calibration_texts=texts)
        documents = encoder.encode(texts, warn=False)
        queries = encoder.encode([query for query, _ in pairs], warn=False)
        best = np.argsort(-queries @ documents.T, axis=1)[:, :50]
        ranks = rank_first_targets(best, [{texts.index(target)} for _, target in pairs])
        recall[precision] = np.array([(ranks < k).mean() for k in (1, 5, 10, 20, 50)])
    assert abs(recall["int8"] - recall["fp32"]).max() <= 0.01
    assert recall["fp32"][0] > 0.5


def test_requirements_are_pinned_alike():
    pins = [(ROOT / f"requirements-{name}.txt").read_text(encoding="utf-8") for name in ("onnx", "openvino")]
    for package in ("paddle2onnx", "onnx"):
        line, = (line for line in pins[0].splitlines() if line.startswith(f"{package}=="))
        assert line in pins[1].splitlines()
