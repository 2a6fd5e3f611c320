"""Jobs of gpu.py that measure: the speed of training and encoding, and the memory of a step."""

import contextlib
import functools
import gc
import json
import math
import resource
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from bench import HERE  # first: it makes the project importable
from data import Batch, DuplicateKeys, Inputs, hash_token_ids
from simcse import console, flags
from simcse.text.textfile import TextFile

import numpy as np
import side
from gpu_jobs import (
    SIZES,
    alone,
    command_line,
    ending,
    last_line,
    on_all_cards,
    per_second,
    report,
    serve,
    unless_refused,
)

# By device, texts and tokens of batches.
TRAINED = {"cpu": [(8, 16)], "gpu": [(64, 32), (64, 64), (256, 64), (32, 384)]}
ENCODED = {"cpu": [(1, 16), (32, 16)], "gpu": [(1, 32), (64, 64), (1024, 64), (128, 512)]}
CHUNK = {"cpu": (8, 16), "gpu": (64, 64)}  # texts and tokens of a chunk in `memory`
BATCHES = {"cpu": [16, 32], "gpu": [256, 1024, 4096]}  # texts of the batches there
SIDE = {"cpu": 1024, "gpu": 8192}  # of the square matrices that show the matrix rate
OPERATORS = {"6 layers": 540, "12 layers": 960}  # of a step at most


# -------------------------------------------------------------------------------------------------------------- a step
def batch_of(texts: int, tokens: int) -> Batch:
    """Return a batch of random texts, all of so many tokens, each of which is encoded under two dropouts."""
    ids = np.random.default_rng(0).integers(1000, 17_000, (texts, tokens))
    inputs = Inputs(ids, np.zeros_like(ids))
    keys = hash_token_ids(ids.tolist())
    return Batch(inputs, inputs, duplicate_keys=DuplicateKeys(keys, keys), rows=range(texts))


def with_run(scratch: str, size: str, device: str, precision: str,
             measure: Callable[[Callable[[Batch], None], Callable[[], Any]], None]) -> None:
    """Measure within a training run of train.py.

    Args:
        measure: is called with a function that takes the step of a batch, and one that waits until it is done.
    """
    from simcse.training.gradients import backward
    from simcse.training.trainer import Trainer, run_training

    path = f"{scratch}/sample/train.csv"
    with command_line("train", "--init_from_ckpt", f"{scratch}/{size}", "--train_set_file", path, "--device", device,
                      "--precision", precision, "--infer_with_fc_pooler", "--save_dir", f"{scratch}/speed",
                      "--visualdl_dir", f"{scratch}/speed_log") as train:
        args = flags.resolve_training(train.parse_args())

    def start() -> None:
        network, _, _ = train.build_model(args)
        trainer = Trainer(args, network, TextFile(path, "--train_set_file"), steps_per_epoch=10_000,
                          write_model=lambda folder: None)

        def step(batch: Batch, chunk_size: int | None = None) -> None:
            trainer.start_step()
            loss = backward(trainer.network, network, batch, trainer.scale_loss, chunk_size)
            trainer.update(loss.value, batch, check_loss=False)

        measure(step, lambda: network.parameters()[-1].numpy())
        trainer.finish({})

    with ending("train"):
        run_training(args, start)


@contextlib.contextmanager
def unless_out_of_memory(what: str) -> Iterator[list[bool]]:
    """Print a row instead of failing if memory runs out; the list that is yielded is empty then."""
    fits = [True]
    try:
        yield fits
    except (MemoryError, RuntimeError, SystemError) as error:
        if not (console.describe_machine_error(error) or "").startswith("out of memory"):
            raise
        report(what, "out of memory")
        fits.clear()


def matrix_rate(device: str, precision: str) -> float:
    """Return the operations in a second of a product of large matrices; NaN where a CPU has none in this precision."""
    import paddle

    if device == "cpu" and precision != "fp32":
        return math.nan
    kind = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
    square = paddle.rand([SIDE[device]] * 2).astype(kind)
    product = [square]

    def multiply() -> None:
        product[0] = paddle.matmul(square, square)

    return 2 * SIDE[device] ** 3 * per_second(multiply, lambda: float(product[0][0, 0].astype("float32")))


def operations(size: str, tokens: int) -> float:
    """Return the multiplications and additions in the matrix products of a text, forward.

    In the last layer only keys and values are computed for all tokens, the rest for the first token.
    """
    hidden = SIZES[size]["hidden_size"]
    inner = SIZES[size]["intermediate_size"]
    layers = SIZES[size]["num_hidden_layers"]
    layer = 2 * (4 * hidden**2 + 2 * hidden * inner) + 4 * tokens * hidden
    return tokens * ((layers - 1) * layer + 4 * hidden**2) + layer


# --------------------------------------------------------------------------------------------------------------- speed
def speeds(name: str, cases: list[tuple[int, int]], run: Callable[[int, int], float], size: str, times: int,
           rate: float) -> None:
    """Report texts a second by batch and length, and the fraction of the matrix rate that is reached.

    Args:
        cases: texts and tokens of the batches.
        run: returns batches a second.
        times: how many times as many operations a text takes as forward.
        rate: operations a second of `matrix_rate`; NaN: not known.
    """
    import paddle

    for texts, tokens in cases:
        what = f"{name}, {texts} x {tokens} tokens"
        with unless_out_of_memory(what) as fits:
            speed = texts * run(texts, tokens)
        if not fits:
            gc.collect()
            paddle.device.cuda.empty_cache()
            continue
        report(what, round(speed, 2), "texts/s")
        if not math.isnan(rate):
            part = speed * times * operations(size, tokens) / rate
            report(f"{what}, of the matrix rate", round(100 * part, 1), "%")


def train_speed(scratch: str, size: str, device: str, precision: str) -> None:
    """Measure steps of train.py: two views of a text, forward and, twice as much, backward."""
    def measure(step: Callable, wait: Callable) -> None:
        rate = matrix_rate(device, precision)
        if not math.isnan(rate):
            report(f"matrix rate, {precision}", round(rate / 1e12, 3), "TFLOP/s")

        def batches_per_second(texts: int, tokens: int) -> float:
            return per_second(functools.partial(step, batch_of(texts, tokens)), wait)

        speeds(f"training, {size}, {precision}", TRAINED[device], batches_per_second, size, 6, rate)

    with unless_refused(f"training, {size}, {precision}"):
        with_run(scratch, size, device, precision, measure)


def encode_speed(scratch: str, size: str, device: str, precision: str) -> None:
    """Measure the engine of inference.py with texts that are tokenized."""
    from model import load_encoder_for

    words = ["--params_path", f"{scratch}/{size}", "--device", device, "--precision", precision]
    with unless_refused(f"encoding, {size}, {precision}"):
        with command_line("inference", *words) as inference:
            args = inference.parse_args()
        engine = load_encoder_for(args).engine

        def batches_per_second(texts: int, tokens: int) -> float:
            ids = np.random.default_rng(0).integers(1000, 17_000, (texts, tokens))
            latest = [None]  # a GPU computes in order: who waits for the latest batch waits for all

            def encode() -> None:
                latest[0] = engine.embed(ids, ids * 0)

            return per_second(encode, lambda: np.asarray(latest[0]))

        speeds(f"encoding, {size}, {precision}", ENCODED[device], batches_per_second, size, 1,
               matrix_rate(device, precision))


# -------------------------------------------------------------------------------------------------------- host, memory
def host(scratch: str, size: str, device: str) -> None:
    """Measure what a step takes of the host: its operators, each of which is sent to a GPU by itself, and its time."""
    from simcse.training import trainer

    batch = batch_of(2, 4)

    def measure(step: Callable, wait: Callable) -> None:
        work = functools.partial(step, batch)
        count = operators(work)
        fastest = min(side.seconds_of(lambda: (work(), wait())) for _ in range(20))
        report(f"operators a step, {size}", count, "", f"<= {OPERATORS[size]}", count <= OPERATORS[size])
        report(f"host ms a step, {size}", round(1000 * fastest, 2), "ms")

    with patch.object(trainer, "train_faster_on_cpu", lambda model: None):  # the network as a GPU has it
        with_run(scratch, size, device, "fp32", measure)


def operators(work: Callable[[], Any]) -> int:
    """Return how many operators `work` runs, the second time."""
    from paddle.profiler import Profiler, ProfilerTarget

    work()
    with Profiler(targets=[ProfilerTarget.CPU], on_trace_ready=lambda profiler: None) as profiler:
        work()
    nodes = list(profiler.profiler_result.get_data().values())
    count = 0
    while nodes:
        node = nodes.pop()
        nodes += node.children_node
        if node.name.endswith(" infer_meta"):  # once for each operator, forward and backward, in both stacks
            count += 1
    return count


def memory(scratch: str, size: str, device: str) -> None:
    """Report the peak memory of a step by batch, with --chunk_size and without.

    On a GPU it is that of the tensors, on a CPU that of the process. Peaks only rise, so what takes more comes later.
    """
    import paddle

    chunk, tokens = CHUNK[device]
    peaks = {chunk: (0, 0.0), None: (0, 0.0)}  # of the largest batch that fits: texts, MB

    def peak() -> float:
        if device == "gpu":
            return paddle.device.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def measure(step: Callable, wait: Callable) -> None:
        for chunked in (chunk, None):
            for texts in BATCHES[device]:
                what = f"{size}, batch {texts} x {tokens}"
                if chunked:
                    what += f", --chunk_size {chunk}"
                with unless_out_of_memory(what) as fits:
                    step(batch_of(texts, tokens), chunked)
                    wait()
                if not fits:
                    break
                peaks[chunked] = (texts, peak())
                report(what, round(peak()), "MB")
        chunked_texts, chunked_mb = peaks[chunk]
        texts, mb = peaks[None]
        all_fit = chunked_texts == BATCHES[device][-1]
        less = all_fit and (texts < chunked_texts or chunked_mb < mb)
        report("--chunk_size takes less memory", "yes" if less else "no", "", "yes", less)

    with_run(scratch, size, device, "fp32", measure)


# ----------------------------------------------------------------------------------------------------------- all cards
def rank_speed(scratch: str, size: str, device: str) -> None:
    """Report the texts a second of this process; all processes take the same number of steps."""
    texts, tokens = TRAINED[device][-1]
    batch = batch_of(texts, tokens)
    count = 20 if device == "gpu" else 3

    def measure(step: Callable, wait: Callable) -> None:
        def steps() -> None:
            for _ in range(count):
                step(batch)
            wait()

        steps()
        report("speed", texts * count / side.seconds_of(steps), "texts/s")

    with_run(scratch, size, device, "fp32", measure)


def scaling(scratch: str, size: str, device: str, cards: int) -> None:
    """Compare training on all cards with one."""
    if cards == 1:
        return
    job = [f"{HERE}/gpu_speed.py", "rank_speed", json.dumps({"scratch": scratch, "size": size, "device": device})]
    one = speed_of(alone(*job))
    code, logs = on_all_cards(device, f"{scratch}/scaling", *job)
    if code:
        raise console.InputError(f"the launcher ended with {code}: {last_line(logs[0])}")
    report(f"training, {size}, {cards} processes against one", round(sum(map(speed_of, logs)) / one, 2), "times")


def speed_of(printed: str) -> float:
    """Return the figure of the only row."""
    rows = [line.removeprefix("ROW ") for line in printed.splitlines() if line.startswith("ROW ")]
    (row,) = rows
    return json.loads(row)["figure"]


if __name__ == "__main__":
    console.run(lambda: serve(globals()))
