"""How a training run is stopped: by Ctrl-C, by SIGTERM, or because its launcher has ended."""

import os
import signal

from simcse.console import log_from_handler
from simcse.machine import RANKS
from simcse.ranks import LAUNCHER_GONE, largest

AGREE_STEPS = 10  # ranks ask each other whether to stop every so many steps


class Stopped(Exception):
    """A signal has stopped the run.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class StopSignal:
    """The signal that asked this process to stop.

    Attributes:
        number: 0: none has come.
    """

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        """Receive signals from now on instead of ending at once."""
        for number in (signal.SIGINT, signal.SIGTERM, LAUNCHER_GONE):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _) -> None:
        if "PADDLE_TRAINER_ID" in os.environ:  # a launcher sends SIGTERM several times before it kills
            self.number = signal.SIGTERM
            return
        self.number = number
        for next_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(next_number, signal.SIG_DFL)  # which ends the process
        log_from_handler(f"{signal.Signals(number).name}: saving after this step; once more stops without saving")

    def agreed(self, step: int) -> int:
        """Return the number of the signal to stop for after a step, 0: go on.

        Ranks have to stop after the same step, so they ask each other, every AGREE_STEPS steps.
        """
        if RANKS == 1:
            return self.number
        if step % AGREE_STEPS:
            return 0
        return largest(self.number)
