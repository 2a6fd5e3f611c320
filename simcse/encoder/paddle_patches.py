"""Paddle's layers, made faster."""

import ctypes
import functools

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn


def first_token_only(encoder: nn.Layer) -> None:
    """Let the last layer of an encoder compute its first token only, the one that becomes the embedding, with keys and
    values of all tokens. Where the encoder is no stack of post-norm `nn.TransformerEncoderLayer`, nothing changes."""
    layers = getattr(getattr(encoder, "encoder", None), "layers", None)
    layer = layers[-1] if layers else None
    if type(layer) is not nn.TransformerEncoderLayer or layer.normalize_before:
        return

    def forward(src, src_mask=None, cache=None, output_attentions=False):
        first = src[:, :1]
        first = layer.norm1(first + layer.dropout1(layer.self_attn(first, src, src, src_mask)))
        hidden = layer.dropout(layer.activation(layer.linear1(first)))
        return layer.norm2(first + layer.dropout2(layer.linear2(hidden)))

    layer.forward = forward


def train_faster_on_cpu(model) -> None:
    """The same gradients in less time, by what paddle is slow at on a CPU. glibc is told to keep what is freed, else it
    maps and zeroes every large tensor of a step anew; tensors are transposed at once, instead of seen through strides
    and copied one by one for each product; sums over rows, in the gradients of biases and norms, become matrix
    products; dropout takes 16 random bits for a number, not 64."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_mmap_threshold, m_trim_threshold = -3, -1
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
    return (FastLinear.apply if layer.training else F.linear)(x, layer.weight, layer.bias)


def _norm(layer: nn.LayerNorm, x: paddle.Tensor) -> paddle.Tensor:
    if not layer.training:
        return type(layer).forward(layer, x)
    return FastNorm.apply(x, layer.weight, layer.bias, layer._epsilon)


def _dropout(layer: nn.Dropout, x: paddle.Tensor) -> paddle.Tensor:
    if not (layer.training and layer.p):
        return x
    bits = paddle.randint(-(2**31), 2**31 - 1, [(x.size + 1) // 2], "int32").numpy().view("uint16")[: x.size]
    kept = (bits >= round(layer.p * 2**16)) * np.float32(1 / (1 - layer.p))
    return x * paddle.to_tensor(kept.reshape(x.shape))


def _sum_rows(rows: paddle.Tensor) -> paddle.Tensor:
    return paddle.matmul(paddle.ones([1, rows.shape[0]]), rows)[0]


class FastLinear(paddle.autograd.PyLayer):
    """`F.linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        x_rows, rows = (tensor.reshape([-1, tensor.shape[-1]]) for tensor in (x, gradient))
        return (paddle.matmul(gradient, weight, transpose_y=True), paddle.matmul(x_rows, rows, transpose_x=True),
                _sum_rows(rows))


class FastNorm(paddle.autograd.PyLayer):
    """`F.layer_norm` over the last axis."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        rows, upper = (tensor.reshape([-1, weight.shape[0]]) for tensor in (x, gradient))
        mean = paddle.full([weight.shape[0], 1], 1 / weight.shape[0])
        centered = rows - paddle.matmul(rows, mean)
        scale = paddle.rsqrt(paddle.matmul(centered * centered, mean) + ctx.epsilon)
        normed = centered * scale
        product, weighted_mean = upper * normed, mean * weight.unsqueeze(-1)
        lower = upper * weight - paddle.matmul(upper, weighted_mean) - normed * paddle.matmul(product, weighted_mean)
        return (lower * scale).reshape(x.shape), _sum_rows(product), _sum_rows(upper)
