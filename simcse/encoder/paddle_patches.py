"""All places where simcse/encoder changes what paddle, PaddleNLP or NNCF do, each with its reason and version.

Contexts restore what they replace. `compute_first_token_only` and `train_faster_on_cpu` replace `forward` of a
network's layers for good.
"""

import contextlib
import ctypes
import functools
import inspect
import io
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

STDERR = 2  # its file descriptor, to which C++ writes


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module, class or object within the context."""
    is_own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# ----------------------------------------------------------------------------------------------------- Paddle Inference
@contextlib.contextmanager
def quiet_passes() -> Iterator[None]:
    """Discard what paddle 2.6 prints on stderr about each change of a bf16 graph ("--- marked 159 operators ...").

    `disable_glog_info` leaves it. Errors are exceptions, which pass. deploy/python/predictor.py has the same.
    """
    if not paddle.__version__.startswith("2."):
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(STDERR)
    discarded = os.open(os.devnull, os.O_WRONLY)
    os.dup2(discarded, STDERR)
    os.close(discarded)
    try:
        yield
    finally:
        os.dup2(stderr, STDERR)
        os.close(stderr)


# ------------------------------------------------------------------------------------------------------ PaddleNLP, NNCF
def quiet_paddlenlp() -> None:
    """Let paddlenlp (2.8 and 3.0) log warnings only; it logs every file that it reads."""
    from paddlenlp.utils.log import logger

    logger.set_level("WARNING")


@contextlib.contextmanager
def captured_paddlenlp_log() -> Iterator[list[str]]:
    """Collect what paddlenlp (2.8 and 3.0) logs, instead of printing it.

    Only in its log does it tell which layers it has left at random since the weights lack them.
    """
    from paddlenlp.utils.log import logger

    messages: list[str] = []
    with replaced(logger.logger, "handle", lambda record: messages.append(record.getMessage())):
        yield messages


@contextlib.contextmanager
def zero_initial_weights() -> Iterator[None]:
    """Make new layers with weights of 0, for a network whose weights are then loaded.

    Drawing those of ERNIE-base at random takes longer than all else of a start. Paddle's layers (2.6 and 3.3) draw
    them by the global initializer or, in ERNIE, by TruncatedNormal; paddlenlp (2.8 and 3.0) then draws them again.
    """
    zeros = nn.initializer.Constant(0.0)

    def initialize(_: Any, *arguments: Any) -> Any:
        return zeros.forward(*arguments)

    nn.initializer.set_global_initializer(zeros)
    try:
        with (replaced(nn.initializer.TruncatedNormal, "forward", initialize),
              replaced(paddle.tensor, "normal", lambda mean, std, shape: paddle.empty(shape))):
            yield
    finally:
        nn.initializer.set_global_initializer(None)


def import_openvino() -> ModuleType:
    """Return OpenVINO (2026), imported without its telemetry, which asks Google Analytics at every start.

    It goes without where the telemetry's package is not installed, and so does NNCF (3.x).
    """
    sys.modules.setdefault("openvino_telemetry", None)  # from now on as if it were not installed
    import openvino

    return openvino


class SignalStack(ctypes.Structure):
    """C's `stack_t`, as Linux has it: the memory in which the signal handlers of a thread run."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def read_signal_stack() -> SignalStack:
    """Return the stack of signal handlers of this thread; only on Linux."""
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack


@contextlib.contextmanager
def keep_signal_stack() -> Iterator[None]:
    """Give this thread the stack of signal handlers back that it had before models were compiled by OpenVINO (2026).

    OpenVINO sets a stack for each model, and gives back the one from before when the model is freed. Where two models
    are freed in the order in which they were made, that is the stack of the first one, which is gone: the next signal,
    Ctrl-C for instance, is a segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    stack = read_signal_stack()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None)


@contextlib.contextmanager
def quiet_nncf() -> Iterator[None]:
    """Keep NNCF (3.x) from logging, and from stdout, which is for results; it reports to nobody, as OpenVINO."""
    import_openvino()
    import nncf

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), keep_signal_stack():  # stdout: of its progress bars
        yield


# --------------------------------------------------------------------------------------------------------------- losses
def cross_entropy(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Return the cross-entropy of each row by paddle's `softmax_with_cross_entropy`, without its deprecation warning.

    Paddle (2.6 and 3.3) prints the warning in colours on stderr and recommends `F.cross_entropy`. That computes the
    same, but in paddle 2.6 it waits for the device, to look for labels that are ignored.

    Args:
        logits: float32 [rows, classes].
        labels: int64 [rows].

    Returns:
        float32 [rows, 1].
    """
    without_warning = inspect.unwrap(F.softmax_with_cross_entropy)  # the warning is a decorator around the function
    return without_warning(logits, labels.unsqueeze(-1))


# ---------------------------------------------------------------------------------------------------------- for exports
@contextlib.contextmanager
def without_dropout(model: nn.Layer) -> Iterator[None]:
    """Set all dropout rates to 0: a graph that paddle (2.6 and 3.3) exports has no operator of it then."""
    rates = {nn.Dropout: "p", nn.MultiHeadAttention: "dropout"}
    with contextlib.ExitStack() as stack:
        for layer in model.sublayers():
            if type(layer) in rates:
                stack.enter_context(replaced(layer, rates[type(layer)], 0.0))
        yield


# ------------------------------------------------------------------------------------------------------ faster networks
def compute_first_token_only(encoder: nn.Layer) -> None:
    """Let the last layer of an encoder compute only [CLS], with keys and values of all tokens.

    An encoder that is no stack of post-norm `nn.TransformerEncoderLayer` (paddle 2.6 and 3.3) stays as it is.
    """
    layers = getattr(getattr(encoder, "encoder", None), "layers", None)
    if not layers:
        return
    layer = layers[-1]
    if type(layer) is not nn.TransformerEncoderLayer or layer.normalize_before:
        return

    def forward(src, src_mask=None, cache=None, output_attentions=False):
        first = src[:, :1]
        first = layer.norm1(first + layer.dropout1(layer.self_attn(first, src, src, src_mask)))
        hidden = layer.dropout(layer.activation(layer.linear1(first)))
        return layer.norm2(first + layer.dropout2(layer.linear2(hidden)))

    layer.forward = forward


def train_faster_on_cpu(model: nn.Layer) -> None:
    """Compute the same gradients in less time on a CPU, where paddle (2.6 and 3.3) is slow at four things.

    - Memory: glibc is told to keep what is freed, instead of mapping and zeroing every large tensor of a step.
    - Transposes: they are made at once, instead of being seen through strides and copied row by row for each product.
    - Sums over rows, in the gradients of biases and norms, become matrix products.
    - Dropout takes 16 random bits for a number, not 64.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_threshold = -3  # constants of malloc.h
        m_trim_threshold = -1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    paddle.set_flags({"FLAGS_use_stride_kernel": False})
    for layer in model.sublayers():
        if type(layer) is nn.Linear and layer.bias is not None:
            layer.forward = functools.partial(_linear, layer)
        elif type(layer) is nn.LayerNorm and layer.weight is not None and layer.bias is not None:
            layer.forward = functools.partial(_norm, layer)
        elif type(layer) is nn.Dropout and layer.axis is None and layer.mode == "upscale_in_train":
            layer.forward = functools.partial(_dropout, layer)


def _linear(layer: nn.Linear, x: paddle.Tensor) -> paddle.Tensor:
    """Replace `nn.Linear.forward`."""
    if not layer.training:
        return F.linear(x, layer.weight, layer.bias)
    return FastLinear.apply(x, layer.weight, layer.bias)


def _norm(layer: nn.LayerNorm, x: paddle.Tensor) -> paddle.Tensor:
    """Replace `nn.LayerNorm.forward`."""
    if not layer.training:
        return type(layer).forward(layer, x)
    return FastNorm.apply(x, layer.weight, layer.bias, layer._epsilon)


def _dropout(layer: nn.Dropout, x: paddle.Tensor) -> paddle.Tensor:
    """Replace `nn.Dropout.forward`: a number is dropped by 16 random bits, not by 64."""
    if not layer.training or not layer.p:
        return x
    pairs_of_bits = paddle.randint(-(2**31), 2**31 - 1, [(x.size + 1) // 2], "int32").numpy()
    bits = pairs_of_bits.view("uint16")[: x.size]
    is_kept = bits >= round(layer.p * 2**16)
    factors = is_kept * np.float32(1 / (1 - layer.p))
    return x * paddle.to_tensor(factors.reshape(x.shape))


def _sum_rows(rows: paddle.Tensor) -> paddle.Tensor:
    """Return the sum over the rows, float [columns], as a matrix product."""
    return paddle.matmul(paddle.ones([1, rows.shape[0]]), rows)[0]


class FastLinear(paddle.autograd.PyLayer):
    """`F.linear`, whose gradient of the bias is a matrix product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        x_rows = x.reshape([-1, x.shape[-1]])
        rows = gradient.reshape([-1, gradient.shape[-1]])
        of_x = paddle.matmul(gradient, weight, transpose_y=True)
        of_weight = paddle.matmul(x_rows, rows, transpose_x=True)
        return of_x, of_weight, _sum_rows(rows)


class FastNorm(paddle.autograd.PyLayer):
    """`F.layer_norm` over the last axis, whose gradient is made of matrix products."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        rows = x.reshape([-1, weight.shape[0]])
        upper = gradient.reshape([-1, weight.shape[0]])
        mean = paddle.full([weight.shape[0], 1], 1 / weight.shape[0])
        centered = rows - paddle.matmul(rows, mean)
        scale = paddle.rsqrt(paddle.matmul(centered * centered, mean) + ctx.epsilon)
        normed = centered * scale
        product = upper * normed
        weighted_mean = mean * weight.unsqueeze(-1)
        lower = upper * weight - paddle.matmul(upper, weighted_mean) - normed * paddle.matmul(product, weighted_mean)
        return (lower * scale).reshape(x.shape), _sum_rows(product), _sum_rows(upper)
