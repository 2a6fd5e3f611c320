"""Compute keys of texts, passages and sequences, which are the same in every process and on every machine."""

import itertools
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

KEY_BYTES = 8
UNKNOWN_KEY = 0  # of texts that are all [UNK], of however many tokens
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


def passage_keys(document_keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return a key for each passage, computed from the key of its document and a number.

    Args:
        document_keys: int64 [passages], the key of each passage's document.
        numbers: integers [passages], different for the passages of one document, such as their offsets.

    Returns:
        int64 [passages], >= 0.
    """
    pairs = np.column_stack([document_keys, numbers]).astype("<i8").tobytes()
    size = 2 * KEY_BYTES
    digests = [blake2b(pairs[start : start + size], digest_size=KEY_BYTES).digest()
               for start in range(0, len(pairs), size)]
    return _keys_of_digests(digests)


def sequence_keys(integers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return a key for each of several sequences of integers: equal sequences have equal keys. See `text_keys`.

    Args:
        integers: those of all sequences, one after the other.
        ends: int64 [sequences], where each ends.

    Returns:
        int64 [sequences], >= 0.
    """
    content = integers.astype("<i8").tobytes()
    bounds = [0, *(KEY_BYTES * ends).tolist()]
    digests = [blake2b(content[start:end], digest_size=KEY_BYTES).digest() for start, end in itertools.pairwise(bounds)]
    return _keys_of_digests(digests)


def _keys_of_digests(digests: list[bytes]) -> np.ndarray:
    """Return digests as integers >= 0; the bytes are read as little-endian on every machine."""
    return np.frombuffer(b"".join(digests), "<i8").astype("int64") & KEY_MASK
