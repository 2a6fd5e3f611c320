"""The losses of training, on L2-normalized embeddings. Imported by model.py, which prepares paddle's environment."""

import paddle
import paddle.nn.functional as F


def same_texts(keys: paddle.Tensor) -> paddle.Tensor:
    """Which candidates say what a row's own texts say, and are no negatives of it.

    Args:
        keys: int64 [batch], equal for equal texts, where a row is one text; or [batch, 2 or 3], a column each for
            queries, titles and hard negatives.

    Returns:
        bool [batch, candidates], titles first, then hard negatives: the candidate is the row's query or title again, or
        it is the title of the same query.
    """
    keys = keys.reshape([keys.shape[0], -1])
    query, titles = keys[:, :1], keys[:, 1:] if keys.shape[1] > 1 else keys
    candidates = titles.t().reshape([1, -1])
    same_query = query == query.t()
    if more := candidates.shape[1] - len(keys):
        same_query = paddle.concat([same_query, paddle.zeros([len(keys), more], "bool")], axis=1)
    return (candidates == query) | (candidates == titles[:, :1]) | same_query


def contrastive_loss(query: paddle.Tensor, title: paddle.Tensor, margin: float, scale: float,
                     keys: paddle.Tensor | None = None) -> paddle.Tensor:
    """In-batch contrastive loss of SimCSE (Gao et al. 2021, eq. 1), a margin taken off the positives' cosine.

    mean_i -log softmax_j(scale * (cos(q_i, t_j) - margin * [i = j]))[i]

    Args:
        query: L2-normalized embeddings, float [batch, dim].
        title: likewise [batch or more, dim]; row i is the positive of query i, all other rows are its negatives.
        margin: how much more similar than a negative a positive has to be, in cosine.
        scale: the inverse of the temperature.
        keys: of `same_texts`, whose texts then are not each other's negatives; None: they are.

    Returns:
        A scalar tensor.
    """
    cosine = paddle.matmul(query, title, transpose_y=True)
    batch, candidates = cosine.shape
    positive = paddle.eye(batch, candidates, dtype=cosine.dtype)
    logits = scale * (cosine - margin * positive)
    if keys is not None:
        logits = logits - 1e9 * (same_texts(keys).astype(cosine.dtype) - positive)
    loss = F.cross_entropy(logits, paddle.arange(batch, dtype="int64"))
    # On a CPU paddle's softmax makes ln(batch) of NaN; a run that has diverged would look like one that learns nothing.
    return loss + 0 * cosine.detach().sum()


def distillation_loss(query: paddle.Tensor, title: paddle.Tensor, teacher: paddle.Tensor,
                      scale: float) -> paddle.Tensor:
    """How far the batch's similarities are from a teacher's: the mean over rows of KL(teacher || student), each a
    softmax over the batch's other texts (Fang et al. 2021, SEED, arXiv:2101.04731, they in place of its queue).

    Args:
        query, title: float [batch, dim].
        teacher: L2-normalized embeddings of the same texts by another encoder, float [batch, any dim].
        scale: the inverse of both temperatures.
    """
    itself = 1e9 * paddle.eye(query.shape[0], dtype=query.dtype)  # which says nothing: it is nearest in any case
    student = F.log_softmax(scale * paddle.matmul(query, title, transpose_y=True) - itself)
    wanted = F.softmax(scale * paddle.matmul(teacher, teacher, transpose_y=True) - itself)
    return F.kl_div(student, wanted, reduction="batchmean")


def gather_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """The rows of all ranks, rank 0's first; gradients flow to those of this rank."""
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, tensor.detach())
    parts[paddle.distributed.get_rank()] = tensor
    return paddle.concat(parts)
