"""Put a prefix before queries and before documents, as encoders that were trained with one need it.

bge-zh was trained with an instruction before queries, e5 with "query: " and "passage: ". BM25 and the results use the
texts without prefixes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from simcse.console import InputError
from simcse.text.tokens import Ids, Tokens

import numpy as np

QUERY = "query"
DOCUMENT = "document"
INPUT_TYPES = (QUERY, DOCUMENT)
LONGEST_PREFIX = 512  # tokens that are counted of a prefix


class Prefixes(NamedTuple):
    """The prefix of each input type; "": none."""

    query: str = ""
    document: str = ""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Prefixes":
        """Return the prefixes that a checkpoint records."""
        return cls(record.get("query_prefix", ""), record.get("document_prefix", ""))

    def as_record(self) -> dict[str, str]:
        """Return the fields that a checkpoint records: those that are not empty."""
        fields = {"query_prefix": self.query, "document_prefix": self.document}
        return {name: prefix for name, prefix in fields.items() if prefix}

    def replaced_by(self, query: str | None, document: str | None) -> "Prefixes":
        """Return the prefixes with those of the command line in their place; None: the flag is not given."""
        return Prefixes(self.query if query is None else query, self.document if document is None else document)

    def of(self, input_type: str) -> str:
        """Return the prefix of an input type; raise ValueError if there is no such type."""
        if input_type == QUERY:
            return self.query
        if input_type == DOCUMENT:
            return self.document
        raise ValueError(f"input type {input_type!r} is none of {', '.join(INPUT_TYPES)}")


NO_PREFIXES = Prefixes()


def tokenize_prefix(tokenizer: Any, prefix: str) -> Ids:
    """Return the token ids of a prefix, [CLS] and [SEP] excluded."""
    if not prefix:
        return []
    return Tokens.of(tokenizer([prefix], LONGEST_PREFIX))[0][1:-1]


def count_tokens(tokenizer: Any, prefix: str) -> int:
    """Return how many tokens a prefix has, [CLS] and [SEP] excluded."""
    return len(tokenize_prefix(tokenizer, prefix))


class PrefixedTexts(NamedTuple):
    """Texts with their prefixes.

    Attributes:
        texts: each with its prefix.
        input_types: of each text.
        ids_of_prefix: the token ids of the prefix of each input type.
    """

    texts: Sequence[str]
    input_types: Sequence[str]
    ids_of_prefix: dict[str, Ids]

    def count_prefix_tokens(self, ids: Tokens) -> np.ndarray:
        """Return how many tokens of each text, after [CLS], are its prefix alone, int64 [texts].

        A token that has grown together with the text belongs to the text.

        Args:
            ids: the token ids of the texts.
        """
        counts = np.zeros(len(ids), "int64")
        if not self.ids_of_prefix:
            return counts
        types = np.array(self.input_types)
        for input_type, prefix_ids in self.ids_of_prefix.items():
            rows = np.flatnonzero(types == input_type)
            for place, token in enumerate(prefix_ids, 1):
                rows = rows[ids.lengths[rows] > place]
                rows = rows[ids.flat[ids.starts[rows] + place] == token]
                counts[rows] = place
        return counts


def add_prefixes(tokenizer: Any, texts: Sequence[str], prefixes: Prefixes,
                 input_type: str | Sequence[str]) -> PrefixedTexts:
    """Put before each text the prefix of its input type.

    Args:
        tokenizer: see `wordpiece.load_tokenizer`.
        texts: those to encode.
        prefixes: of each input type.
        input_type: that of all texts, one of INPUT_TYPES; or a sequence with that of each.
    """
    input_types = [input_type] * len(texts) if isinstance(input_type, str) else input_type
    prefix_of = {each: prefixes.of(each) for each in set(input_types)}
    ids_of_prefix = {each: tokenize_prefix(tokenizer, prefix) for each, prefix in prefix_of.items() if prefix}
    if not ids_of_prefix:
        return PrefixedTexts(texts, input_types, ids_of_prefix)
    prefixed = [prefix_of[each] + text for each, text in zip(input_types, texts, strict=True)]
    return PrefixedTexts(prefixed, input_types, ids_of_prefix)


def check_prefixes(tokenizer: Any, prefixes: Prefixes, max_seq_length: int) -> None:
    """Raise InputError if a prefix leaves no token of `max_seq_length` to the text."""
    for input_type in INPUT_TYPES:
        count = count_tokens(tokenizer, prefixes.of(input_type))
        if count + 2 >= max_seq_length:  # [CLS] and [SEP]
            raise InputError(f"--{input_type}_prefix has {count} tokens, which leave none of --max_seq_length "
                             f"{max_seq_length} to the text")
