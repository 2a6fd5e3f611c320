"""Folders for sentence-transformers: what is in them, and the vectors that are computed from them.

Most tests read a folder back without torch. The encoder's figures are then those of transformers that
hugging_face_values.json records; with --slow sentence-transformers itself is installed, and compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import export_model
import model as m
from simcse.console import InputError
from simcse.encoder import sentence_transformers_export as st
from simcse.encoder.encoder import Encoder
from simcse.encoder.pooling import POOLINGS
from simcse.encoder.pretrained import load_pretrained
from simcse.encoder.weights import read_safetensors
from simcse.text.prefixes import NO_PREFIXES
from simcse.text.wordpiece import WordPiece, load_tokenizer

import numpy as np
import paddle
import pytest
from conftest import ENCODER, refuse, succeed
from hugging_face_models import CONFIGS, weights_of, write_model
from paddlenlp.transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, ErnieConfig, ErnieModel
from tokenizers import Tokenizer
from training import NAME

VALUES = json.loads((Path(__file__).parent / "hugging_face_values.json").read_text(encoding="utf-8"))["values"]
PACKAGES = ["sentence-transformers==6.2.0", "torch==2.13.0", "transformers==5.24.0"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "max_position_embeddings": 40, "vocab_size": 17964}
ENCODERS = {  # PaddleNLP's, by name
    "ernie": lambda: ErnieModel(ErnieConfig(**SIZES, hidden_act="relu")),
    "ernie with tasks": lambda: ErnieModel(ErnieConfig(**SIZES, hidden_act="gelu", use_task_id=True, task_id=1)),
    "bert": lambda: BertModel(BertConfig(**SIZES, hidden_act="gelu", layer_norm_eps=1e-3))}
# Poolings with their with_pooler, and the modules between Transformer and Normalize.
MODULES = {("pooler", True): ["Pooling", "Dense"], ("pooler", False): ["Pooling"], ("cls", True): ["Pooling"],
           ("mean_all", True): ["Pooling"]}
LENGTH = 24  # tokens of a text
SETTINGS = st.ExportSettings(LENGTH, NO_PREFIXES)
TEXTS = ["语义检索", "国有企业引入非国有资本对创新绩效的影响——基于制造业国有上市公司的经验证据",
         "SimCSE: a Simple Method, NAÏVE café", "C++ ≠ C～, ①℃ $1,234.5% a+b=c",
         "面向生态系统服务的生态系统分类方案研发与应用" * 9, "[SEP] 与 [MASK] [CLS]", "x" * 300 + "文",
         "Ｆｕｌｌ　ｗｉｄｔｈ 〇零", "  面 向\t服务\u3000的 ", "e\u0301\u200b\u00ad 的", "图书馆学"]


def make_network(encoder="ernie", size=0, **options):
    """A network of random weights, all of which have an effect."""
    paddle.seed(1)
    network = m.SimCSE(ENCODERS[encoder](), output_emb_size=size, **options)
    for name, parameter in network.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.set_value(mean + 0.3 * paddle.randn(parameter.shape))
    network.eval()
    return network


def make_tokenizer(lowercase=True, kind="ErnieTokenizer"):
    return WordPiece(load_tokenizer(str(ENCODER)).vocab, lowercase, kind)


def save(folder, network, tokenizer=None, **more):
    """A checkpoint's folder; `more` is added to its record."""
    record = m.make_record(network, "encoder", LENGTH)
    m.save_checkpoint(str(folder), network, tokenizer or make_tokenizer(), {**record, **more})
    return folder


def export(checkpoint, folder):
    return succeed("export_model.py", "--params_path", checkpoint, "--output_path", folder, "--format",
                   "sentence_transformers")


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def encode(folder, texts):
    """The vectors of texts, each by itself, by what is in an exported folder."""
    embed = st.open_sentence_transformers(str(folder))
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rust.enable_truncation(read(folder, "sentence_bert_config.json")["max_seq_length"])
    rows = []
    for text in texts:
        ids = np.array([rust.encode(text).ids], "int64")
        rows.append(embed(ids, np.zeros_like(ids))[0])
    return np.stack(rows)


# ----------------------------------------------------------------------------------------------------------- the folder
def test_exported_folder(checkpoint, tmp_path):
    folder = tmp_path / "output"
    result = export(checkpoint, folder)
    assert set(os.listdir(folder)) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "vocab.txt", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "README.md",
        "1_Pooling", "2_Dense", "3_Dense"}
    assert result.stdout == "" and "in the layout of Hugging Face" not in result.stderr
    assert float(result.stderr.split("largest difference to the checkpoint's embeddings ")[1]) <= 1e-5
    config = read(folder, "config.json")
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertModel"])
    assert read(folder, "sentence_bert_config.json") == {"max_seq_length": 32, "do_lower_case": False}
    settings = read(folder, "config_sentence_transformers.json")
    assert settings["similarity_fn_name"] == "cosine" and "prompts" not in settings
    dense = [read(folder / f"{number}_Dense", "config.json") for number in (2, 3)]
    assert [(each["in_features"], each["out_features"], each["bias"]) for each in dense] == [
        (256, 256, True), (256, 128, True)]
    assert [each["activation_function"].rsplit(".", 1)[1] for each in dense] == ["Tanh", "Identity"]
    assert b'"format":"pt"' in (folder / "model.safetensors").read_bytes()[:200]


@pytest.mark.parametrize("size", [0, 8], ids=["no fc", "fc"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("pooling, with_pooler", MODULES)
def test_vectors_of_every_pooling(pooling, with_pooler, encoder, size, tmp_path):
    network = make_network(encoder, size, pooling=pooling, with_pooler=with_pooler)
    tokenizer = make_tokenizer()
    st.export_sentence_transformers(network, tokenizer, str(tmp_path), SETTINGS)
    types = [entry["type"] for entry in read(tmp_path, "modules.json")]
    modules = ["Transformer", *MODULES[pooling, with_pooler], *(["Dense"] if size else []), "Normalize"]
    assert types == [f"sentence_transformers.models.{module}" for module in modules]
    expected = Encoder(network, tokenizer, LENGTH).encode(TEXTS, warn=False)
    np.testing.assert_allclose(encode(tmp_path, TEXTS), expected, atol=1e-5)


def test_every_pooling_is_exported_or_refused():
    assert {pooling for pooling, _ in MODULES} == {
        name for name, pooling in POOLINGS.items() if pooling.sentence_transformers}
    assert {pooling.sentence_transformers for pooling in POOLINGS.values()} - {None} == set(st.POOLING_FIELDS)


def export_again(kind, pooling, folder):
    """Read an encoder from the layout of Hugging Face, and export a checkpoint of it."""
    write_model(folder / kind, kind)
    network = m.SimCSE(load_pretrained(str(folder / kind), uses_pooler=False), pooling=pooling)
    save(folder / "checkpoint", network, load_tokenizer(str(folder / kind)))
    export(folder / "checkpoint", folder / "output")
    return folder / "output"


@pytest.mark.parametrize("pooling, place", [("cls", "cls"), ("mean_all", "mean"), ("pooler", "pooler")])
@pytest.mark.parametrize("kind", CONFIGS)
def test_vectors_are_those_of_transformers(kind, pooling, place, tmp_path):
    expected = [value for value in VALUES[kind] if value.get(place)]
    if not expected:
        pytest.skip(f"{kind} has no {place}")
    embed = st.open_sentence_transformers(str(export_again(kind, pooling, tmp_path)))
    for value in expected:
        ids = np.array([value["ids"]], "int64")
        wanted = np.array(value[place]) / np.linalg.norm(value[place])
        np.testing.assert_allclose(embed(ids, np.zeros_like(ids))[0], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "ernie"])
def test_weights_are_those_that_were_read(kind, tmp_path):
    folder = export_again(kind, "cls", tmp_path)
    expected = weights_of(kind)
    tasks = expected.pop("embeddings.task_type_embeddings.weight", None)
    if tasks is not None:
        expected["embeddings.token_type_embeddings.weight"] += tasks[0]
    found = read_safetensors(str(folder / "model.safetensors"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    assert read(folder, "config.json")["layer_norm_eps"] == CONFIGS[kind]["layer_norm_eps"]


@pytest.mark.parametrize("encoder, pooling, size", [("ernie with tasks", "pooler", 8), ("bert", "mean_all", 0)])
def test_train_reads_the_folder(encoder, pooling, size, sample, tmp_path):
    """A checkpoint of the exported folder has vectors, length and prefixes of the checkpoint that was exported."""
    network = make_network(encoder, size, pooling=pooling)
    save(tmp_path / "checkpoint", network, query_prefix="q: ")
    export(tmp_path / "checkpoint", tmp_path / "output")
    succeed("train.py", "--device", "cpu", "--epochs", 0, "--model_name_or_path", "output", "--train_set_file",
            sample / "train_unsupervised.csv", cwd=tmp_path)
    again = m.load_model(str(tmp_path / "checkpoints" / "model_0" / NAME))
    assert (again.record["max_seq_length"], again.record["query_prefix"]) == (LENGTH, "q: ")
    expected = Encoder(network, make_tokenizer(), LENGTH).encode(TEXTS, warn=False)
    np.testing.assert_allclose(Encoder(again.model, again.tokenizer, LENGTH).encode(TEXTS, warn=False), expected,
                               atol=1e-5)


@pytest.mark.parametrize("prefixes", [{"query_prefix": "为这个句子生成表示："}, {"document_prefix": "passage: "},
                                      {"query_prefix": "query: ", "document_prefix": "passage: "}])
def test_prompts(prefixes, tmp_path):
    export(save(tmp_path / "checkpoint", make_network(pooling="cls"), **prefixes), tmp_path / "output")
    assert read(tmp_path / "output", "config_sentence_transformers.json")["prompts"] == {
        "query": prefixes.get("query_prefix", ""), "document": prefixes.get("document_prefix", "")}


def test_a_later_export_leaves_no_module_of_an_earlier_one(tmp_path):
    for size in (8, 0):
        save(tmp_path / f"checkpoint_{size}", make_network(size=size, pooling="cls"))
        export(tmp_path / f"checkpoint_{size}", tmp_path / "output")
    assert not (tmp_path / "output" / "2_Dense").exists()


@pytest.mark.parametrize("name", ["model_state.pdparams", "manifest.json", "pytorch_model.bin", "model.safetensors"])
def test_a_folder_that_is_no_export_is_not_written_to(name, tmp_path):
    folder = save(tmp_path / "checkpoint", make_network(pooling="cls"))
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / name).write_text("")
    line = refuse("export_model.py", "--params_path", folder, "--format", "sentence_transformers", cwd=tmp_path)
    assert f"--output_path ./output: holds {name}, so it is a checkpoint, an encoder or an index; name another" in line


# -------------------------------------------------------------------------------------------------------- the tokenizer
@pytest.mark.parametrize("kind", ["ErnieTokenizer", "BertTokenizerFast"])
@pytest.mark.parametrize("lowercase", [True, False])
def test_tokens(kind, lowercase, tmp_path):
    """What the tokenizers library makes of tokenizer.json, which is all that transformers reads for this class."""
    tokenizer = make_tokenizer(lowercase, kind)
    network = make_network(pooling="cls")
    st.export_sentence_transformers(network, tokenizer, str(tmp_path), SETTINGS)
    rust = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.enable_truncation(LENGTH)
    assert [encoding.ids for encoding in rust.encode_batch(TEXTS)] == list(tokenizer(TEXTS, LENGTH))
    config = read(tmp_path, "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["model_max_length"] == LENGTH
    assert config["split_special_tokens"], "as [SEP] in a text is text"
    names = {name: config[name] for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")}
    assert names == read(tmp_path, "special_tokens_map.json") == {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def test_a_tokenizer_json_is_copied(tmp_path):
    """Of a tokenizer that is no WordPiece; its special tokens stay special tokens."""
    rust = Tokenizer.from_file(str(write_rust(tmp_path)))
    rust.add_special_tokens(["<x>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    (tmp_path / "output").mkdir()
    st.export_sentence_transformers(make_network(pooling="cls"), tokenizer, str(tmp_path / "output"),
                                    SETTINGS)
    config = read(tmp_path / "output", "tokenizer_config.json")
    assert (config["pad_token"], config["unk_token"], config["split_special_tokens"]) == ("[PAD]", "[UNK]", False)
    assert load_tokenizer(str(tmp_path / "output"))(["语<x>义"], 9) == tokenizer(["语<x>义"], 9)


def write_rust(folder):
    make_tokenizer().save_rust(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    return folder / "tokenizer.json"


# ----------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("pooling", [name for name, pooling in POOLINGS.items() if not pooling.sentence_transformers])
def test_a_pooling_that_sentence_transformers_does_not_have(pooling, tmp_path):
    folder = save(tmp_path / "checkpoint", make_network(), pooling=pooling)
    line = refuse("export_model.py", "--params_path", folder, "--format", "sentence_transformers", cwd=tmp_path)
    assert line.startswith(f"export_model.py: error: --format sentence_transformers: --params_path {folder / NAME} has "
                           f"--pooling {pooling}, which sentence-transformers does not have")
    assert line.endswith("use --format onnx") and os.listdir(tmp_path) == ["checkpoint"]


def test_another_encoder(tmp_path):
    electra = ElectraModel(ElectraConfig(**SIZES, embedding_size=16))
    folder = save(tmp_path / "checkpoint", m.SimCSE(electra, pooling="cls"))
    line = refuse("export_model.py", "--params_path", folder, "--format", "sentence_transformers", cwd=tmp_path)
    assert f"{NAME} has the encoder ElectraModel; only BertModel and ErnieModel are supported" in line
    with pytest.raises(InputError, match="checkpoint has the encoder ElectraModel; only BertModel and ErnieModel"):
        st.check_supported({"encoder_class": "ElectraModel"}, "checkpoint")
    st.check_supported({}, "checkpoint")
    with pytest.raises(InputError, match="checkpoint: pooling 'max' is none of pooler, cls"):
        st.check_supported({"pooling": "max"}, "checkpoint")


@pytest.mark.parametrize("change, message", [
    (lambda encoder: encoder.add_sublayer("extra", paddle.nn.Linear(2, 2)), "BERT has no extra.weight, extra.bias"),
    (lambda encoder: setattr(encoder.embeddings.layer_norm, "_epsilon", 0.5), "layer norms differ in epsilon: "),
    (lambda encoder: setattr(encoder.config, "hidden_act", "gelu_new"), "hidden_act gelu_new is not supported; gelu")])
def test_an_encoder_that_is_not_bert(change, message, tmp_path):
    network = make_network(pooling="cls")
    change(network.ptm)
    with pytest.raises(InputError, match=f"--format sentence_transformers: .*{message}"):
        st.export_sentence_transformers(network, make_tokenizer(), str(tmp_path), SETTINGS)


def test_a_tokenizer_without_tokenizer_json(tmp_path):
    with pytest.raises(InputError, match="the encoder's tokenizer is not ERNIE's or BERT's, and has no tokenizer.json"):
        st.export_sentence_transformers(make_network(pooling="cls"), object(), str(tmp_path), SETTINGS)


def test_one_folder_holds_one_format(exported, checkpoint, tmp_path):
    flags = ["export_model.py", "--params_path", checkpoint, "--output_path"]
    line = refuse(*flags, exported, "--format", "sentence_transformers")
    assert f"--output_path {exported}: holds inference." in line
    assert line.endswith("which is not of --format sentence_transformers; name another folder")
    export(checkpoint, tmp_path / "output")
    assert f"--output_path {tmp_path / 'output'}: holds 1_Pooling, which is not of" in refuse(
        *flags, tmp_path / "output")
    assert "--precision int8 needs --format openvino" in refuse(*flags, tmp_path / "new", "--precision", "int8",
                                                               "--format", "sentence_transformers")


def test_what_differs_is_not_written(checkpoint, tmp_path, monkeypatch):
    """A transposed matrix, as if the writer had a mistake."""
    loaded = m.load_model(str(checkpoint / NAME))
    export(checkpoint, tmp_path / "output")
    embed = st.open_sentence_transformers(str(tmp_path / "output"))
    assert export_model.check_embeddings(loaded, embed) <= 1e-5
    monkeypatch.setattr(st, "MATRICES", st.MATRICES - {"self_attn.q_proj.weight"})
    (tmp_path / "wrong").mkdir()
    st.export_sentence_transformers(loaded.model, loaded.tokenizer, str(tmp_path / "wrong"), SETTINGS)
    embed = st.open_sentence_transformers(str(tmp_path / "wrong"))
    with pytest.raises(InputError, match="the exported embeddings differ from the checkpoint.s by .*; nothing"):
        export_model.check_embeddings(loaded, embed)


# ------------------------------------------------------------------------------------------------ sentence-transformers
@pytest.fixture(scope="module")
def python(request, tmp_path_factory):
    """A Python that has sentence-transformers; SENTENCE_TRANSFORMERS_PYTHON names one that is there already."""
    if not request.config.getoption("--slow"):
        pytest.skip(f"only with --slow: makes an environment and installs {', '.join(PACKAGES)}")
    if "SENTENCE_TRANSFORMERS_PYTHON" in os.environ:
        return os.environ["SENTENCE_TRANSFORMERS_PYTHON"]
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", "numpy", *PACKAGES], check=True)
    return folder / "bin" / "python"


def test_vectors_are_those_of_sentence_transformers(python, checkpoint, tmp_path):
    """Each pooling with and without fc, tokenizers that lower case and that do not, and a trained checkpoint."""
    prefixes = {"query_prefix": "查询: ", "document_prefix": "Document: "}
    checkpoints = {"trained": checkpoint}
    for number, (pooling, with_pooler) in enumerate(MODULES):
        for size in (0, 8):
            for kind in ("ErnieTokenizer", "BertTokenizerFast"):
                encoder = list(ENCODERS)[(number + (size > 0)) % len(ENCODERS)]
                name = f"{pooling}_{with_pooler}_{size}_{kind}"
                tokenizer = make_tokenizer(lowercase=kind == "ErnieTokenizer" or size > 0, kind=kind)
                network = make_network(encoder, size, pooling=pooling, with_pooler=with_pooler)
                checkpoints[name] = save(tmp_path / name, network, tokenizer, **prefixes)
    cased = make_tokenizer(lowercase=False)
    checkpoints["cased"] = save(tmp_path / "cased", make_network("bert", pooling="mean_all"), cased, **prefixes)

    jobs = []
    for name, folder in checkpoints.items():
        export(folder, tmp_path / f"{name}_output")
        jobs.append({"folder": f"{tmp_path}/{name}_output", "texts": TEXTS, "output": f"{tmp_path}/{name}.npz"})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("encode_by_sentence_transformers.py")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, script, tmp_path / "jobs.json"], check=True, env={**environment, "HF_HUB_OFFLINE": "1"})

    largest = 0.0
    for name, folder in checkpoints.items():
        network, tokenizer, record = m.load_model(str(folder / NAME))
        length = record["max_seq_length"]
        encoder = Encoder(network, tokenizer, length)
        given = prefixes if name != "trained" else {}
        found = np.load(tmp_path / f"{name}.npz")
        ids = np.split(found["flat_ids"], np.cumsum(found["lengths"])[:-1])
        assert [row.tolist() for row in ids] == list(tokenizer(TEXTS, length)), name
        for place, prefix in (("plain", ""), ("query", given.get("query_prefix", "")),
                              ("document", given.get("document_prefix", ""))):
            expected = encoder.encode([prefix + text for text in TEXTS], warn=False)
            difference = float(abs(found[place] - expected).max())
            assert difference <= 1e-5, (name, place, difference)
            largest = max(largest, difference)
        np.testing.assert_allclose(found["cosines"], found["plain"][:2] @ found["plain"][:3].T, atol=1e-5)
    print(f"{len(checkpoints)} folders, largest difference {largest:.2g}")
