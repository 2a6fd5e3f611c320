"""The original's way of doing each thing, re-enacted in few lines, in an environment that model.py has not prepared.

Every function is one measurement, run in a process of its own by run.py.
"""

import resource
import time
from collections.abc import Iterator
from functools import partial

import paddle
import paddle.nn.functional as F
import side
from paddle import nn
from paddlenlp.transformers import AutoModel, AutoTokenizer


def batch_of(tokenizer, texts: list[str], length: int) -> list[paddle.Tensor]:
    """Tokenize one by one in Python, pad to the longest, and return input_ids and token_type_ids."""
    ids = [tokenizer(text=text, max_length=length, truncation=True)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    padded = paddle.to_tensor([row + [0] * (longest - len(row)) for row in ids])
    return [padded, paddle.zeros_like(padded)]


class Network(nn.Layer):
    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.ptm = AutoModel.from_pretrained(encoder)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(self.ptm.config.hidden_size, 256)

    def forward(self, input_ids, token_type_ids):
        return F.normalize(self.dropout(self.fc(self.ptm(input_ids, token_type_ids)[1])), p=2, axis=-1)


def tokenize(encoder: str, cases: dict[str, list[str]]) -> dict[str, float]:
    """Return texts/s, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    speeds = {}
    for name, texts in cases.items():
        start = time.perf_counter()
        for text in texts:
            tokenizer(text=text, max_length=64, truncation=True)
        speeds[name] = len(texts) / (time.perf_counter() - start)
    return speeds


def encode(encoder: str, cases: dict[str, list[str]]) -> Iterator[dict[str, float]]:
    """Yield texts/s, a pass after another: dynamic graph, one thread, float32, in the file's order, batches of 64."""
    network = Network(encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    network.eval()

    @paddle.no_grad()
    def encode_all(texts: list[str]) -> None:
        for first in range(0, len(texts), 64):
            network(*batch_of(tokenizer, texts[first : first + 64], 64)).numpy()

    while True:
        yield {name: len(texts) / side.seconds_of(partial(encode_all, texts)) for name, texts in cases.items()}


def export(encoder: str, folder: str) -> dict[str, float]:
    """Export the network as a static graph; run.py times the process."""
    network = Network(encoder)
    network.eval()
    spec = [paddle.static.InputSpec([None, None], "int64") for _ in range(2)]
    paddle.jit.save(paddle.jit.to_static(network, input_spec=spec, full_graph=True), f"{folder}/inference")
    return {}


def predictor_of(folder: str):
    """Return a function from a batch to its embeddings: Paddle Inference as the original sets it by default."""
    graph = f"{folder}/inference." + ("pdmodel" if paddle.__version__.startswith("2.") else "json")
    config = paddle.inference.Config(graph, f"{folder}/inference.pdiparams")
    config.disable_gpu()
    config.set_cpu_math_library_num_threads(10)
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)
    inputs = [predictor.get_input_handle(name) for name in predictor.get_input_names()]
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def embed(batch: list[paddle.Tensor]):
        for handle, tensor in zip(inputs, batch):
            handle.copy_from_cpu(tensor.numpy())
        predictor.run()
        return output.copy_to_cpu()

    return embed


def deployed(encoder: str, text: str, folder: str) -> dict[str, float]:
    """Encode one text with the graph that `export` wrote; run.py times the process."""
    predictor_of(folder)(batch_of(AutoTokenizer.from_pretrained(encoder), [text], 128))
    return {}


def latency(encoder: str, text: str, folder: str, runs: int) -> dict[str, float]:
    """Return the milliseconds (median) of one text."""
    export(encoder, folder)
    embed = predictor_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    seconds = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        embed(batch_of(tokenizer, [text], 128))
        seconds.append(time.perf_counter() - start)
    return {"batch 1": 1000 * sorted(seconds[2:])[runs // 2]}


def train(encoder: str, texts: list[str], batch: int, length: int, steps: int) -> dict[str, float]:
    """Return samples/s: two passes a step, one thread, tokenized within the step."""
    network = Network(encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    network.train()
    optimizer = paddle.optimizer.AdamW(5e-5, parameters=network.parameters(), weight_decay=0.0)
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        inputs = batch_of(tokenizer, texts[batch * step :][:batch], length)
        query = network(*inputs)
        title = network(*inputs)
        loss = F.cross_entropy(20 * paddle.matmul(query, title, transpose_y=True), paddle.arange(batch))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        float(loss)
        seconds.append(time.perf_counter() - start)
    return {f"batch {batch}, {length} tokens": batch / sorted(seconds[1:])[steps // 2]}


def lines(path: str) -> dict[str, float]:
    """Return the seconds from a file of training texts to its first batch, and the peak memory in MB.

    All texts are in memory, as map-style datasets hold them. What the imports take does not count.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        texts = [{"text_a": text, "text_b": text} for text in map(str.rstrip, file)]
    sampler = paddle.io.DistributedBatchSampler(texts, 64, shuffle=True)
    [texts[row] for row in next(iter(sampler))]
    return {"s": time.perf_counter() - start,
            "MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def first_result(encoder: str, texts: list[str]) -> dict[str, float]:
    """Compute the first embeddings; run.py times the process."""
    with paddle.no_grad():
        network = Network(encoder)
        network.eval()
        network(*batch_of(AutoTokenizer.from_pretrained(encoder), texts, 64)).numpy()
    return {}


def before_training(encoder: str) -> dict[str, float]:
    """Do all that comes before the first step of training; run.py times the process."""
    network = Network(encoder)
    AutoTokenizer.from_pretrained(encoder)
    paddle.optimizer.AdamW(5e-5, parameters=network.parameters(), weight_decay=0.0)
    return {}


if __name__ == "__main__":
    side.serve(globals())
