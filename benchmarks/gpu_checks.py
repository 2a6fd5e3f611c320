"""What gpu.py finds to be right or wrong: jobs that compare.

Everything is made here: encoders whose weights numpy draws, and texts of scripts/make_sample_data.py.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from bench import HERE, MINI, ROOT  # first: it makes the project importable
from data import Batch, TextFile, chunks_of, load_tokenizer, text_keys
from deploy.python import predictor
from simcse import console, files
from simcse.machine import RANK, RANKS
from simcse.weights import PARAMS_FILE, load_state, read_weights

import numpy as np
from gpu_jobs import SIZES, call, last_line, on_all_cards, per_second, row, serve, unless_refused, within

FIGURES = f"{HERE}/gpu_figures.json"
FC, LENGTH, STEPS = 32, 32, 50  # size of the vectors, tokens of a text, training steps
# How far figures may be from those recorded in fp32 on a CPU: vectors and scores by themselves, losses relatively.
# Rounding the factors of all products on a CPU to fp16 moves losses by 2e-3, to bf16 by 2e-2.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


# ------------------------------------------------------------------------------------------------------- what is made
def prepare(scratch: str, device: str) -> Iterator[dict]:
    """Write the checkpoints. Their weights depend on names and shapes alone, so that they are the same on every machine
    and stack; those of "small" are larger, so that its vectors differ."""
    from model import SimCSE, make_record, save_checkpoint
    from simcse.encoders import encoder_from_record
    from simcse.ranks import set_device

    set_device("cpu")
    for name in SIZES:
        record = {"encoder_class": "ErnieModel", "encoder_config": SIZES[name]}
        network, state = SimCSE(encoder_from_record(record, None), output_emb_size=FC), {}
        spread = 0.1 if name == "small" else 0.02
        for key, tensor in network.state_dict().items():
            drawn = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tensor.shape).astype("float32")
            state[key] = spread * drawn + ("norm" in key and key.endswith("weight"))
        load_state(network, state, name)
        save_checkpoint(f"{scratch}/{name}", network, load_tokenizer(MINI), make_record(network, MINI, LENGTH))
    yield row("checkpoints", ", ".join(SIZES))


def machine(scratch: str, device: str) -> Iterator[dict]:
    """What there is."""
    from simcse.ranks import compute_capabilities, set_device

    import paddle
    import paddlenlp

    yield row("python", platform.python_version())
    yield row("paddle", paddle.__version__)
    yield row("paddlenlp", paddlenlp.__version__)
    yield row("CUDA, cuDNN of the build", f"{paddle.version.cuda()}, {paddle.version.cudnn()}")
    built = " ".join(f"{each // 10}.{each % 10}" for each in compute_capabilities())
    yield row("compute capabilities of the build", built or "not known")
    if device == "gpu":
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            yield row("driver", subprocess.check_output(asked, text=True).split("\n")[0])
        for number in range(paddle.device.cuda.device_count()):
            card = paddle.device.cuda.get_device_properties(number)
            yield row(f"card {number}", f"{card.name}, {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB, "
                      f"{card.multi_processor_count} multiprocessors")
    set_device(device)
    yield row("computes", "yes", "", "yes", True)


# --------------------------------------------------------------------------------------------------- recorded figures
def encoded(scratch: str, device: str, precision: str) -> Iterator[tuple[str, np.ndarray]]:
    """Vectors, [texts, FC], and scores of pairs, [pairs], by inference.py and predict.py."""
    words = ["--params_path", f"{scratch}/small", "--device", device, "--precision", precision]
    call("inference", *words, "--input_file", f"{scratch}/sample/some.csv", "--output_file", f"{scratch}/v.npy")
    yield "vectors", np.load(f"{scratch}/v.npy")
    scores = call("predict", *words, "--text_pair_file", f"{scratch}/sample/pairs.csv")
    yield "scores", np.array(scores.split(), "float64")


def trained(scratch: str, device: str, precision: str) -> Iterator[tuple[str, np.ndarray]]:
    """The losses of train.py, [STEPS], without dropout, and the vectors after them in fp32."""
    import model

    losses, formula, folder = [], model.contrastive_loss, f"{scratch}/trained_{precision}"

    def observed(*args: Any) -> Any:
        losses.append(formula(*args))
        return losses[-1]

    with patch.object(model, "contrastive_loss", observed):
        call("train", "--init_from_ckpt", f"{scratch}/small", "--train_set_file", f"{scratch}/sample/train.csv",
             "--device", device, "--precision", precision, "--batch_size", 16, "--dropout", 0,
             "--output_dropout", 0, "--infer_with_fc_pooler", "--save_dir", folder, "--visualdl_dir", f"{folder}/log")
    yield "losses", np.array([float(loss) for loss in losses])
    call("inference", "--params_path", f"{folder}/model_{STEPS}", "--device", device, "--precision", "fp32",
         "--input_file", f"{scratch}/sample/some.csv", "--output_file", f"{scratch}/v.npy")
    yield "vectors after training", np.load(f"{scratch}/v.npy")


def figures(scratch: str, device: str, precision: str) -> Iterator[dict]:
    """The largest differences to the recorded figures."""
    recorded = files.read_json(FIGURES)
    most = TOLERANCES[precision]

    def compared(parts: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict]:
        for name, found in parts:
            expected = np.array(recorded[name])
            scale = expected if name == "losses" else 1
            same = found.shape == expected.shape
            yield within(f"{name}, {precision}", abs((found - expected) / scale).max() if same else np.nan, most)

    yield from unless_refused(f"encoding, {precision}", compared(encoded(scratch, device, precision)))
    yield from unless_refused(f"training, {precision}", compared(trained(scratch, device, precision)))


def record(scratch: str, device: str) -> Iterator[dict]:
    """Write the figures of this CPU in fp32."""
    found = {name: np.round(values, 6).tolist() for part in (encoded, trained)
             for name, values in part(scratch, device, "fp32")}
    with files.new_file(FIGURES) as file:
        json.dump(found, file, separators=(",", ":"))
    yield row("recorded", ", ".join(found))


# ----------------------------------------------------------------------------------------------------------- all cards
def rank_gradients(scratch: str, device: str, ranks: int) -> Iterator[dict]:
    """Write the loss and the gradients of a step with cross-device negatives on so many ranks, or, of one process, with
    the batches of all of them as one."""
    from model import load_model
    from simcse.gradients import backward
    from simcse.ranks import join_ranks, set_device

    import paddle

    set_device(device)
    join_ranks()
    model, tokenizer, _ = load_model(f"{scratch}/small/{PARAMS_FILE}", dropout=0, settings={
        "dropout": 0.0, "cross_device_negatives": RANKS > 1})
    model.train()
    texts = TextFile(f"{scratch}/sample/train.csv", "--train_set_file")
    ids = tokenizer(texts[: 16 * ranks][RANK * 16 : None if RANKS == 1 else RANK * 16 + 16], LENGTH)
    batch = Batch(chunks_of([ids, ids], len(ids), tokenizer.pad_token_id), text_keys([ids]))
    loss = backward(paddle.DataParallel(model) if RANKS > 1 else model, model, batch, lambda loss: loss)
    np.savez(f"{scratch}/gradients_{RANK if RANKS > 1 else 'whole'}.npz", loss=loss.numpy(), **{
        name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None})
    yield row("gradients", "written")


def ranks(scratch: str, device: str, cards: int) -> Iterator[dict]:
    """Cross-device negatives on all cards against one process with the batches of all."""
    if cards == 1:
        yield row("several cards", "not there: one card")
        return
    arguments = json.dumps({"scratch": scratch, "device": device, "ranks": cards})
    code, logs = on_all_cards(device, f"{scratch}/ranks", __file__, "rank_gradients", arguments)
    if code:
        raise console.InputError(f"the launcher ended with {code}: {last_line(' '.join(logs[:1]))}")
    subprocess.run([sys.executable, __file__, "rank_gradients", arguments], check=True, stdout=subprocess.DEVNULL)
    whole, *others = (dict(np.load(f"{scratch}/gradients_{name}.npz")) for name in ("whole", *range(cards)))
    yield within(f"loss, {cards} ranks against one", max(abs(each["loss"] - whole["loss"]).max() for each in others),
                 1e-4)
    largest = max(abs(gradient).max() for name, gradient in whole.items() if name != "loss")
    yield within("gradients, as parts of the largest", max(
        abs(each[name] - whole[name]).max() for each in others for name in whole if name != "loss") / largest, 1e-4)


# ------------------------------------------------------------------------------------------------------------- deployed
def exported(scratch: str, device: str) -> Iterator[dict]:
    """export_model.py, which compares the graph with the network itself."""
    call("export_model", "--params_path", f"{scratch}/mini", "--output_path", f"{scratch}/exported")
    yield row("export", "as the dynamic graph", "", "as the dynamic graph", True)


def deployed(scratch: str, device: str, precision: str, tensorrt: bool) -> Iterator[dict]:
    """The exported graph in Paddle Inference, by deploy/python, against the dynamic graph in fp32."""
    from model import encode, load_model
    from simcse.ranks import set_device

    set_device(device)
    network, tokenizer, _ = load_model(f"{scratch}/mini/{PARAMS_FILE}")
    with open(f"{scratch}/sample/train.csv", encoding="utf-8") as file:
        texts = file.read().split("\n")[:64]
    name = precision + ", TensorRT" * tensorrt

    def compared() -> Iterator[dict]:
        graph = predictor.Predictor(f"{scratch}/exported", device, precision=precision,
                                    tensorrt=(64, LENGTH) if tensorrt else ())
        own = predictor.Tokenizer(f"{scratch}/exported")
        expected = encode(network, tokenizer, texts, LENGTH)
        found = predictor.encode(graph, own, texts, LENGTH)
        if precision == "fp32" and not tensorrt:
            yield within(f"vectors, {name}", abs(found - expected).max(), 1e-4)
        else:
            yield within(f"1 - cosine, {name}", 1 - (found * expected).sum(axis=1).min(), 1e-2)
        speed = len(texts) * per_second(lambda: predictor.encode(graph, own, texts, LENGTH))
        yield row(f"Paddle Inference, {name}", round(speed, 1), "texts/s")

    yield from unless_refused(name, compared())


# --------------------------------------------------------------------------------------------------------------- breaks
def nan_on_the_last_rank(*words: str) -> None:
    """train.py, on whose last rank the loss of step 2 is NaN."""
    import train
    from simcse import gradients

    whole, steps = gradients.backward, []

    def broken(*args: Any) -> Any:
        steps.append(1)
        return whole(*args) * (float("nan") if RANK == RANKS - 1 and len(steps) == 2 else 1)

    gradients.backward = broken
    with patch.object(sys, "argv", ["train.py", *words]):
        train.main()


def training_words(scratch: str, device: str, precision: str, folder: str) -> list[str]:
    """Of train.py with dropout, 50 steps that are saved every 10."""
    return [*map(str, ("--init_from_ckpt", f"{scratch}/small", "--train_set_file", f"{scratch}/sample/train.csv",
                       "--device", device, "--precision", precision, "--batch_size", 16, "--save_steps", 10,
                       "--save_dir", folder, "--visualdl_dir", f"{folder}_log"))]


def nan(scratch: str, device: str) -> Iterator[dict]:
    """A loss of NaN on one rank ends all, with one line."""
    words = [*training_words(scratch, device, "fp32", f"{scratch}/nan"), "--eval_steps", 2]
    code, logs = on_all_cards(device, f"{scratch}/nan_ranks", __file__, "nan_on_the_last_rank", *words)
    said = [line for log in logs for line in log.splitlines() if "error: " in line or "Traceback" in line]
    good = code and len(said) == 1 and "error: the loss of step 2 is nan; its batch is lines" in said[0]
    yield row("NaN on one rank", f"exit code {code}, {len(said)} lines of errors", "", "not 0, 1", bool(good))


def resume(scratch: str, device: str, precision: str) -> Iterator[dict]:
    """Training that kill -9 breaks off and --resume goes on with, against an unbroken run."""
    whole, broken = (training_words(scratch, device, precision, f"{scratch}/{precision}_{name}")
                     for name in ("whole", "broken"))
    # Else a GPU adds up the gradients of the embeddings in any order.
    exact = {**os.environ, "FLAGS_embedding_deterministic": "1", "FLAGS_cudnn_deterministic": "1"}
    subprocess.run([sys.executable, f"{ROOT}/train.py", *whole], check=True, stderr=subprocess.DEVNULL, env=exact)
    with subprocess.Popen([sys.executable, f"{ROOT}/train.py", *broken], stderr=subprocess.PIPE, text=True,
                          env=exact) as process:
        saved = next((line for line in process.stderr if "saved" in line), "")
        process.send_signal(signal.SIGKILL)
    subprocess.run([sys.executable, f"{ROOT}/train.py", *broken, "--resume"], check=True, stderr=subprocess.DEVNULL,
                   env=exact)
    one, other = (read_weights(f"{scratch}/{precision}_{name}/model_{STEPS}/{PARAMS_FILE}", "")
                  for name in ("whole", "broken"))
    # The gradients of keys' biases are 0 but for rounding, which AdamW makes whole steps of.
    difference = max(abs(array - other[name]).max() for name, array in one.items()
                     if device == "cpu" or not name.endswith("k_proj.bias"))
    yield within(f"weights after kill -9 at step {saved.strip().rpartition('_')[2]} and --resume, {precision}",
                 difference, 0 if device == "cpu" else 1e-4)


if __name__ == "__main__":
    if sys.argv[1] == "nan_on_the_last_rank":
        console.run(lambda: nan_on_the_last_rank(*sys.argv[2:]))
    console.run(lambda: serve(globals()))
