"""What a setting of an engine is, of which recall.py makes a flag; and the settings of HNSW, which engines share."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LARGEST = 2**31 - 1  # of the integers that libraries take


@dataclass(frozen=True)
class Setting:
    """A setting of an index engine; recall.py makes a flag of it.

    Attributes:
        name: that of the flag, without its dashes.
        type: converts the flag's text, as argparse's `type` does.
        default: the value if the flag is not given; None: `LocalEngine.complete_settings` finds one.
        help: the flag's help text, without the default.
        default_help: describes a default that is None.
    """

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str
    default_help: str | None = None

    @property
    def default_text(self) -> Any:
        """What a help text says of the default."""
        return self.default_help if self.default is None else self.default


def integer(minimum: int, maximum: int = LARGEST) -> Callable[[str], int]:
    """Return an argparse type: an integer from `minimum` to `maximum`."""
    limits = f">= {minimum}" if maximum == LARGEST else f"from {minimum} to {maximum}"

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch("[0-9]+", text.strip()) else -1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, got {text!r}")
        return value

    return parse


HNSW_M = Setting("hnsw_m", integer(2), 32, "HNSW M: links per node")
HNSW_EF = Setting(
    "hnsw_ef", integer(1), 100, "HNSW ef: candidates that building keeps, and that a search keeps in each shard, at "
    "least twice --recall_num; a kept index can be searched with another value")
HNSW_MAX_ELEMENTS = Setting(
    "hnsw_max_elements", integer(1), None, "largest number of vectors that the index may hold",
    "as many as the corpus has")
