"""Folders of sentence-transformers: what they say beside their encoder, and the vectors that come of it."""

import json
import shutil

import model as m
import train
from simcse import flags
from simcse.console import InputError
from simcse.encoder.sentence_transformers import Recipe, read_length, read_recipe
from simcse.text.prefixes import Prefixes

import numpy as np
import pytest
from hugging_face_models import HIDDEN, TEXTS, write_model
from safetensors.numpy import save_file
from test_hugging_face import VALUES

NEW = {"Transformer": "sentence_transformers.base.modules.transformer.Transformer",  # written since version 6
       "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
       "Dense": "sentence_transformers.base.modules.dense.Dense",
       "Normalize": "sentence_transformers.base.modules.normalize.Normalize"}
FC_SIZE = 8
LENGTH = ("--max_seq_length", "32")  # the encoder has 40 positions


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_modules(folder, *kinds, new=True):
    """Write modules.json with the encoder in the folder itself and the other modules in 1_Pooling, 2_Dense, ..."""
    modules = []
    for number, kind in enumerate(kinds):
        path = f"{number}_{kind}" if number else ""
        modules.append({"idx": number, "name": str(number), "path": path,
                        "type": NEW[kind] if new else f"sentence_transformers.models.{kind}"})
    write_json(folder / "modules.json", modules)


def write_dense(folder, activation, outputs, seed):
    """Write a Dense module; return its weight, [inputs, outputs], and its bias."""
    random = np.random.default_rng(seed)
    weight, bias = random.normal(0, 0.3, (outputs, HIDDEN)), random.normal(0, 0.3, outputs)
    write_json(folder / "config.json", {"in_features": HIDDEN, "out_features": outputs, "bias": True,
                                        "activation_function": f"torch.nn.modules.{activation}"})
    save_file({"linear.weight": weight.astype("float32"), "linear.bias": bias.astype("float32")},
              str(folder / "model.safetensors"))
    return weight.T, bias


@pytest.fixture
def folder(tmp_path):
    """An encoder whose pooling is the first token."""
    write_model(tmp_path / "encoder", "bert")
    folder = tmp_path / "encoder"
    write_modules(folder, "Transformer", "Pooling", "Normalize")
    write_json(folder / "1_Pooling/config.json", {"embedding_dimension": HIDDEN, "pooling_mode": "cls",
                                                  "include_prompt": True})
    return folder


def untrained(folder, sample, monkeypatch, *more):
    """Return what train.py would train, from a folder."""
    monkeypatch.setattr("sys.argv", ["train.py", "--device", "cpu", "--train_set_file", str(sample / "corpus.csv"),
                                     "--model_name_or_path", str(folder), *more])
    args = train.parse_args()
    return args, train.build_model(flags.resolve_training(args))


def embeddings_of(model, expected):
    model.eval()
    ids = np.array([expected["ids"]])
    return model.embed(ids, np.zeros_like(ids)).numpy()[0]


def normalized(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(("mode", "pooling", "value"), [("cls", "cls", "cls"), ("mean", "mean_all", "mean")])
@pytest.mark.parametrize("new", [True, False])
def test_pooling_of_the_folder(folder, sample, monkeypatch, mode, pooling, value, new):
    """Of the format of today, and of the older one with a field for each mode."""
    write_modules(folder, "Transformer", "Pooling", new=new)
    if not new:
        modes = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens",
                                                            "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")}
        modes[f"pooling_mode_{'cls_token' if mode == 'cls' else 'mean_tokens'}"] = True
        write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": HIDDEN, **modes})
    else:
        write_json(folder / "1_Pooling/config.json", {"embedding_dimension": HIDDEN, "pooling_mode": mode})
    for more in ((), ("--pooling", "auto")):
        _, (model, _, record) = untrained(folder, sample, monkeypatch, *LENGTH, *more)
        assert record["pooling"] == pooling
        for expected in VALUES["bert"]:
            np.testing.assert_allclose(embeddings_of(model, expected), normalized(expected[value]), atol=1e-5)


@pytest.mark.parametrize("fc", [True, False])
@pytest.mark.parametrize("pooler", [True, False])
def test_dense_layers(folder, sample, monkeypatch, pooler, fc):
    write_modules(folder, "Transformer", "Pooling", *["Dense"] * (pooler + fc), "Normalize")
    layers = []
    if pooler:
        layers.append((*write_dense(folder / "2_Dense", "activation.Tanh", HIDDEN, 1), np.tanh))
    if fc:
        layers.append((*write_dense(folder / f"{2 + pooler}_Dense", "linear.Identity", FC_SIZE, 2), lambda x: x))
    _, (model, tokenizer, record) = untrained(folder, sample, monkeypatch, *LENGTH)
    assert (record["pooling"], record["output_emb_size"]) == ("pooler" if pooler else "cls", FC_SIZE if fc else 0)
    assert record.get("fc_is_random") is None
    for text, expected in zip(TEXTS, VALUES["bert"]):
        assert tokenizer([text], 32)[0] == expected["ids"]
        vector = np.array(expected["cls"])
        for weight, bias, activate in layers:
            vector = activate(vector @ weight + bias)
        np.testing.assert_allclose(embeddings_of(model, expected), normalized(vector), atol=1e-5)
    if fc:
        with pytest.raises(InputError, match=f"--output_emb_size 4: .* has {FC_SIZE}"):
            untrained(folder, sample, monkeypatch, *LENGTH, "--output_emb_size", "4")
    if fc or pooler:
        with pytest.raises(InputError, match="--pooling mean: .* has dense layers for --pooling"):
            untrained(folder, sample, monkeypatch, *LENGTH, "--pooling", "mean")


def test_length_and_prompts(folder, sample, monkeypatch):
    """Flags win. An older encoder stands in a folder of its own."""
    assert read_length(str(folder)) is None
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 24})
    assert read_length(str(folder)) == 24
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "语：", "passage": "检："}})
    args, loaded = untrained(folder, sample, monkeypatch)
    assert args.max_seq_length == loaded.record["max_seq_length"] == 20
    assert Prefixes.from_record(loaded.record) == Prefixes("语：", "检：")
    args, loaded = untrained(folder, sample, monkeypatch, "--max_seq_length", "16", "--query_prefix", "")
    assert args.max_seq_length == 16 and Prefixes.from_record(loaded.record) == Prefixes("", "检：")

    write_json(folder / "sentence_bert_config.json", {"max_seq_length": True})
    with pytest.raises(InputError, match="sentence_bert_config.json: max_seq_length: expected an integer >= 3, got T"):
        untrained(folder, sample, monkeypatch)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20})

    outer = folder.parent / "outer"
    shutil.copytree(folder, outer / "0_Transformer")
    shutil.move(outer / "0_Transformer/1_Pooling", outer / "1_Pooling")
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
               {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    write_json(outer / "modules.json", modules)
    recipe = read_recipe(str(outer))
    assert (recipe.pooling, read_length(recipe.encoder), recipe.prefixes) == ("cls", 20, Prefixes())
    assert untrained(outer, sample, monkeypatch)[1].record["pooling"] == "cls"


@pytest.mark.parametrize(("prompts", "default", "expected"), [
    ({}, None, Prefixes()),
    ({"query": "q", "document": "d", "passage": "p", "web": "w"}, "web", Prefixes("q", "d")),
    ({"web": "w", "corpus": "c"}, "web", Prefixes("w", "c")),
    ({"web": "w", "query": None}, None, Prefixes())])
def test_prompts_of_the_folder(folder, prompts, default, expected):
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": default})
    assert read_recipe(str(folder)).prefixes == expected


def test_a_folder_that_names_no_pooling_is_warned_of(tmp_path, sample, monkeypatch, capsys):
    write_model(tmp_path / "bert", "bert")
    _, loaded = untrained(tmp_path / "bert", sample, monkeypatch, *LENGTH)
    assert loaded.record["pooling"] == "pooler"
    assert "bert does not say how its vectors are pooled; --pooling pooler is taken" in capsys.readouterr().err
    untrained(tmp_path / "bert", sample, monkeypatch, *LENGTH, "--pooling", "cls")
    assert "pooled" not in capsys.readouterr().err


def test_other_folders_say_nothing(tmp_path):
    assert read_recipe("rocketqa-zh-base-query-encoder") == Recipe("rocketqa-zh-base-query-encoder")
    write_model(tmp_path, "bert")
    assert read_recipe(str(tmp_path)) == Recipe(str(tmp_path))


@pytest.mark.parametrize(("change", "message"), [
    (lambda folder: write_json(folder / "1_Pooling/config.json", {"pooling_mode": "max"}), "its pooling is max; of"),
    (lambda folder: write_json(folder / "1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}), "cls and mean;"),
    (lambda folder: write_json(folder / "1_Pooling/config.json", {"pooling_mode": "cls", "include_prompt": False}),
     "include_prompt false"),
    (lambda folder: write_modules(folder, "Transformer", "Dense"), "has the modules Transformer, Dense; Transformer,"),
    (lambda folder: write_json(folder / "modules.json", {"a": 1}), "expected a list of modules with type and path"),
    (lambda folder: (folder / "modules.json").write_text("["), "modules.json: not valid JSON"),
    (lambda folder: (write_modules(folder, "Transformer", "Pooling", "Dense"),
                     write_dense(folder / "2_Dense", "linear.Identity", FC_SIZE, 1),
                     (folder / "2_Dense/model.safetensors").unlink()), "has neither model.safetensors nor"),
    (lambda folder: write_modules(folder, "Transformer", "Pooling", "Dense"), "2_Dense/config.json: no such file"),
    (lambda folder: write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": 1}}),
     "prompts: expected an object of strings"),
    (lambda folder: write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "\ud800"}}),
     "the prompt query is not valid Unicode"),
    (lambda folder: write_json(folder / "config_sentence_transformers.json", {"default_prompt_name": ["x"]}),
     r"default_prompt_name \['x'\] is none of its prompts"),
    (lambda folder: (folder / "1_Pooling/config.json").unlink(), "1_Pooling/config.json: no such file; was the fol"),
    (lambda folder: write_json(folder / "1_Pooling/config.json", {"pooling_mode_cls_token": 1}), "pooling is not nam"),
    (lambda folder: write_json(folder / "1_Pooling/config.json", {"pooling_mode": {}}), "its pooling is {}"),
    (lambda folder: write_modules(folder, "Transformer", "Pooling", "Normalize", "Dense"), "module Normalize in 2_No"),
    (lambda folder: (folder / "modules.json").write_text("[" * 100_000), "modules.json: not valid JSON"),
    (lambda folder: ((folder / "modules.json").unlink(), (folder / "modules.json").symlink_to("blobs/1")),
     "modules.json: is a link to a file that does not exist"),
    (lambda folder: write_json(folder / "modules.json", [{"type": "a.Transformer", "path": "0"},
                                                         {"type": "a.Pooling", "path": "1_Pooling"}]),
     "modules.json: no folder '0'"),
    (lambda folder: write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()),
                                                        "layer_norm_eps": "x"}),
     r"layer_norm_eps: expected a number in \(0, 1\), got 'x'"),
    (lambda folder: (write_json(folder / "tokenizer_config.json", {"do_lower_case": False}),
                     write_json(folder / "sentence_bert_config.json", {"do_lower_case": True})),
     "has do_lower_case true, and tokenizer_config.json false"),
    (lambda folder: (write_modules(folder, "Transformer", "Pooling", "Dense"),
                     write_dense(folder / "2_Dense", "activation.Tanh", FC_SIZE, 1)),
     "2_Dense: a Dense with Tanh has to keep the size of vectors; it makes 8 of 16")])
def test_what_cannot_be_had_is_refused(folder, sample, monkeypatch, change, message):
    change(folder)
    with pytest.raises(InputError, match=message):
        untrained(folder, sample, monkeypatch, *LENGTH)


@pytest.mark.parametrize(("weight", "bias", "config", "message"), [
    ((FC_SIZE, 5), FC_SIZE, {}, r"expected linear.weight \[size, 16\] and linear.bias \[size\], got \[8, 5\] and"),
    ((FC_SIZE, HIDDEN), 3, {}, r"got \[8, 16\] and \[3\]"), ((0, HIDDEN), 0, {}, r"got \[0, 16\] and \[0\]"),
    ((FC_SIZE, HIDDEN), FC_SIZE, {"use_residual": True}, "config.json has use_residual True, which is not supported")])
def test_a_dense_layer_that_does_not_fit(folder, sample, monkeypatch, weight, bias, config, message):
    write_modules(folder, "Transformer", "Pooling", "Dense")
    write_json(folder / "2_Dense/config.json", {"activation_function": "torch.nn.Identity", **config})
    save_file({"linear.weight": np.zeros(weight, "float32"), "linear.bias": np.zeros(bias, "float32")},
              str(folder / "2_Dense/model.safetensors"))
    with pytest.raises(InputError, match=message):
        untrained(folder, sample, monkeypatch, *LENGTH)


def test_a_run_that_goes_on_keeps_the_pooler(folder, sample, monkeypatch, tmp_path):
    """Although no --infer_with_fc_pooler asks for it."""
    write_modules(folder, "Transformer", "Pooling", "Dense")
    write_dense(folder / "2_Dense", "activation.Tanh", HIDDEN, 1)
    _, (model, tokenizer, record) = untrained(folder, sample, monkeypatch, *LENGTH)
    m.save_checkpoint(str(tmp_path / "checkpoint"), model, tokenizer, record)
    monkeypatch.setattr("sys.argv", ["train.py", "--device", "cpu", "--train_set_file", str(sample / "corpus.csv"),
                                     "--init_from_ckpt", str(tmp_path / "checkpoint")])
    again = train.build_model(flags.resolve_training(train.parse_args()))
    assert again.record["with_pooler"] is record["with_pooler"] is True
    for expected in VALUES["bert"]:
        np.testing.assert_allclose(embeddings_of(again.model, expected), embeddings_of(model, expected), atol=1e-6)


def test_a_dense_layer_after_a_mean_is_refused(folder):
    write_json(folder / "1_Pooling/config.json", {"pooling_mode": "mean"})
    write_modules(folder, "Transformer", "Pooling", "Dense")
    write_dense(folder / "2_Dense", "activation.Tanh", HIDDEN, 1)
    with pytest.raises(InputError, match="has the module Dense in 2_Dense, which is not supported there"):
        read_recipe(str(folder))


def test_a_checkpoint_has_its_own_record(folder, checkpoint, sample, monkeypatch):
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20})
    monkeypatch.setattr("sys.argv", ["train.py", "--device", "cpu", "--train_set_file", str(sample / "corpus.csv"),
                                     "--model_name_or_path", str(folder), "--init_from_ckpt", str(checkpoint)])
    expected = m.read_record(str(checkpoint)).get("max_seq_length") or flags.TRAIN_LENGTH
    assert train.parse_args().max_seq_length == expected


def test_a_resumed_run_does_not_need_the_folder(folder, sample, monkeypatch, tmp_path):
    """Its length is that of the newest checkpoint, wherever the folder went."""
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20})
    checkpoint = tmp_path / "checkpoints" / "model_2"
    write_json(checkpoint / "simcse_config.json", {"max_seq_length": 20})
    write_json(checkpoint / "training_state.json", {"run": {}})
    monkeypatch.setattr("sys.argv", ["train.py", "--device", "cpu", "--train_set_file", str(sample / "corpus.csv"),
                                     "--model_name_or_path", "gone", "--resume", "--save_dir",
                                     str(tmp_path / "checkpoints")])
    assert train.parse_args().max_seq_length == 20


def test_a_folder_of_an_encoder_is_no_checkpoint(folder):
    with pytest.raises(InputError, match="is an encoder, not a checkpoint; train.py --epochs 0 --model_name_or_path"):
        m.Encoder.load(folder)
