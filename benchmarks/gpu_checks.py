"""Jobs of gpu.py that compare, so that their rows are right or wrong.

Nothing but the repository is needed: numpy draws the weights, and scripts/make_sample_data.py makes the texts.
"""

import contextlib
import ctypes
import itertools
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
from data import Batch, DuplicateKeys, Inputs, hash_token_ids
from deploy.python import encoder, predictor
from simcse import console, files
from simcse.encoder.weights import PARAMS_FILE, load_state, read_weights
from simcse.machine import RANK, RANKS
from simcse.text.textfile import TextFile
from simcse.text.wordpiece import load_tokenizer
from simcse.training.checkpoints import saved_steps

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

FC = 32  # size of the vectors
LENGTH = 32  # tokens of a text
STEPS = 50  # of training
# How far values may be from those recorded in fp32 on a CPU: vectors and scores absolutely, losses relatively.
# Rounding the factors of all products on a CPU to fp16 moves losses by 2e-3, to bf16 by 2e-2.
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}


# ------------------------------------------------------------------------------------------------------- what is made
def prepare(scratch: str, device: str, sizes: list[str]) -> None:
    """Write the checkpoints.

    Their weights depend only on names and shapes, so that they are the same on every machine and stack. Those of
    "small" are larger, so that its vectors differ.
    """
    from model import SimCSE, make_record, save_checkpoint
    from simcse.device import set_device
    from simcse.encoder.pretrained import encoder_from_record

    set_device("cpu")
    for name in sizes:
        record = {"encoder_class": "ErnieModel", "encoder_config": SIZES[name]}
        network = SimCSE(encoder_from_record(record, None), output_emb_size=FC)
        spread = 0.1 if name == "small" else 0.02
        state = {}
        for key, tensor in network.state_dict().items():
            random = np.random.RandomState(zlib.crc32(key.encode()))
            mean = 1 if "norm" in key and key.endswith("weight") else 0
            state[key] = mean + spread * random.standard_normal(tensor.shape).astype("float32")
        load_state(network, state, name)
        save_checkpoint(f"{scratch}/{name}", network, load_tokenizer(MINI), make_record(network, MINI, LENGTH))
    report("checkpoints", ", ".join(sizes))


def machine(scratch: str, device: str) -> None:
    """Report the machine, the stack and the GPUs."""
    from simcse.device import compute_capabilities, set_device

    import paddle
    import paddlenlp

    report("processor, Python", describe_machine())
    report("paddle", paddle.__version__)
    report("paddlenlp", paddlenlp.__version__)
    report("CUDA, cuDNN of the build", f"{paddle.version.cuda()}, {paddle.version.cudnn()}")
    built = " ".join(f"{number // 10}.{number % 10}" for number in compute_capabilities())
    report("compute capabilities of the build", built or "not known")
    if device == "gpu":
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            report("driver", subprocess.check_output(command, text=True).split("\n")[0])
        for number in range(paddle.device.cuda.device_count()):
            card = paddle.device.cuda.get_device_properties(number)
            report(f"card {number}", f"{card.name}, {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB, "
                   f"{card.multi_processor_count} multiprocessors")
    set_device(device)
    report("computes", "yes", "", "yes", True)


# --------------------------------------------------------------------------------------------------- recorded figures
def encoded(scratch: str, device: str, precision: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield vectors, [texts, FC], and scores of pairs, [pairs], by inference.py and predict.py."""
    words = ["--params_path", f"{scratch}/small", "--device", device, "--precision", precision]
    call("inference", *words, "--input_file", f"{scratch}/sample/some.csv", "--output_file", f"{scratch}/v.npy")
    yield "vectors", np.load(f"{scratch}/v.npy")
    scores = call("predict", *words, "--text_pair_file", f"{scratch}/sample/pairs.csv")
    yield "scores", np.array(scores.split(), "float64")


def trained(scratch: str, device: str, precision: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the losses of train.py, [STEPS], without dropout, and the vectors in fp32 after the training."""
    from simcse.training import gradients

    losses = []
    backward = gradients.backward
    folder = f"{scratch}/trained_{precision}"

    def recording_backward(*args: Any) -> Any:
        loss = backward(*args)
        losses.append(loss.value)
        return loss

    with patch.object(gradients, "backward", recording_backward):
        call("train", "--init_from_ckpt", f"{scratch}/small", "--train_set_file", f"{scratch}/sample/train.csv",
             "--device", device, "--precision", precision, "--batch_size", 16, "--dropout", 0,
             "--output_dropout", 0, "--infer_with_fc_pooler", "--save_dir", folder, "--visualdl_dir", f"{folder}/log")
    yield "losses", np.array([float(loss) for loss in losses])
    call("inference", "--params_path", f"{folder}/model_{STEPS}", "--device", device, "--precision", "fp32",
         "--input_file", f"{scratch}/sample/some.csv", "--output_file", f"{scratch}/v.npy")
    yield "vectors after training", np.load(f"{scratch}/v.npy")


def figures(scratch: str, device: str, precision: str) -> None:
    """Report the largest differences to the recorded values."""
    recorded = files.read_json(f"{scratch}/figures.json")
    for what, compute in (("encoding", encoded), ("training", trained)):
        with unless_refused(f"{what}, {precision}"):
            for name, values in compute(scratch, device, precision):
                expected = np.array(recorded[name])
                if values.shape != expected.shape:
                    difference = np.nan
                elif name == "losses":
                    difference = abs(values / expected - 1).max()
                else:
                    difference = abs(values - expected).max()
                report_within(f"{name}, {precision}", difference, TOLERANCES[precision])


def record(scratch: str, device: str) -> None:
    """Write the values of fp32, with which others are compared."""
    recorded = {}
    for compute in (encoded, trained):
        for name, values in compute(scratch, device, "fp32"):
            recorded[name] = np.round(values, 6).tolist()
    with files.new_file(f"{scratch}/figures.json") as file:
        json.dump(recorded, file, separators=(",", ":"))
    report("recorded", ", ".join(recorded))


# ----------------------------------------------------------------------------------------------------------- all cards
def rank_gradients(scratch: str, device: str, ranks: int) -> None:
    """Write the loss and the gradients of a step with cross-device negatives.

    Args:
        ranks: how many processes share the batch. If this process is the only one, it has all of the batch.
    """
    from model import LossSettings, load_model
    from simcse.device import set_device
    from simcse.ranks import join_ranks
    from simcse.training.gradients import backward

    import paddle

    set_device(device)
    join_ranks()
    model, tokenizer, _ = load_model(f"{scratch}/small/{PARAMS_FILE}", encoder_dropout=0, output_dropout=0,
                                     loss_settings=LossSettings(cross_device_negatives=True))
    model.train()
    texts = TextFile(f"{scratch}/sample/train.csv", "--train_set_file")
    share = slice(0, 16 * ranks) if RANKS == 1 else slice(16 * RANK, 16 * RANK + 16)
    ids = tokenizer(texts[share], LENGTH)
    inputs = Inputs.of(ids, tokenizer.pad_token_id)
    keys = hash_token_ids(ids)
    batch = Batch(inputs, inputs, duplicate_keys=DuplicateKeys(keys, keys))
    if RANKS > 1:
        name = str(RANK)
        network = paddle.DataParallel(model)
    else:
        name = "whole"
        network = model
    arrays = {"loss": backward(network, model, batch, lambda loss: loss).value.numpy()}
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            arrays[parameter_name] = parameter.grad.numpy()
    np.savez(f"{scratch}/gradients_{name}.npz", **arrays)


def ranks(scratch: str, device: str, cards: int) -> None:
    """Compare cross-device negatives on all cards with one process that has the batches of all."""
    if cards == 1:
        report("several cards", "not there: one card")
        return
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 is compared
    job = [__file__, "rank_gradients", json.dumps({"scratch": scratch, "device": device, "ranks": cards})]
    code, logs = on_all_cards(device, f"{scratch}/ranks", *job)
    if code:
        raise console.InputError(f"the launcher ended with {code}: {last_line(logs[0])}")
    alone(*job)
    whole = dict(np.load(f"{scratch}/gradients_whole.npz"))
    largest = max(abs(array).max() for name, array in whole.items() if name != "loss")
    loss_differences = []
    gradient_differences = []
    for rank in range(cards):
        of_rank = np.load(f"{scratch}/gradients_{rank}.npz")
        for name, array in whole.items():
            difference = abs(of_rank[name] - array).max()
            if name == "loss":
                loss_differences.append(difference)
            else:
                gradient_differences.append(difference / largest)
    report_within(f"loss, {cards} ranks against one", max(loss_differences), 1e-4)
    report_within("gradients, as parts of the largest", max(gradient_differences), 1e-4)


# ------------------------------------------------------------------------------------------------------------- deployed
def exported(scratch: str, device: str, size: str) -> None:
    """Run export_model.py, which compares the graph with the network itself."""
    call("export_model", "--params_path", f"{scratch}/{size}", "--output_path", f"{scratch}/exported")
    report("export", "as the dynamic graph", "", "as the dynamic graph", True)


def deployed(scratch: str, device: str, size: str, precision: str, tensorrt: bool) -> None:
    """Compare the exported graph in Paddle Inference, by deploy/python, with the dynamic graph in fp32."""
    from model import load_model
    from simcse.device import set_device, set_gpu_precision
    from simcse.encoder.encoder import Encoder

    set_device(device)
    network, tokenizer, _ = load_model(f"{scratch}/{size}/{PARAMS_FILE}")
    with open(f"{scratch}/sample/train.csv", encoding="utf-8") as file:
        texts = file.read().split("\n")[:32]
    name = f"{precision}, TensorRT" if tensorrt else precision

    with unless_refused(name):
        if device == "gpu":
            set_gpu_precision(precision)
        if tensorrt:
            with console.as_input_error("--use_tensorrt", OSError):
                ctypes.CDLL("libnvinfer.so")  # which paddle opens by this name
        graph = predictor.load_predictor(f"{scratch}/exported", device=device, precision=precision,
                                         tensorrt=predictor.TensorRtShape(64, LENGTH) if tensorrt else None)
        own = encoder.Tokenizer(f"{scratch}/exported")
        expected = Encoder(network, tokenizer, LENGTH).encode(texts)
        embeddings = encoder.encode(graph, own, texts, LENGTH).embeddings
        most = 1e-5 if precision == "fp32" and not tensorrt else 1e-2
        report_within(f"1 - cosine, {name}", 1 - (embeddings * expected).sum(axis=1).min(), most)
        speed = len(texts) * per_second(lambda: encoder.encode(graph, own, texts, LENGTH))
        report(f"Paddle Inference, {name}", round(speed, 1), "texts/s")


# --------------------------------------------------------------------------------------------------------------- breaks
def nan_on_the_last_rank(*words: str) -> None:
    """Run train.py with a loss of step 2 that is NaN on the last rank."""
    import train
    from simcse.training import gradients

    backward = gradients.backward
    steps = itertools.count(1)

    def broken_backward(*args: Any) -> Any:
        loss = backward(*args)
        step = next(steps)
        if RANK == RANKS - 1 and step == 2:
            return loss._replace(value=loss.value * float("nan"))
        return loss

    with patch.object(gradients, "backward", broken_backward), patch.object(sys, "argv", ["train.py", *words]):
        train.main()


def training_words(scratch: str, device: str, precision: str, folder: str) -> list[str]:
    """Return flags of train.py: with dropout, 50 steps, a checkpoint every 10."""
    return ["--init_from_ckpt", f"{scratch}/small", "--train_set_file", f"{scratch}/sample/train.csv", "--device",
            device, "--precision", precision, "--batch_size", "16", "--save_steps", "10", "--save_dir", folder,
            "--visualdl_dir", f"{folder}_log"]


def nan(scratch: str, device: str) -> None:
    """Check that a loss of NaN on one rank ends all ranks with one line."""
    words = [*training_words(scratch, device, "fp32", f"{scratch}/nan"), "--eval_steps", 2]
    code, logs = on_all_cards(device, f"{scratch}/nan_ranks", __file__, "nan_on_the_last_rank", *words)
    errors = [line for log in logs for line in log.splitlines() if "error: " in line or "Traceback" in line]
    ok = code != 0 and len(errors) == 1 and "error: the loss of step 2 is nan (batch: lines" in errors[0]
    report("NaN on one rank", f"exit code {code}, {len(errors)} error", "", "not 0, 1 error", ok)


def resume(scratch: str, device: str, precision: str) -> None:
    """Compare training that kill -9 interrupts and --resume continues with an unbroken run."""
    whole_dir = f"{scratch}/{precision}_whole"
    broken_dir = f"{scratch}/{precision}_broken"
    whole = training_words(scratch, device, precision, whole_dir)
    broken = training_words(scratch, device, precision, broken_dir)
    # Without these a GPU adds up the gradients of the embeddings in any order.
    os.environ.update(FLAGS_embedding_deterministic="1", FLAGS_cudnn_deterministic="1")
    with unless_refused(f"--resume, {precision}"):
        alone(f"{ROOT}/train.py", *whole)
        words = [sys.executable, f"{ROOT}/train.py", *broken]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                if "saved" in line:
                    break
            process.send_signal(signal.SIGKILL)
        last = saved_steps(broken_dir)[-1]
        report(f"kill -9, {precision}, left of {STEPS} steps", last, "", f"< {STEPS}", last < STEPS)
        alone(f"{ROOT}/train.py", *broken, "--resume")
        expected = read_weights(f"{whole_dir}/model_{STEPS}/{PARAMS_FILE}", "")
        resumed = read_weights(f"{broken_dir}/model_{STEPS}/{PARAMS_FILE}", "")
        # The gradients of keys' biases are 0 but for rounding, which AdamW makes whole steps of.
        difference = max(abs(array - resumed[name]).max() for name, array in expected.items()
                         if device == "cpu" or not name.endswith("k_proj.bias"))
        report_within(f"weights after --resume, {precision}", difference, 0 if device == "cpu" else 1e-4)


if __name__ == "__main__":
    if sys.argv[1] == "nan_on_the_last_rank":
        console.run(lambda: nan_on_the_last_rank(*sys.argv[2:]))
    console.run(lambda: serve(globals()))
