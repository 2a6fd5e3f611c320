"""What a run on a GPU does that a CPU can show."""

import argparse

from simcse import run
from simcse.console import InputError

import paddle
import pytest


def scaler(scale):
    """A loss scaler that is switched on, as a GPU's; on a CPU paddle makes none."""
    found = object.__new__(paddle.amp.GradScaler)
    found._enable, found._scale, found._use_dynamic_loss_scaling = True, paddle.to_tensor([scale]), True
    found._init_loss_scaling, found._incr_ratio, found._decr_ratio = scale, 2.0, 0.5
    found._incr_every_n_steps, found._decr_every_n_nan_or_inf = 2000, 1
    found._incr_count, found._decr_count = 7, 0
    return found


def test_a_loss_scaler_goes_on_from_its_record():
    whole, other = scaler(4096.0), scaler(1.0)
    record = run.scaler_record(whole)
    assert record["scale"] == 4096 and record["incr_count"] == 7
    other._incr_count = 0
    run.restore_scaler(other, record)
    assert other._scale.item() == 4096 and other._incr_count == 7
    assert run.scaler_record(other) == record
    assert run.scaler_record(paddle.amp.GradScaler(enable=False)) == {}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_a_gpu_has_not_is_refused_before_anything(monkeypatch, precision):
    monkeypatch.setattr(run, "set_device", lambda *_: None)
    for name in ("is_bfloat16_supported", "is_float16_supported"):
        monkeypatch.setattr(paddle.amp, name, lambda: False)
    args = argparse.Namespace(device="gpu", cpu_threads=0, precision=precision, seed=0)
    with pytest.raises(InputError, match=f"--precision {precision}: this GPU does not have it"):
        run.run_training(args, lambda: pytest.fail("it trains"))
