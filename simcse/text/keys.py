"""Keys of texts and passages, the same in every process and on every machine."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

KEY_BYTES = 8
KEY_BITS = 2**63 - 1  # without the sign, so that -1 can mean that there is no row


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """Return a key for each text: equal texts have equal keys.

    Two different texts have the same key with a probability of 2^-63; of 8 million texts any two do with 3 in a
    million.

    Returns:
        int64 [texts], >= 0.
    """
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest() for text in texts]
    return _keys_of_digests(digests)


def passage_keys(document_keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return a key for each passage, made of its document's key and of its place in the document.

    Args:
        document_keys: int64 [passages], the `text_keys` of the documents, repeated for each of their passages.
        places: integers [passages], which tell the passages of a document apart, such as their offsets.

    Returns:
        int64 [passages], >= 0.
    """
    pairs = np.column_stack([document_keys, places]).astype("<i8").tobytes()
    size = 2 * KEY_BYTES
    digests = [blake2b(pairs[start : start + size], digest_size=KEY_BYTES).digest()
               for start in range(0, len(pairs), size)]
    return _keys_of_digests(digests)


def _keys_of_digests(digests: list[bytes]) -> np.ndarray:
    """Return digests as integers; their bytes are little-endian on every machine."""
    return np.frombuffer(b"".join(digests), "<i8").astype("int64") & KEY_BITS
