"""sentence-transformers with torch bfloat16 on an encoder of the same dimensions; run by run.py --peer_python."""

import json
import sys
import tempfile
import time

import torch
from sentence_transformers import SentenceTransformer, models
from transformers import BertConfig, BertModel, BertTokenizerFast


def encode(vocab: str, sizes: dict, cases: dict[str, list[str]], threads: int) -> dict[str, float]:
    """Texts/s, the second of two passes over each case."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig(**sizes)).save_pretrained(folder)
        BertTokenizerFast(vocab_file=vocab).save_pretrained(folder)
        encoder = models.Transformer(folder, max_seq_length=64, model_args={"torch_dtype": torch.bfloat16})
    fc = models.Dense(sizes["hidden_size"], 256, activation_function=torch.nn.Identity()).to(torch.bfloat16)
    pooling = models.Pooling(sizes["hidden_size"], pooling_mode="cls")
    model = SentenceTransformer(modules=[encoder, pooling, fc, models.Normalize()], device="cpu")
    speeds = {}
    for name, texts in cases.items():
        for _ in range(2):
            start = time.perf_counter()
            model.encode(texts, batch_size=32)
            speeds[name] = len(texts) / (time.perf_counter() - start)
    return speeds


if __name__ == "__main__":
    print("RESULT " + json.dumps(globals()[sys.argv[1]](**json.load(sys.stdin))))
