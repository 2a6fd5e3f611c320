"""Export the network as a static graph, and run it by Paddle Inference on a CPU."""

import os

from simcse.console import InputError
from simcse.encoder.paddle_patches import quiet_passes, without_dropout
from simcse.encoder.weights import (
    CONFIG_FILE,
    GRAPH_FIELDS,
    activation_bytes,
    graph_record,
    layer_bytes,
    read_record,
)
from simcse.files import write_json
from simcse.machine import BATCH_TOKENS, CPU_HAS_BF16, CPU_THREADS, auto_precision

import numpy as np
import paddle
from paddle import nn

GRAPH_FILES = ("inference.json", "inference.pdmodel")  # what `paddle.jit.save` of paddle 3 and of paddle 2 writes


class _EmbeddingGraph(nn.Layer):
    """`get_pooled_embedding` as a layer of its own, since `paddle.jit.save` exports layers."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        return self.model.get_pooled_embedding(input_ids, token_type_ids, with_pooler=self.model.with_pooler)


def export_graph(model: nn.Layer, folder: str) -> None:
    """Write `get_pooled_embedding` as a static graph with its weights, batch and length dynamic, for `PaddleEngine`."""
    ids = [paddle.static.InputSpec([None, None], "int64", name) for name in ("input_ids", "token_type_ids")]
    model.eval()
    with without_dropout(model):
        graph = paddle.jit.to_static(_EmbeddingGraph(model), input_spec=ids, full_graph=True)
        graph.eval()
        paddle.jit.save(graph, os.path.join(folder, "inference"))
    write_json(os.path.join(folder, CONFIG_FILE), graph_record(model))


class PaddleEngine:
    """An exported folder, run by Paddle Inference with oneDNN on a CPU.

    Args:
        folder: filled by `export_graph`.
        precision: "fp32", "bf16" or "auto": bf16 on a CPU that is faster in it, else fp32.
        cpu_threads: math threads; 0: all cores.

    Raises:
        InputError: the processor cannot compute in this precision.
    """

    batch_tokens = BATCH_TOKENS["cpu"]
    SHAPES = 10  # of batches that oneDNN keeps kernels for, each with a copy of the weights

    def __init__(self, folder: str, precision: str = "auto", cpu_threads: int = 0) -> None:
        record = read_record(folder, GRAPH_FIELDS)
        self.embedding_size = record["embedding_size"]
        self.max_positions = record["max_positions"]
        self.precision = auto_precision("cpu") if precision == "auto" else precision
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"--precision {precision}: Paddle Inference computes in fp32 or bf16 on a CPU")
        if self.precision == "bf16" and not CPU_HAS_BF16:
            raise InputError("--precision bf16: this processor has neither AVX-512 BF16 nor AMX")
        weights = layer_bytes(record, os.path.join(folder, "inference.pdiparams"))
        bytes_of_number = 2 if self.precision == "bf16" else 4
        self.bytes_needed = self.SHAPES * weights * bytes_of_number // 4 + activation_bytes(record)
        with quiet_passes():
            self._predictor = paddle.inference.create_predictor(self._configure(folder, cpu_threads or CPU_THREADS))
        self._inputs = [self._predictor.get_input_handle(name) for name in self._predictor.get_input_names()]
        self._output = self._predictor.get_output_handle(self._predictor.get_output_names()[0])

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return L2-normalized embeddings, float32 [batch, embedding_size], of two int64 [batch, length]."""
        for handle, array in zip(self._inputs, (input_ids, token_type_ids)):
            handle.copy_from_cpu(array)
        self._predictor.run()
        return self._output.copy_to_cpu().astype("float32", copy=False)

    def _configure(self, folder: str, threads: int) -> paddle.inference.Config:
        graphs = [os.path.join(folder, name) for name in GRAPH_FILES]
        graph = next(path for path in graphs if os.path.isfile(path))
        config = paddle.inference.Config(graph, os.path.splitext(graph)[0] + ".pdiparams")
        config.disable_glog_info()
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        config.set_mkldnn_cache_capacity(self.SHAPES)
        config.enable_mkldnn()
        if self.precision == "bf16":
            config.enable_mkldnn_bfloat16()
        return config
