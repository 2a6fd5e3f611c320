"""What a run on a GPU does that a CPU can show."""

import argparse
import collections
import contextlib
import functools
import json
from unittest.mock import Mock

import ann_util
import train
from deploy.serving import opening
from scripts import pretrain
from simcse import flags, machine, ranks
from simcse.console import InputError
from simcse.device import set_gpu_precision
from simcse.encoder import engine
from simcse.training import masked_lm, optimization, trainer
from simcse.training.gradients import backward

import numpy as np
import paddle
import pytest
from conftest import ENCODER
from gradients import batch_of, texts, tiny
from paddle.amp.grad_scaler import OptimizerState


def scaler(scale):
    """A loss scaler that is switched on, as a GPU's; on a CPU paddle makes none."""
    found = object.__new__(paddle.amp.GradScaler)
    found._enable, found._scale, found._use_dynamic_loss_scaling = True, paddle.to_tensor([scale]), True
    found._init_loss_scaling, found._incr_ratio, found._decr_ratio = scale, 2.0, 0.5
    found._incr_every_n_steps, found._decr_every_n_nan_or_inf = 2000, 1
    found._incr_count, found._decr_count = 7, 0
    found._optimizer_states = collections.defaultdict(lambda: {"state": OptimizerState.INIT})
    found._temp_found_inf_value_false = paddle.to_tensor([False])
    for kind in ("fp16", "bf16", "fp32"):
        setattr(found, f"_temp_found_inf_{kind}", paddle.to_tensor([False]))
    return found


def test_a_loss_scaler_goes_on_from_its_record():
    whole, other = scaler(4096.0), scaler(1.0)
    record = optimization.scaler_record(whole)
    assert record["scale"] == 4096 and record["incr_count"] == 7
    other._incr_count = 0
    optimization.restore_scaler(other, record)
    assert other._scale.item() == 4096 and other._incr_count == 7
    assert optimization.scaler_record(other) == record
    assert optimization.scaler_record(paddle.amp.GradScaler(enable=False)) == {}


def test_without_decay_all_parameters_by_one_operator_are_adamw():
    settings = argparse.Namespace(weight_decay=0.0, max_grad_norm=0.5)
    networks = [tiny() for _ in range(2)]
    optimizers = [optimization.make_optimizer(settings, networks[0], 0.01), paddle.optimizer.AdamW(
        0.01, parameters=networks[1].parameters(), weight_decay=0.0, grad_clip=paddle.nn.ClipGradByGlobalNorm(0.5))]
    for number in range(3):
        for network, optimizer in zip(networks, optimizers):
            backward(network, network, batch_of(texts(number)), lambda loss: loss)
            optimizer.step()
            optimizer.clear_grad()
    for one, other in zip(*(network.parameters() for network in networks)):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=2e-5)  # of steps of 0.01


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_of_gradients_beyond_the_range_of_fp16_is_left_out(decay, capsys):
    """And said on stderr; the next one is that of an optimizer without scaling."""
    layers = [paddle.nn.Linear(3, 2) for _ in range(2)]
    layers[1].set_state_dict(layers[0].state_dict())
    settings = argparse.Namespace(weight_decay=decay, max_grad_norm=1.0)
    optimizers = [optimization.make_optimizer(settings, layer, 0.1) for layer in layers]
    scales = scaler(1024.0)

    def step(layer, optimizer, scaler, scale):  # `scaler.scale` would switch itself off on a CPU
        ((layer(paddle.ones([1, 3])) ** 2).sum() * scale).backward()
        optimization.take_step(optimizer, scaler)
        optimizer.clear_grad()

    before = layers[0].weight.numpy()
    step(layers[0], optimizers[0], scales, float("inf"))
    np.testing.assert_array_equal(layers[0].weight.numpy(), before)
    said = capsys.readouterr()
    assert scales._scale.item() == 512 and not said.out and "step left out, loss scale lowered to 512" in said.err
    step(layers[0], optimizers[0], scales, 512.0)
    step(layers[1], optimizers[1], paddle.amp.GradScaler(enable=False), 1.0)
    np.testing.assert_allclose(layers[0].weight.numpy(), layers[1].weight.numpy(), atol=1e-6)
    assert not np.allclose(layers[0].weight.numpy(), before) and not capsys.readouterr().err


class Driver:
    """CUDA's, on a machine with GPUs whose compute capabilities have these major numbers."""

    def __init__(self, majors):
        self.majors = majors

    def cuInit(self, flags):
        return flags or (0 if self.majors else 100)  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.majors)

    def cuDeviceGetAttribute(self, value, attribute, device):
        assert attribute == 75
        value._obj.value = self.majors[device]


@pytest.fixture
def gpus(monkeypatch):
    """Gives this process GPUs of such generations; returns paddle's switches of TF32, as they are set."""
    switches = {"cublas": "its own", "cudnn": "its own"}

    def make(*majors):
        machine.gpu_generation.cache_clear()
        monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Driver(majors))
        for name in switches:
            monkeypatch.setattr(paddle.base.core, f"set_{name}_switch", functools.partial(switches.__setitem__, name),
                                raising=False)
        return switches

    yield make
    machine.gpu_generation.cache_clear()


@pytest.mark.parametrize("majors, precision", [
    ([9], "bf16"), ([8, 9], "bf16"), ([7], "fp16"), ([8, 7], "fp16"), ([6], "fp32"), ([], "fp32")])
def test_auto_is_what_all_the_gpus_have(gpus, majors, precision):
    switches = gpus(*majors)
    assert machine.auto_precision("gpu") == precision == set_gpu_precision("auto")
    assert switches == {"cublas": False, "cudnn": False}


def test_tf32_is_on_where_it_is_asked_for_alone(gpus):
    switches = gpus(8)
    for precision, on in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
        assert set_gpu_precision(precision) == precision and set(switches.values()) == {on}


@pytest.mark.parametrize("device, kept, used", [
    ("gpu", "tf32", "fp32"), ("gpu", "fp16", "fp16"), ("gpu", "bf16", "bf16"), ("cpu", "tf32", "fp32"),
    ("cpu", "fp16", "fp32"), ("cpu", "bf16", "bf16")])
def test_an_index_of_a_gpu_is_served_in_what_is_next_to_its_precision(monkeypatch, tmp_path, device, kept, used):
    """recall.py asks it in no other than its own, and not on a CPU where that has none such."""
    monkeypatch.setattr(opening.predictor, "load_predictor", lambda *args, **options: Mock(**options, calibration=""))
    args = argparse.Namespace(model_dir=str(tmp_path), device=device, cpu_threads=0, precision=None)
    assert opening.open_engine(args, kept, 9).precision == used
    (tmp_path / "manifest.json").write_text(json.dumps({"precision": kept}))
    own = device == "gpu" or kept == "bf16"
    assert ann_util.query_precision(str(tmp_path), device) == (kept if own else "auto")


def test_an_exported_graph_is_not_rounded_to_tf32(gpus, monkeypatch):
    switches, config = gpus(8), Mock()
    for name, found in (("is_compiled_with_cuda", True), ("cuda.device_count", 1)):
        monkeypatch.setattr(f"paddle.device.{name}", lambda found=found: found)
    opening.predictor.configure_gpu(config, opening.predictor.Settings("gpu", "fp32", 1, 0, None))
    assert switches == {"cublas": False, "cudnn": False} and config.enable_use_gpu.called


def training(**given):
    """The flags of a training run that is about to be announced."""
    return argparse.Namespace(**{"device": "gpu", "precision": "auto", "resume": None, "epochs": 1, "batch_size": 32,
                                 "cpu_threads": 1, **given})


@pytest.mark.parametrize("given, recorded, precision", [
    ({}, None, "bf16"), ({"precision": "tf32"}, None, "tf32"), ({}, "fp16", "fp16"), ({}, "fp32", "fp32"),
    ({"precision": "fp32"}, "fp16", "fp32"), ({"device": "cpu"}, None, "fp32"), ({"device": "cpu"}, "bf16", "fp32")])
def test_a_run_is_announced_and_recorded_in_its_precision(gpus, tmp_path, capsys, given, recorded, precision):
    """A given one that is not the recorded one is refused when the state is read, as other settings are."""
    gpus(8)
    if recorded:
        (tmp_path / "training_state.json").write_text(json.dumps({"run": {"precision": recorded}}))
        given = {**given, "resume": str(tmp_path)}
    args = training(**given)
    resolved = flags.resolve_training(args)
    assert resolved.precision == precision and args.precision == given.get("precision", "auto")
    flags.announce_training(resolved, "encoder", "9 texts")
    assert f"{args.device}, {'1 thread, ' * (args.device == 'cpu')}{precision}; " in capsys.readouterr().err


def test_encoding_is_announced_in_its_precision(gpus, capsys):
    gpus(7)
    flags.announce(argparse.Namespace(device="gpu", precision="auto"), "model")
    assert ": gpu, fp16; model" in capsys.readouterr().err


def test_ranks_train_in_one_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "join_ranks", lambda: None)
    other = np.array([machine.TRAIN_PRECISIONS.index("fp16")])
    monkeypatch.setattr(ranks, "gather_arrays", lambda array: [array, other])
    with pytest.raises(InputError, match="--precision: this process trains in bf16 and another one does not"):
        trainer.Trainer(training(precision="bf16"), None, None, 1, None)


@pytest.fixture
def casts(monkeypatch):
    """What matrix products were cast to, None after each; on a CPU, of which paddle casts none, it is but noted."""
    found, auto_cast = [], paddle.amp.auto_cast

    @contextlib.contextmanager
    def recorded(level, dtype):
        assert level == "O1"
        found.append(dtype)
        with auto_cast(enable=False):
            yield
        found.append(None)

    monkeypatch.setattr(paddle.amp, "auto_cast", recorded)
    return found


@pytest.mark.parametrize("precision, dtype", [("fp32", None), ("tf32", None), ("bf16", "bfloat16"),
                                              ("fp16", "float16")])
def test_simcse_and_masked_words_are_computed_in_their_precision(casts, precision, dtype):
    network, ids = tiny(), np.array([[1, 5, 6, 2]])
    masked = masked_lm.load_masked_lm(str(ENCODER), 0.0, precision)
    batch = pretrain.MaskedBatch(ids, ids * 0, np.array([1, 2]), np.array([5, 6]), [0])
    network.precision = precision
    for module, compute in ((network, lambda: network.embed(ids, ids * 0)),
                            (masked, lambda: masked(batch))):
        within = []
        layer = next(each for each in module.sublayers() if type(each) is paddle.nn.Linear)
        layer.register_forward_post_hook(lambda *_, within=within: within.append(casts[-1] if casts else None))
        assert compute().dtype == paddle.float32
        assert within == [dtype]


def test_an_engine_of_a_gpu_has_the_precision_that_is_asked_for(gpus, casts, monkeypatch):
    """Whitening is fitted in fp32 while the network, whose weights these are, trains in another."""
    network, switches = tiny(), gpus(8)
    network.precision = "bf16"
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    for asked, precision in (("auto", "bf16"), ("fp32", "fp32"), ("tf32", "tf32")):
        made = engine.make_engine(network, asked)
        assert made.precision == precision and network.precision == "bf16"
        assert switches["cublas"] is (precision == "tf32")
        assert all(one is other for one, other in zip(made.parameters(), network.parameters()))
        made.embed(np.ones((1, 4), "int64"), np.zeros((1, 4), "int64"))
        assert casts == ["bfloat16", None], "in bf16 alone"


@pytest.mark.parametrize("batch, chunk, length, tokens", [
    (32, None, 128, 8192), (64, None, 64, 8192), (256, None, 64, 32768), (4096, 64, 128, 16384), (8, 64, 16, 8192)])
def test_an_evaluation_takes_no_more_tokens_at_once_than_a_step(batch, chunk, length, tokens):
    """Or a few, of which nothing has to be kept for gradients."""
    assert train.evaluation_tokens(training(batch_size=batch, chunk_size=chunk, max_seq_length=length)) == tokens


@pytest.mark.parametrize("major, precision", [(7, "bf16"), (7, "tf32"), (6, "fp16")])
def test_a_precision_that_a_gpu_has_not_is_refused_before_anything(gpus, monkeypatch, major, precision):
    monkeypatch.setattr(trainer, "set_device", lambda *_: None)
    gpus(major)
    args = argparse.Namespace(device="gpu", cpu_threads=0, precision=precision, seed=0)
    with pytest.raises(InputError, match=f"--precision {precision}: this GPU does not have it"):
        trainer.run_training(args, lambda: pytest.fail("it trains"))
