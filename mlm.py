"""The network of domain-adaptive pretraining (Gururangan et al. 2020, arXiv:2004.10964): masked language modelling."""

# isort: off
from model import freeze_pooler  # first: it prepares the environment in which paddle is imported

import paddle
import paddle.nn.functional as F
from paddle import nn
# isort: on

from console import InputError
from loading import load_encoder


class MaskedLM(nn.Layer):
    """An encoder and the head that predicts its tokens, which is random where the encoder comes without one.

    Args:
        model_name_or_path: as in `load_encoder`.
        dropout: hidden and attention dropout rate.

    Raises:
        InputError: see `load_encoder`; or there is no such head for the encoder.
    """

    cross_device_negatives = recomputes = False  # see `backward.backward`

    def __init__(self, model_name_or_path: str, dropout: float) -> None:
        super().__init__()
        self.network = load_encoder(model_name_or_path, dropout, "AutoModelForMaskedLM", may_start_at_random="cls")
        if not hasattr(self.network, "cls"):
            raise InputError(f"--objective mlm: {type(self.network).__name__} has no head that is known here")
        self.ptm = getattr(self.network, self.network.base_model_prefix)
        freeze_pooler(self.ptm)
        self.max_positions = getattr(self.network.config, "max_position_embeddings", 512)

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor, places: paddle.Tensor,
                labels: paddle.Tensor) -> paddle.Tensor:
        """The mean cross-entropy of the tokens to predict, a scalar.

        Args:
            input_ids, token_type_ids: int64 [batch, length].
            places, labels: of the tokens to predict, where they are among all batch * length, and their ids, int64.
        """
        hidden = self.ptm(input_ids, token_type_ids=token_type_ids)[0]
        logits = self.network.cls(hidden.reshape([-1, hidden.shape[-1]]).index_select(places))
        return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))

    @staticmethod
    def inputs(chunk: tuple) -> tuple:
        """`forward`'s arguments of a chunk of `batches.MaskedBatches`."""
        return chunk
