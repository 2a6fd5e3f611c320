"""Keys of texts and passages."""

import os
import subprocess
import sys

from simcse.text.keys import passage_keys, sequence_keys, text_keys

import numpy as np
from conftest import ROOT

TEXTS = ["语义检索", "", "a", "语义检索", "\ud800"]


def test_equal_texts_have_equal_keys_in_every_process():
    keys = text_keys(TEXTS)
    assert keys.dtype == np.int64 and keys[0] == keys[3] and len(set(keys.tolist())) == 4
    assert text_keys(["语义检索"]).tolist() == [2437976451474481806]
    code = "from simcse.text.keys import text_keys; print(text_keys(['语义检索', ''])[0])"
    for seed in "12":
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                             env={**os.environ, "PYTHONHASHSEED": seed})
        assert int(ran.stdout) == keys[0], ran.stderr
    assert text_keys([]).shape == (0,)


def test_equal_sequences_of_integers_have_equal_keys():
    """What stands before a sequence in the array does not matter, and neither does the type of integer."""
    keys = sequence_keys(np.array([5, 7, 5, 7, 5, 7, 7, 5], "int32"), np.array([2, 3, 3, 5, 6, 8]))
    sequences = ["5 7", "5", "", "7 5", "7", "7 5"]
    assert [sequences.index(sequence) for sequence in sequences] == [keys.tolist().index(key) for key in keys]
    assert keys.min() >= 0 and keys[0] == sequence_keys(np.array([5, 7]), np.array([2]))[0]


def test_keys_of_passages_depend_on_document_and_place():
    documents = np.repeat(text_keys(["甲", "乙"]), 3)
    places = np.array([0, 5, 9] * 2, "int32")
    keys = passage_keys(documents, places)
    assert keys.dtype == np.int64 and len(set(keys.tolist())) == 6
    assert passage_keys(documents[::-1], places[::-1]).tolist() == keys[::-1].tolist()
    assert passage_keys(documents[:0], places[:0]).shape == (0,)
