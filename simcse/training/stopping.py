"""How a training run is stopped: by Ctrl-C, by SIGTERM, or because its launcher has ended."""

import os
import signal
from typing import Any

from simcse.console import log_from_handler
from simcse.machine import RANKS
from simcse.ranks import LAUNCHER_GONE, gather_numbers

AGREE_STEPS = 10  # ranks ask each other whether to stop every so many steps
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, LAUNCHER_GONE)


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
        self._usual_handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Record the signals that come from now on, which would end the process at once otherwise."""
        for number in STOP_SIGNALS:
            self._usual_handlers[number] = signal.signal(number, self._receive)

    def stop_listening(self) -> None:
        """Let signals end the process at once again."""
        for number, handler in self._usual_handlers.items():
            signal.signal(number, handler)
        self._usual_handlers.clear()

    def _receive(self, number: int, _) -> None:
        if "PADDLE_TRAINER_ID" in os.environ:  # a launcher sends SIGTERM several times before it kills
            self.number = signal.SIGTERM
            return
        self.number = number
        for next_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(next_number, signal.SIG_DFL)  # which ends the process
        log_from_handler(f"{signal.Signals(number).name}: saving after this step; once more stops without saving")

    def agreed_signal(self, step: int) -> int:
        """Return the signal on which all ranks stop after a step, 0: none; all ranks call it after every step.

        They stop after the same step, so they ask each other, every AGREE_STEPS steps.
        """
        if RANKS > 1 and step % AGREE_STEPS:
            return 0
        return self.signal_on_any_rank()

    def signal_on_any_rank(self) -> int:
        """Return the number of a signal that has come to any rank, 0: none; all ranks call it together."""
        return max(gather_numbers(self.number))
