"""Split texts into words, which are jieba's."""

import itertools
import logging
import os
import re
import tempfile
import unicodedata

import jieba

PARTS = re.compile("[a-z]+|[0-9]+")
# Letters and digits in turns, with nothing, a space, - or _ between them.
CHAIN = re.compile(r"(?<![a-z0-9.])(?:[a-z]+[ _-]?(?=[0-9])|[0-9]+[ _-]?(?=[a-z]))+(?:[a-z]+|[0-9]+)(?![a-z0-9])")
# It logs a traceback where its cache, in the folder of temporary files, belongs to another user.
jieba.setLogLevel(logging.CRITICAL)
jieba.dt.cache_file = f"jieba-{os.getuid()}.cache"
try:
    tempfile.gettempdir()
except OSError:  # there is no folder of temporary files: it goes without the cache, which cannot be made in a file
    jieba.dt.tmp_dir = os.devnull


def load_dictionary() -> None:
    """Read jieba's dictionary, which takes a second; without this call the first text that is split waits for it."""
    jieba.initialize()


def fold(text: str) -> str:
    """Return a text in one width and one case: Unicode's NFKC, case folded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def split_words(text: str) -> list[str]:
    """Return the words of a text in their order, folded, without those that have neither letter nor digit."""
    return [word for word in jieba.cut(fold(text)) if any(map(str.isalnum, word))]


def words(text: str) -> list[str]:
    """Return the words by which a text is found: those of `split_words`, and parts of them.

    Of a word of letters and digits, such as "iphone14", the letters and the digits are words as well, unless they are
    a single one, which would say little.
    """
    found = []
    for word in split_words(text):
        found.append(word)
        parts = PARTS.findall(word)
        if len(parts) > 1 and "".join(parts) == word:
            found += [part for part in parts if len(part) > 1]
    return found


def query_words(text: str) -> list[str]:
    """Return the words that a query searches for: its own, and what its letters and digits are if written in one.

    So "iphone 14" and "covid-19" find "iphone14" and "covid19", too. The reverse follows from `words`.
    """
    found = words(text)
    for chain in CHAIN.findall(fold(text)):
        parts = PARTS.findall(chain)
        joined = [first + second for first, second in itertools.pairwise(parts)]
        if len(parts) > 2:
            joined.append("".join(parts))
        found += [word for word in joined if word not in found]
    return found
