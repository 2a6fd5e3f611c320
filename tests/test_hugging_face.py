"""Encoders in the layout of Hugging Face's transformers: their vectors and tokens against transformers' own."""

import base64
import json
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path

import model as m
from deploy.python import encoder as deployed
from deploy.python import predictor
from simcse.console import InputError
from simcse.encoder.encoder import Encoder
from simcse.encoder.hugging_face import read_hugging_face
from simcse.encoder.pretrained import load_pretrained
from simcse.encoder.torch_file import read_torch_file
from simcse.encoder.weights import read_safetensors
from simcse.hub_layout import is_hugging_face
from simcse.text.wordpiece import RustTokenizer, load_tokenizer
from simcse.training.masked_lm import load_masked_lm

import numpy as np
import paddle
import pytest
from conftest import succeed
from hugging_face_models import (
    CONFIGS,
    HEADS,
    TEXTS,
    VOCABULARY,
    weights_of,
    weights_with_head,
    write_model,
)
from paddlenlp.transformers import BertConfig, BertModel
from safetensors.numpy import save_file
from scipy.special import erf

VALUES = json.loads((Path(__file__).parent / "hugging_face_values.json").read_text(encoding="utf-8"))["values"]
# What torch 2.14 has written by torch.save, today and in the format of before 1.6: tensors of several types and views.
TORCH_FILE = (
    "eNqtVctrE0EYn2TTTdzW9OGjD2t9VqPWdPNqGsU2LrIIK5hGhSBC2Cbb7uKa+CXTioIQkBYED+rBo3jxL/Bgb/oHePHgzYMgKJ48"
    "enVmt0l3Jm1TH0MmCZv5Pb6Z+X7JaUIAoVAItY0+NID0Wsm0lo3Jso716N3btqqE0U1mNPwPAUUKPgLQwVfCVYKIFpewZdelYs2Y"
    "X7LschEblXq1VlyOS+CPRApBsrhOVuqLBgguRFLtqo6vuQ8lCDiEMnQVBPJZursEoiZiCM5pSPNrwiqENEHzrcKux6VS1baNEraq"
    "lbp0tVY2akb5klXCEkin8tCNoScPuwukRGTq9gKETWLAbIpeJo9amr2OZgz6TFHzYeinWr4VGKBvex6blG4vhn152F/wk4XzCzDI"
    "kClOCbGpFuGQQxiHYdMxP0IJBc2/Cgc0H61h1CU9iGEsD4ccj8uWcQ8Ou7SmuwkJOELwEoajcwQdWIFj1NBxFzuO4UQeTjq7ZJXr"
    "EGEcXalWFltuTjlsSThN2AQMZxw3KzBB2c66bFEMk3mQl6I5LRjaMzxnfiIQOnNbXpJBdKJ1SaIL1dodHReXjVqdHIeqHOXuymYj"
    "RrXe/vz8iLqjc2utEZTe0Fq/P0XdthYrd4wKVpXEDuTaxlSSGpi9Bz/oofq3NdCPZlsG5u9jo0qvm6qc/xvd5rAtjG2Deli58HVY"
    "JCrith7CaIbpyklZVc79gwGXtTFL3rLkRWaDzFdZ6mjw6fdnQ+SHoQ6OJlhHMVWJ7NgRmqFK13vXGp33P4wUVimuKjP/svlO/aT2"
    "bDbbyLo1vzny5VwP0erp4GSadZJQlST6n/uP0Hsyv5CJLpIsvki9Wd9ff4uQB5EO3kZZb0lVGULb67uth9ZPADn8wdCHW0+udj7/"
    "XnSmpddq/ZM73YyERJU+vly80fn8x1B8IwCc0upGzSIJ8ECn+V+0yqoS/cNTkOVUKpaRY9OpRFxOpDJyejodS2fSqXQmk5Kn0ulU"
    "Qs7EZSclAtfXyhv773O2qunTG5d9bc75/1Ee7Q3AQQY57kdbBSxP4g2xEYbkmZekLTl5Hm8Q9TM8AwJqD0Ae7k2NMAN/ISAuu3is"
    "NwdYbCTAYWM81tu5LPY5j43zWG9nsdjRLg6b4LHeLmGxazw2yWO9976XrVdEfFfxYO91HGML9oA3b5ScJooTzbYSzraQ3dznu/U8"
    "mA42Y0F0vv3atREbOa1LdDHdznp37W8xqzSn"
)
OLD_TORCH_FILE = (
    "eNqFkktv00AQx/2KA4aW8KY8W54uj5C6abAv4CJUIS0Fai6+ICu1t7WRZWfsTRBIlXJJRPkMHHrkY/BRuPIRkDgwazehiSKx8uzK"
    "s7O/+c/O9qWvWvzn28bvxQ/f3y7U+9LmLxnnPRB0tyYIQidLWeqnsdejWR6lCYgY4M7hThwxFlOPJkHUTkD64mroZJ861MujzzQH"
    "eQ8U3a2gMw/TjEGFSK6Mf1HCQCWKq3BGmuxClSjd7iiniN42iD5LMz+se10WxbnmZXS7G8WBx2iSp5nXMzSQdN2tcjhGtncpyOUR"
    "bSNO2+xd6dRAcecxxmoa1qq1ZjWMVbPZgEqhw+90UYf6mkF1iwhEIvIQjhGZiEM4vu9jyTH1GVaca2+ygGY0eBH5TANt2YETDE46"
    "MFeUELbjHZgPUU44kvASXWMFp6YUPLHMJtRClYiY+TTPLA7gDJ/O7occfo7BeQcuuBIe296BixPo50V5K60x/tIU3lwxTFgIy8Iu"
    "c7xMpCFcISKv72qZ4hqD6w7cKPT3IvoRFssk4ZHrMptGq7VmmA1YQpqGtJtbyFIGcIuLvV2S7jC468C9srFBDvqE2lfY3rHS5Sl2"
    "q9Uw4T6yZWQ/KJQO4CFnPyrZdQaPHWjwp/GeP40Z0sRZTGlWz+VZbVBmXV6F1vlL/jf6z3Cy8UProx2g/UD7iSasC0JtXRYmh3i4"
    "Soer+h/eKF54qh6Nsm27bx/YfwE8GdpW"
)


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "bert", "bert")
    return tmp_path / "bert"


def load(folder, **more):
    encoder = load_pretrained(str(folder), uses_pooler=False, **more)
    encoder.eval()
    return encoder


def check_vectors(encoder, kind):
    """Compare an encoder's outputs with those of transformers."""
    for expected in VALUES[kind]:
        states, pooled = (output.numpy()[0] for output in encoder(paddle.to_tensor([expected["ids"]])))
        np.testing.assert_allclose(states[0], expected["cls"], atol=1e-5)
        np.testing.assert_allclose(states.mean(axis=0), expected["mean"], atol=1e-5)
        if expected.get("pooler"):
            np.testing.assert_allclose(pooled, expected["pooler"], atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_vectors_are_those_of_transformers(kind, tmp_path, capsys):
    write_model(tmp_path / kind, kind)
    check_vectors(load(tmp_path / kind), kind)
    assert f"{kind} in the layout of Hugging Face, model.safetensors: 2 layers of 16\n" in capsys.readouterr().err


def test_a_file_with_a_head_and_old_names(folder):
    """As BertForMaskedLM and early versions wrote it."""
    weights = {}
    for name, array in weights_of("bert").items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        weights[f"bert.{name}"] = array
    weights["cls.predictions.bias"] = np.zeros(len(VOCABULARY), "float32")
    weights["bert.embeddings.position_ids"] = np.arange(40)[None]
    save_file(weights, str(folder / "model.safetensors"))
    check_vectors(load(folder), "bert")


def test_weights_in_several_files(folder):
    weights = weights_of("bert")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{number % 2 + 1}.safetensors" for number, name in enumerate(weights)}
    for file in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == file}, str(folder / file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    check_vectors(load(folder), "bert")
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match="index.json names model-2.safetensors, which is missing"):
        load(folder)


def test_a_file_that_torch_has_written(tmp_path):
    for content in (TORCH_FILE, OLD_TORCH_FILE):
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(zlib.decompress(base64.b64decode(content)))
        arrays = read_torch_file(str(path))
        assert {name: array.tolist() for name, array in arrays.items()} == {
            "a": [[0, 1, 2], [3, 4, 5]], "half": [1.5], "bf": [[0, 3], [1, 4], [2, 5]], "view": [3, 4, 5, 6],
            "ids": [0, 1, 2]}
        assert arrays["bf"].dtype == np.float32 and arrays["half"].dtype == np.float16


@pytest.mark.parametrize("size", [0, 8])
def test_a_tensor_that_reaches_beyond_its_storage(size, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zlib.decompress(base64.b64decode(TORCH_FILE)))
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content[:size] if "/data/" in name else content)
    with pytest.raises(ValueError, match="a tensor reaches beyond its storage"):
        read_torch_file(str(path))


def test_what_transformers_takes_where_a_field_is_missing(folder):
    config = {name: value for name, value in CONFIGS["bert"].items()
              if name not in ("hidden_act", "type_vocab_size", "layer_norm_eps", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}), encoding="utf-8")
    check_vectors(load(folder), "bert")


def test_a_folder_of_paddlenlp_with_safetensors_is_paddlenlps(folder):
    config = BertConfig(**{name: value for name, value in CONFIGS["bert"].items() if name != "architectures"})
    folder_of_paddle = folder.parent / "paddle"
    state = {name: tensor.numpy() for name, tensor in BertModel(config).state_dict().items()}
    folder_of_paddle.mkdir()
    save_file(state, str(folder_of_paddle / "model.safetensors"), metadata={"format": "np"})
    assert is_hugging_face(str(folder)) and not is_hugging_face(str(folder_of_paddle))


def test_padding_is_that_of_the_tokenizer(folder):
    """transformers does not use the id in config.json for it."""
    config = {**CONFIGS["bert"], "model_type": "bert", "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    encoder = load(folder)
    ids = VALUES["bert"][0]["ids"]
    padded = encoder(paddle.to_tensor([[*ids, 0, 0]]))[0].numpy()[0, 0]
    np.testing.assert_allclose(padded, VALUES["bert"][0]["cls"], atol=1e-5)


def test_bfloat16_is_read(tmp_path):
    save_file({"x": np.zeros(2, "int16")}, str(tmp_path / "x.safetensors"))
    content = (tmp_path / "x.safetensors").read_bytes().replace(b'"I16"', b'"BF16"')  # one character more in the header
    size = int.from_bytes(content[:8], "little") + 1
    numbers = (np.array([1.5, -2], "float32").view("uint32") >> 16).astype("<u2").tobytes()
    (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + content[8:-4] + numbers)
    assert read_safetensors(str(tmp_path / "x.safetensors"))["x"].tolist() == [1.5, -2]


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_a_pickle_of_more_than_tensors_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Attack()}, protocol=2))
    with pytest.raises(InputError, match="model.bin cannot be read: the pickle refers to .*system, which tensors"):
        load(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("x", b"")
    with pytest.raises(InputError, match="model.bin cannot be read: not a file of torch.save: it has no data"):
        load(folder)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("change, message", [
    ({"model_type": "t5"}, "has model_type 't5'; bert, ernie, distilbert, xlm-roberta are supported"),
    ({"hidden_act": "gelu_new"}, "hidden_act gelu_new is not supported; gelu, relu"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type relative_key is not supported"),
    ({"is_decoder": True}, "is_decoder true is not supported"),
    ({"model_type": ["bert"]}, r"has model_type \['bert'\]"),
    ({"num_hidden_layers": 3}, "does not fit the network; missing: encoder.layers.2."),
    ({"vocab_size": 7}, r"wrongly shaped: embeddings.word_embeddings.weight \[\d+, 16\] instead of \[7, 16\]")])
def test_unsupported_configs_raise(folder, change, message):
    config = {**CONFIGS["bert"], "model_type": "bert", **change}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=f"--model_name_or_path .*bert.*{message}"):
        load(folder)


def test_a_missing_pooler_starts_at_random_with_a_warning(folder, capsys):
    weights = {name: array for name, array in weights_of("bert").items() if "pooler" not in name}
    save_file(weights, str(folder / "model.safetensors"))
    encoder = load_pretrained(str(folder))
    assert "has no trained pooler: its pooler starts at random" in capsys.readouterr().err
    assert 0.01 < encoder.pooler.dense.weight.numpy().std() < 0.03
    load(folder)
    assert "no trained pooler" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------- the head that predicts tokens
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_head_of_transformers_predicts_tokens(kind, tmp_path, capsys):
    """Against its formula: dense, activation, layer normalization, and the word embeddings with a bias."""
    write_model(tmp_path, kind)
    weights = weights_with_head(kind)
    save_file(weights, str(tmp_path / "model.safetensors"))
    network = load_masked_lm(str(tmp_path), dropout=0.0).network
    network.eval()
    assert "at random" not in capsys.readouterr().err
    states = network.bert(paddle.to_tensor([VALUES[kind][0]["ids"]]))[0]
    dense, norm, decoder, prefix = HEADS[kind]
    hidden = states.numpy() @ weights[f"{dense}.weight"].T + weights[f"{dense}.bias"]
    hidden = np.maximum(hidden, 0) if kind == "ernie" else hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    hidden = (hidden - hidden.mean(axis=-1, keepdims=True)) / hidden.std(axis=-1, keepdims=True)
    hidden = hidden * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
    logits = hidden @ weights[f"{prefix}.embeddings.word_embeddings.weight"].T + weights[f"{decoder}.bias"]
    np.testing.assert_allclose(network.cls(states).numpy(), logits, atol=1e-3)


@pytest.mark.parametrize("part, config", [("cls.predictions.transform.dense.bias", {}),
                                          (None, {"tie_word_embeddings": False})])
def test_a_missing_head_starts_at_random_with_a_warning(part, config, folder, capsys):
    """Where a part of it is missing, too, and where its matrix is not that of the word embeddings."""
    weights = {name: array for name, array in weights_with_head("bert").items() if name != part}
    save_file(weights, str(folder / "model.safetensors"))
    content = {**CONFIGS["bert"], "model_type": "bert", **config}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    network = load_masked_lm(str(folder), dropout=0.0).network
    assert "has no trained head that predicts tokens: the head starts at random" in capsys.readouterr().err
    assert 0.01 < network.cls.predictions.transform.weight.numpy().std() < 0.03
    embeddings = network.bert.embeddings.word_embeddings.weight
    assert network.cls.predictions.decoder.weight is embeddings, "they are trained together"
    np.testing.assert_array_equal(embeddings.numpy(), weights["bert.embeddings.word_embeddings.weight"])


# -------------------------------------------------------------------------------------------------------- the tokenizer
def ids_of(tokenizer):
    tokens = tokenizer(TEXTS, 64)
    return [[int(number) for number in tokens[row]] for row in range(len(TEXTS))]


def test_tokens_are_those_of_transformers(folder, tmp_path):
    """From vocab.txt, from tokenizer.json alone, and from a checkpoint."""
    expected = [value["ids"] for value in VALUES["bert"]]
    tokenizer = load_tokenizer(str(folder))
    assert ids_of(tokenizer) == expected
    tokenizer.save_pretrained(str(tmp_path))
    assert ids_of(load_tokenizer(str(tmp_path))) == expected
    tokenizer.save_rust(str(folder))
    (folder / "vocab.txt").unlink()
    assert ids_of(load_tokenizer(str(folder))) == expected


def test_any_other_tokenizer_of_the_tokenizers_library(folder, tmp_path):
    """One with added tokens, and one that is no WordPiece; also from a checkpoint."""
    from tokenizers import Tokenizer, models

    load_tokenizer(str(folder)).save_rust(str(folder))
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rust.add_tokens(["[x]"])
    rust.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, RustTokenizer) and len(VOCABULARY) in ids_of(tokenizer)[2]
    tokenizer.save_pretrained(str(tmp_path))
    assert ids_of(load_tokenizer(str(tmp_path))) == ids_of(tokenizer)
    (tmp_path / "checkpoint").mkdir()
    for change in ({"normalizer": None}, {"pre_tokenizer": {"type": "WhitespaceSplit"}}):
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
        (tmp_path / "model.safetensors").touch()
        tokenizer = load_tokenizer(str(tmp_path))
        assert isinstance(tokenizer, RustTokenizer)
        tokenizer.save_pretrained(str(tmp_path / "checkpoint"))
        assert ids_of(load_tokenizer(str(tmp_path / "checkpoint"))) == ids_of(tokenizer)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("<pad>", 0.0), ("语义", -1.0), ("检索", -1.0)], 0))
    unigram.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "XLMRobertaTokenizer", "pad_token": "<pad>", "unk_token": {"content": "<unk>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert ids_of(tokenizer)[0] == [2, 3] and (tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 0)


@pytest.mark.parametrize("config, message", [
    ({"tokenize_chinese_chars": False}, "tokenizer_config.json has tokenize_chinese_chars False; write a tokenizer"),
    ({"tokenizer_class": "BertJapaneseTokenizer"}, "has tokenizer_class 'BertJapaneseTokenizer'; write a tokenizer"),
    ({"added_tokens_decoder": {"40": {"content": "<q>"}}}, "has added tokens that vocab.txt lacks: <q>; write a token"),
    ({"do_lower_case": "false"}, 'do_lower_case: expected true or false, got "false"')])
def test_a_vocabulary_alone_of_another_tokenizer_is_refused(folder, config, message):
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(folder))


# ------------------------------------------------------------------------------------------------------- a checkpoint
@pytest.mark.parametrize("pooling, place", [("cls", "cls"), ("mean_all", "mean")])
def test_a_checkpoint_of_it(folder, tmp_path, pooling, place):
    """It records all that it needs: it is loaded without the folder, and has the vectors of transformers."""
    encoder = load(folder)
    network = m.SimCSE(encoder, output_emb_size=0, pooling=pooling)
    record = m.make_record(network, str(folder), 32)
    m.save_checkpoint(str(tmp_path / "model_0"), network, load_tokenizer(str(folder)), record)
    shutil.rmtree(folder)
    loaded = m.load_model(str(tmp_path / "model_0" / "model_state.pdparams"))
    tokens = loaded.tokenizer(TEXTS, 32)
    for row, expected in enumerate(VALUES["bert"]):
        vector = loaded.model.embed(np.array([tokens[row]], "int64"), np.zeros((1, len(tokens[row])), "int64")).numpy()
        wanted = np.array(expected[place]) / np.linalg.norm(expected[place])
        np.testing.assert_allclose(vector[0], wanted, atol=1e-5)


def write_unigram(folder):
    """A tokenizer as XLM-RoBERTa's: its special tokens have other names, and it marks the beginnings of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    scores = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0, "，": -2.0}
    scores |= dict.fromkeys("语义检索中西方文化的差异", -1.0)
    unigram = Tokenizer(models.Unigram(list(scores.items()), 3))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                           special_tokens=[("<s>", 0), ("</s>", 2)])
    unigram.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "XLMRobertaTokenizer", "pad_token": {"content": "<pad>"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").unlink()


def test_deploy_python_runs_an_encoder_with_other_special_tokens(tmp_path):
    write_model(tmp_path / "encoder", "xlm-roberta")
    write_unigram(tmp_path / "encoder")
    tokenizer = load_tokenizer(str(tmp_path / "encoder"))
    network = m.SimCSE(load(tmp_path / "encoder"), output_emb_size=0, pooling="mean_all")
    record = m.make_record(network, str(tmp_path / "encoder"), 12)
    m.save_checkpoint(str(tmp_path / "model_0"), network, tokenizer, record)
    succeed("export_model.py", "--params_path", tmp_path / "model_0", "--output_path", tmp_path / "output")
    texts = ["语义检索", "中西方文化的差异，中西方文化的差异", "语", "x，", "x", "", "义 x"]
    expected = Encoder(network, tokenizer, 12, 2).encode(texts)
    deployed_tokenizer = deployed.Tokenizer(str(tmp_path / "output"))
    assert (deployed_tokenizer.pad_token_id, deployed_tokenizer.unk_token_id) == (1, 3)
    graph = predictor.load_predictor(str(tmp_path / "output"), precision="fp32")
    encoded = deployed.encode(graph, deployed_tokenizer, texts, 12, 2)
    np.testing.assert_allclose(encoded.embeddings, expected, atol=1e-5)
    assert encoded.truncated == [1] and encoded.unknown == [3, 4, 5], "unknown words, and at most marks beside them"
    assert np.linalg.norm(expected, axis=1).round(5).tolist() == [1, 1, 1, 0, 0, 0, 1]


def test_read_hugging_face_returns_kind_and_file(folder):
    found = read_hugging_face(str(folder), "--model_name_or_path")
    assert (found.kind, found.file, found.config["hidden_size"]) == ("bert", "model.safetensors", 16)
