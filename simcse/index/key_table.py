"""Find 64-bit keys among others."""

from simcse.index.protocols import NOT_FOUND

import numpy as np


class KeyTable:
    """Keys, and the position of each.

    Args:
        keys: int64 [keys], each once.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._order = np.argsort(keys)
        self._sorted = keys[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each of some keys in the table, int64; NOT_FOUND: it is not there."""
        if not len(self._sorted):
            return np.full(len(keys), NOT_FOUND)
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[places] == keys, self._order[places], NOT_FOUND)
