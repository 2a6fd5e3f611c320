"""Compute keys of texts and passages, which are the same in every process and on every machine."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

KEY_BYTES = 8
KEY_MASK = 2**63 - 1  # all bits but the sign: keys are >= 0, and -1 can mean that there is no row


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """Return a key for each text: equal texts have equal keys.

    Two different texts have the same key with a probability of 2^-63. That any two of 8 million texts have the same key
    has a probability of 3 in a million.

    Returns:
        int64 [texts], >= 0.
    """
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest() for text in texts]
    return _keys_of_digests(digests)


def passage_keys(document_keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return a key for each passage, computed from the key of its document and its place in the document.

    Args:
        document_keys: int64 [passages], the key of each passage's document, as `text_keys` returns it.
        places: integers [passages], different for the passages of one document, such as their offsets.

    Returns:
        int64 [passages], >= 0.
    """
    pairs = np.column_stack([document_keys, places]).astype("<i8").tobytes()
    size = 2 * KEY_BYTES
    digests = [blake2b(pairs[start : start + size], digest_size=KEY_BYTES).digest()
               for start in range(0, len(pairs), size)]
    return _keys_of_digests(digests)


def _keys_of_digests(digests: list[bytes]) -> np.ndarray:
    """Return digests as integers >= 0; the bytes are read as little-endian on every machine."""
    return np.frombuffer(b"".join(digests), "<i8").astype("int64") & KEY_MASK
