"""How a training run is stopped without losing anything: by Ctrl-C, SIGTERM, or its launcher's end."""

import os
import signal

# `model` first: it prepares the environment in which paddle is imported.
from model import LAUNCHER_GONE  # isort: skip

import paddle

from console import log_from_handler


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step at hand; a second one ends at once.

    Not so under a launcher: it sends SIGTERM twice, a second apart, and kills three seconds later.
    """

    signal = None

    def __init__(self) -> None:
        self.launched = "PADDLE_TRAINER_ID" in os.environ
        for number in (signal.SIGINT, signal.SIGTERM, LAUNCHER_GONE):
            signal.signal(number, self._request)

    def _request(self, number: int, _) -> None:
        if self.launched:
            self.signal = signal.SIGTERM
            return
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        log_from_handler(f"{signal.Signals(number).name}: saving after this step; once more to stop without saving")

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. Ranks stop after the same one, so they ask each other, every 10 steps."""
        if paddle.distributed.get_world_size() == 1:
            return self.signal is not None
        if step % 10:
            return False
        signals = paddle.to_tensor([self.signal or 0])
        paddle.distributed.all_reduce(signals, op=paddle.distributed.ReduceOp.MAX)
        self.signal = int(signals) or None
        return self.signal is not None
