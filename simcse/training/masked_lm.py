"""Masked language modelling, for scripts/pretrain.py: the network and its loss."""

from typing import Any

from simcse.console import InputError
from simcse.device import cast_products
from simcse.encoder.paddle_patches import cross_entropy
from simcse.encoder.pretrained import MASKED_LM, freeze_pooler, load_pretrained

import paddle
from paddle import nn


class MaskedLM(nn.Layer):
    """An encoder with the head that predicts its tokens.

    Args:
        pretrained_model: an encoder as AutoModelForMaskedLM loads it.
        precision: of matrix products, as in `SimCSE`.
    """

    def __init__(self, pretrained_model: nn.Layer, precision: str = "fp32") -> None:
        super().__init__()
        self.network = pretrained_model
        self.encoder_name = pretrained_model.base_model_prefix
        self.precision = precision
        self.max_positions = getattr(pretrained_model.config, "max_position_embeddings", 512)
        freeze_pooler(getattr(pretrained_model, self.encoder_name))

    def forward(self, batch: Any) -> paddle.Tensor:
        """Return the mean cross-entropy of the tokens to predict, a scalar.

        Args:
            batch: a `MaskedBatch`.
        """
        input_ids = paddle.to_tensor(batch.input_ids)
        token_type_ids = paddle.to_tensor(batch.token_type_ids)
        positions = paddle.to_tensor(batch.positions)
        labels = paddle.to_tensor(batch.labels)
        with cast_products(self.precision):
            encoder = getattr(self.network, self.encoder_name)
            hidden = encoder(input_ids, token_type_ids=token_type_ids)[0]
            logits = self.network.cls(hidden.reshape([-1, hidden.shape[-1]]).index_select(positions))
        losses = cross_entropy(logits.astype("float32"), labels)
        return losses.sum() / max(1, len(labels))


def load_masked_lm(name: str, dropout: float, precision: str = "fp32") -> MaskedLM:
    """Return the network of an encoder; its head starts at random where the encoder comes without one.

    Args:
        name: as in `load_pretrained`.
        dropout: hidden and attention dropout rate.
        precision: of matrix products, as in `SimCSE`.

    Raises:
        InputError: see `load_pretrained`; or the encoder's kind has no such head.
    """
    network = load_pretrained(name, dropout, MASKED_LM, optional_part="cls", uses_pooler=False)
    if not hasattr(network, "cls"):
        raise InputError(f"--model_name_or_path {name}: {type(network).__name__} has no head that predicts tokens")
    return MaskedLM(network, precision)
