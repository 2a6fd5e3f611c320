"""What gpu.py finds to be right or wrong: jobs that compare.

Everything is made here: encoders whose weights numpy draws, and texts of scripts/make_sample_data.py.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from bench import MINI, ROOT, describe_machine  # first: it makes the project importable
from data import Batch, DuplicateKeys, Inputs, text_keys
from deploy.python import encoder, predictor
from simcse import console, files
from simcse.encoder.weights import PARAMS_FILE, load_state, read_weights, saved_steps
from simcse.machine import RANK, RANKS
from simcse.text.textfile import TextFile
from simcse.text.wordpiece import load_tokenizer

import numpy as np
from gpu_jobs import (
    SIZES,
    alone,
    call,
    last_line,
    on_all_cards,
    per_second,
    report,
    report_within,
    serve,
    unless_refused,
)

FC, LENGTH, STEPS = 32, 32, 50  # size of the vectors, tokens of a text, training steps
# How far figures may be from those recorded in fp32 on a CPU: vectors and scores by themselves, losses relatively.
# Rounding the factors of all products on a CPU to fp16 moves losses by 2e-3, to bf16 by 2e-2.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


# ------------------------------------------------------------------------------------------------------- what is made
def prepare(scratch: str, device: str, sizes: list[str]) -> None:
    """Write the checkpoints. Their weights depend on names and shapes alone, so that they are the same on every machine
    and stack; those of "small" are larger, so that its vectors differ."""
    from model import SimCSE, make_record, save_checkpoint
    from simcse.device import set_device
    from simcse.encoder.pretrained import encoder_from_record

    set_device("cpu")
    for name in sizes:
        record = {"encoder_class": "ErnieModel", "encoder_config": SIZES[name]}
        network, state = SimCSE(encoder_from_record(record, None), output_emb_size=FC), {}
        spread = 0.1 if name == "small" else 0.02
        for key, tensor in network.state_dict().items():
            drawn = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tensor.shape).astype("float32")
            state[key] = spread * drawn + ("norm" in key and key.endswith("weight"))
        load_state(network, state, name)
        save_checkpoint(f"{scratch}/{name}", network, load_tokenizer(MINI), make_record(network, MINI, LENGTH))
    report("checkpoints", ", ".join(sizes))


def machine(scratch: str, device: str) -> None:
    """What there is."""
    from simcse.device import compute_capabilities, set_device

    import paddle
    import paddlenlp

    report("processor, Python", describe_machine())
    report("paddle", paddle.__version__)
    report("paddlenlp", paddlenlp.__version__)
    report("CUDA, cuDNN of the build", f"{paddle.version.cuda()}, {paddle.version.cudnn()}")
    built = " ".join(f"{each // 10}.{each % 10}" for each in compute_capabilities())
    report("compute capabilities of the build", built or "not known")
    if device == "gpu":
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            report("driver", subprocess.check_output(asked, text=True).split("\n")[0])
        for number in range(paddle.device.cuda.device_count()):
            card = paddle.device.cuda.get_device_properties(number)
            report(f"card {number}", f"{card.name}, {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB, "
                   f"{card.multi_processor_count} multiprocessors")
    set_device(device)
    report("computes", "yes", "", "yes", True)


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
    from simcse.training import gradients

    losses, whole, folder = [], gradients.backward, f"{scratch}/trained_{precision}"

    def observed(*args: Any) -> Any:
        losses.append(whole(*args))
        return losses[-1]

    with patch.object(gradients, "backward", observed):
        call("train", "--init_from_ckpt", f"{scratch}/small", "--train_set_file", f"{scratch}/sample/train.csv",
             "--device", device, "--precision", precision, "--batch_size", 16, "--dropout", 0,
             "--output_dropout", 0, "--infer_with_fc_pooler", "--save_dir", folder, "--visualdl_dir", f"{folder}/log")
    yield "losses", np.array([float(loss) for loss in losses])
    call("inference", "--params_path", f"{folder}/model_{STEPS}", "--device", device, "--precision", "fp32",
         "--input_file", f"{scratch}/sample/some.csv", "--output_file", f"{scratch}/v.npy")
    yield "vectors after training", np.load(f"{scratch}/v.npy")


def figures(scratch: str, device: str, precision: str) -> None:
    """The largest differences to the recorded figures."""
    recorded = files.read_json(f"{scratch}/figures.json")
    for what, part in (("encoding", encoded), ("training", trained)):
        with unless_refused(f"{what}, {precision}"):
            for name, found in part(scratch, device, precision):
                expected = np.array(recorded[name])
                scale = expected if name == "losses" else 1
                same = found.shape == expected.shape
                report_within(f"{name}, {precision}", abs((found - expected) / scale).max() if same else np.nan,
                              TOLERANCES[precision])


def record(scratch: str, device: str) -> None:
    """Write the figures of fp32."""
    found = {name: np.round(values, 6).tolist() for part in (encoded, trained)
             for name, values in part(scratch, device, "fp32")}
    with files.new_file(f"{scratch}/figures.json") as file:
        json.dump(found, file, separators=(",", ":"))
    report("recorded", ", ".join(found))


# ----------------------------------------------------------------------------------------------------------- all cards
def rank_gradients(scratch: str, device: str, ranks: int) -> None:
    """Write the loss and the gradients of a step with cross-device negatives on so many ranks, or, of one process, with
    the batches of all of them as one."""
    from model import LossSettings, load_model
    from simcse.device import set_device
    from simcse.ranks import join_ranks
    from simcse.training.gradients import backward

    import paddle

    set_device(device)
    join_ranks()
    model, tokenizer, _ = load_model(f"{scratch}/small/{PARAMS_FILE}", dropout=0, settings={
        "dropout": 0.0, "loss_settings": LossSettings(cross_device_negatives=True)})
    model.train()
    texts = TextFile(f"{scratch}/sample/train.csv", "--train_set_file")
    ids = tokenizer(texts[: 16 * ranks][RANK * 16 : None if RANKS == 1 else RANK * 16 + 16], LENGTH)
    inputs, keys = Inputs.of(ids, tokenizer.pad_token_id), text_keys(ids)
    batch = Batch(inputs, inputs, duplicate_keys=DuplicateKeys(keys, keys))
    loss = backward(paddle.DataParallel(model) if RANKS > 1 else model, model, batch, lambda loss: loss)
    np.savez(f"{scratch}/gradients_{RANK if RANKS > 1 else 'whole'}.npz", loss=loss.numpy(), **{
        name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None})


def ranks(scratch: str, device: str, cards: int) -> None:
    """Cross-device negatives on all cards against one process with the batches of all."""
    if cards == 1:
        report("several cards", "not there: one card")
        return
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 is compared
    job = [__file__, "rank_gradients", json.dumps({"scratch": scratch, "device": device, "ranks": cards})]
    code, logs = on_all_cards(device, f"{scratch}/ranks", *job)
    if code:
        raise console.InputError(f"the launcher ended with {code}: {last_line(logs[0])}")
    alone(*job)
    whole, *others = (dict(np.load(f"{scratch}/gradients_{name}.npz")) for name in ("whole", *range(cards)))
    report_within(f"loss, {cards} ranks against one", max(abs(each["loss"] - whole["loss"]).max() for each in others),
                 1e-4)
    largest = max(abs(gradient).max() for name, gradient in whole.items() if name != "loss")
    report_within("gradients, as parts of the largest", max(
        abs(each[name] - whole[name]).max() for each in others for name in whole if name != "loss") / largest, 1e-4)


# ------------------------------------------------------------------------------------------------------------- deployed
def exported(scratch: str, device: str, size: str) -> None:
    """export_model.py, which compares the graph with the network itself."""
    call("export_model", "--params_path", f"{scratch}/{size}", "--output_path", f"{scratch}/exported")
    report("export", "as the dynamic graph", "", "as the dynamic graph", True)


def deployed(scratch: str, device: str, size: str, precision: str, tensorrt: bool) -> None:
    """The exported graph in Paddle Inference, by deploy/python, against the dynamic graph in fp32."""
    from model import load_model
    from simcse.device import gpu_precision, set_device
    from simcse.encoder.encoder import Encoder

    set_device(device)
    network, tokenizer, _ = load_model(f"{scratch}/{size}/{PARAMS_FILE}")
    with open(f"{scratch}/sample/train.csv", encoding="utf-8") as file:
        texts = file.read().split("\n")[:32]
    name = precision + ", TensorRT" * tensorrt

    with unless_refused(name):
        if device == "gpu":
            gpu_precision(precision)
        if tensorrt:
            with console.reported("--use_tensorrt", OSError):
                ctypes.CDLL("libnvinfer.so")  # which paddle opens by this name
        graph = predictor.load_predictor(f"{scratch}/exported", device=device, precision=precision,
                                         tensorrt=predictor.TensorRtShape(64, LENGTH) if tensorrt else None)
        own = encoder.Tokenizer(f"{scratch}/exported")
        expected = Encoder(network, tokenizer, LENGTH).encode(texts)
        found = encoder.encode(graph, own, texts, LENGTH).embeddings
        report_within(f"1 - cosine, {name}", 1 - (found * expected).sum(axis=1).min(),
                      1e-5 if precision == "fp32" and not tensorrt else 1e-2)
        speed = len(texts) * per_second(lambda: encoder.encode(graph, own, texts, LENGTH))
        report(f"Paddle Inference, {name}", round(speed, 1), "texts/s")


# --------------------------------------------------------------------------------------------------------------- breaks
def nan_on_the_last_rank(*words: str) -> None:
    """train.py, on whose last rank the loss of step 2 is NaN."""
    import train
    from simcse.training import gradients

    whole, steps = gradients.backward, []

    def broken(*args: Any) -> Any:
        steps.append(1)
        return whole(*args) * (float("nan") if RANK == RANKS - 1 and len(steps) == 2 else 1)

    with patch.object(gradients, "backward", broken), patch.object(sys, "argv", ["train.py", *words]):
        train.main()


def training_words(scratch: str, device: str, precision: str, folder: str) -> list[str]:
    """Of train.py with dropout, 50 steps that are saved every 10."""
    return [*map(str, ("--init_from_ckpt", f"{scratch}/small", "--train_set_file", f"{scratch}/sample/train.csv",
                       "--device", device, "--precision", precision, "--batch_size", 16, "--save_steps", 10,
                       "--save_dir", folder, "--visualdl_dir", f"{folder}_log"))]


def nan(scratch: str, device: str) -> None:
    """A loss of NaN on one rank ends all, with one line."""
    words = [*training_words(scratch, device, "fp32", f"{scratch}/nan"), "--eval_steps", 2]
    code, logs = on_all_cards(device, f"{scratch}/nan_ranks", __file__, "nan_on_the_last_rank", *words)
    said = [line for log in logs for line in log.splitlines() if "error: " in line or "Traceback" in line]
    good = code and len(said) == 1 and "error: the loss of step 2 is nan; its batch is lines" in said[0]
    report("NaN on one rank", f"exit code {code}, {len(said)} error", "", "not 0, 1 error", bool(good))


def resume(scratch: str, device: str, precision: str) -> None:
    """Training that kill -9 breaks off and --resume goes on with, against an unbroken run."""
    whole, broken = (training_words(scratch, device, precision, f"{scratch}/{precision}_{name}")
                     for name in ("whole", "broken"))
    # Else a GPU adds up the gradients of the embeddings in any order.
    os.environ.update(FLAGS_embedding_deterministic="1", FLAGS_cudnn_deterministic="1")
    with unless_refused(f"--resume, {precision}"):
        alone(f"{ROOT}/train.py", *whole)
        words = [sys.executable, f"{ROOT}/train.py", *broken]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            any("saved" in line for line in process.stderr)
            process.send_signal(signal.SIGKILL)
        last = saved_steps(f"{scratch}/{precision}_broken")[-1]
        report(f"kill -9, {precision}, left of {STEPS} steps", last, "", f"< {STEPS}", last < STEPS)
        alone(f"{ROOT}/train.py", *broken, "--resume")
        one, other = (read_weights(f"{scratch}/{precision}_{name}/model_{STEPS}/{PARAMS_FILE}", "")
                      for name in ("whole", "broken"))
        # The gradients of keys' biases are 0 but for rounding, which AdamW makes whole steps of.
        difference = max(abs(array - other[name]).max() for name, array in one.items()
                         if device == "cpu" or not name.endswith("k_proj.bias"))
        report_within(f"weights after --resume, {precision}", difference, 0 if device == "cpu" else 1e-4)


if __name__ == "__main__":
    if sys.argv[1] == "nan_on_the_last_rank":
        console.run(lambda: nan_on_the_last_rank(*sys.argv[2:]))
    console.run(lambda: serve(globals()))
