"""Small encoders of random weights in the layout of Hugging Face's transformers, written without torch."""

import json

import numpy as np
from safetensors.numpy import save_file

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 16, 2, 2, 32, 40
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"语义检索中西方文化的差异，。～abc", "##a", "##b",
              "##c", "ab"]
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER}
COMMON = {"vocab_size": len(VOCABULARY), "hidden_act": "gelu", "max_position_embeddings": POSITIONS,
          "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 2, "pad_token_id": 0,
          "layer_norm_eps": 1e-12}
CONFIGS = {
    "bert": {**SIZES, **COMMON, "architectures": ["BertModel"]},
    "ernie": {**SIZES, **COMMON, "layer_norm_eps": 1e-5, "use_task_id": True, "task_type_vocab_size": 3,
              "hidden_act": "relu", "architectures": ["ErnieModel"]},
    "xlm-roberta": {**SIZES, **COMMON, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5,
                    "architectures": ["XLMRobertaModel"]},
    "distilbert": {"vocab_size": len(VOCABULARY), "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS,
                   "hidden_dim": INNER, "activation": "gelu", "max_position_embeddings": POSITIONS, "pad_token_id": 0,
                   "dropout": 0.1, "attention_dropout": 0.1, "architectures": ["DistilBertModel"]},
}
TEXTS = ["语义检索", "中西方文化的差异，ab～c。", "abc cab 语 [x]", "义"]
LAYER = {"attention.self.query": (HIDDEN, HIDDEN), "attention.self.key": (HIDDEN, HIDDEN),
         "attention.self.value": (HIDDEN, HIDDEN), "attention.output.dense": (HIDDEN, HIDDEN),
         "attention.output.LayerNorm": (HIDDEN,), "intermediate.dense": (INNER, HIDDEN),
         "output.dense": (HIDDEN, INNER), "output.LayerNorm": (HIDDEN,)}
DISTILBERT_LAYER = {"attention.q_lin": (HIDDEN, HIDDEN), "attention.k_lin": (HIDDEN, HIDDEN),
                    "attention.v_lin": (HIDDEN, HIDDEN), "attention.out_lin": (HIDDEN, HIDDEN),
                    "sa_layer_norm": (HIDDEN,), "ffn.lin1": (INNER, HIDDEN), "ffn.lin2": (HIDDEN, INNER),
                    "output_layer_norm": (HIDDEN,)}
# The layers of the head that predicts tokens, the prefix of the encoder's weights in a file with it.
HEADS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions", "bert"),
    "ernie": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions", "ernie"),
    "xlm-roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head", "roberta"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector", "distilbert"),
}


def weights_of(kind: str) -> dict[str, np.ndarray]:
    """Return random weights by transformers' names, without the prefix of files with a head."""
    shapes = {"embeddings.word_embeddings.weight": (len(VOCABULARY), HIDDEN),
              "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
              "embeddings.LayerNorm.weight": (HIDDEN,), "embeddings.LayerNorm.bias": (HIDDEN,)}
    if kind == "ernie":
        shapes["embeddings.task_type_embeddings.weight"] = (3, HIDDEN)
    layers, prefix = (DISTILBERT_LAYER, "transformer") if kind == "distilbert" else (LAYER, "encoder")
    if kind != "distilbert":
        shapes["embeddings.token_type_embeddings.weight"] = (CONFIGS[kind]["type_vocab_size"], HIDDEN)
        shapes |= {"pooler.dense.weight": (HIDDEN, HIDDEN), "pooler.dense.bias": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in layers.items():
            shapes[f"{prefix}.layer.{layer}.{name}.weight"] = shape
            shapes[f"{prefix}.layer.{layer}.{name}.bias"] = shape[:1]
    random = np.random.default_rng(len(kind))
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = 0.3 * random.standard_normal(shape)
        weights[name] = (values + ("orm.weight" in name)).astype("float32")
    return weights


def weights_with_head(kind: str) -> dict[str, np.ndarray]:
    """Return random weights of an encoder with the head that predicts tokens, by transformers' names."""
    dense, norm, decoder, prefix = HEADS[kind]
    weights = {f"{prefix}.{name}": array for name, array in weights_of(kind).items()}
    random = np.random.default_rng(1)
    for name, shape in ((f"{dense}.weight", (HIDDEN, HIDDEN)), (f"{dense}.bias", HIDDEN), (f"{norm}.weight", HIDDEN),
                        (f"{norm}.bias", HIDDEN), (f"{decoder}.bias", len(VOCABULARY))):
        weights[name] = random.standard_normal(shape).astype("float32")
    return weights


def write_model(folder, kind: str) -> None:
    """Write a folder with config.json, model.safetensors, vocab.txt and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[kind], "model_type": kind}), encoding="utf-8")
    save_file(weights_of(kind), str(folder / "model.safetensors"))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8")
    config = {"do_lower_case": True, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
