"""Apply gradients: AdamW, its learning rate schedule, and the loss scaling of fp16."""

import argparse
import contextlib
import io
from typing import Any

from simcse.console import log
from simcse.machine import RANK

import numpy as np
import paddle
from paddle import nn


class Optimization:
    """The optimizer of a run with its learning rate schedule and its loss scaler.

    Args:
        args: the flags of `flags.add_optimization_arguments`, and --device.
        model: the network whose parameters are trained.
        total_steps: steps of the run; the learning rate falls to 0 by its end.

    Attributes:
        scaler: scales the loss in fp16; in other precisions it is off.
        learning_rate: of the step that was taken last.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Layer, total_steps: int) -> None:
        from paddlenlp.transformers import LinearDecayWithWarmup

        self.schedule = LinearDecayWithWarmup(args.learning_rate, total_steps, args.warmup_proportion)
        self.optimizer = make_optimizer(args, model, self.schedule)
        use_scaler = args.precision == "fp16" and args.device == "gpu"
        self.scaler = paddle.amp.GradScaler(enable=use_scaler, init_loss_scaling=2.0**15)
        self.learning_rate = self.optimizer.get_lr()

    def step(self) -> None:
        """Apply the gradients, clear them, and advance the learning rate schedule."""
        self.learning_rate = self.optimizer.get_lr()
        take_step(self.optimizer, self.scaler)
        self.schedule.step()
        self.optimizer.clear_grad()


def make_optimizer(args: argparse.Namespace, model: nn.Layer, schedule: Any) -> paddle.optimizer.Optimizer:
    """Return AdamW, which decays all weights but biases and norms.

    Without --weight_decay it is Adam, which is the same then, and updates all parameters by one operator.

    Args:
        args: has --weight_decay and --max_grad_norm.
        model: the network whose parameters are trained.
        schedule: the learning rate, or its schedule.
    """
    clip = nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm else None
    if not args.weight_decay:
        return paddle.optimizer.Adam(schedule, parameters=model.parameters(), grad_clip=clip, use_multi_tensor=True)
    decayed = {parameter.name for name, parameter in model.named_parameters()
               if "bias" not in name and "norm" not in name}
    return paddle.optimizer.AdamW(schedule, parameters=model.parameters(), weight_decay=args.weight_decay,
                                  apply_decay_param_fun=decayed.__contains__, grad_clip=clip)


def take_step(optimizer: paddle.optimizer.Optimizer, scaler: paddle.amp.GradScaler) -> None:
    """Apply the gradients of a scaled loss.

    Where gradients are beyond the range of fp16, the weights stay as they are, and the loss scale is lowered.
    """
    scaler.step(optimizer)
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # paddle prints there that it leaves a step out
        scaler.update()
    if printed.getvalue() and not RANK:
        loss_scale = scaler_record(scaler)["scale"]
        log(f"gradients are beyond the range of fp16: step left out, loss scale lowered to {loss_scale:g}")


def scaler_record(scaler: paddle.amp.GradScaler) -> dict[str, float]:
    """Return the state of a loss scaler as numbers that JSON can hold; {} if the scaler is off."""
    record = {}
    for name, value in scaler.state_dict().items():
        is_tensor = not isinstance(value, (bool, int))
        record[name] = float(np.ravel(value)[0]) if is_tensor else value
    return record


def restore_scaler(scaler: paddle.amp.GradScaler, record: dict[str, float]) -> None:
    """Restore the state of a loss scaler from its `scaler_record`."""
    scaler.load_state_dict({**record, "scale": np.array([record["scale"]], "float32")})
