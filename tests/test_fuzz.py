"""Random input: readers, tokenizer, batches, evaluation, indexes. FUZZ_EXAMPLES says how many examples a test takes."""

import dataclasses
import os
import tempfile
from collections import Counter

import data
import evaluate
from simcse import console, files, measures
from simcse.index.ann_recall import ann_recall
from simcse.index.engines import LOCAL_ENGINES
from simcse.index.exact import exact_search
from simcse.index.shards import ShardedIndex
from simcse.measures import mean_percent
from simcse.text import lines as line_reading
from simcse.text import textfile, wordpiece
from simcse.text.tokens import make_batches

import numpy as np
import pytest
from conftest import ENCODER, read_texts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from indexes import INSTALLED_ENGINES, ThreadRanks, fill, manifest_of

settings.register_profile("here", max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)), deadline=None,
                          derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("here")
# Bytes that make text files difficult, and any others.
PIECES = st.sampled_from([b"\n", b"\r", b"\r\n", b"\t", b" ", "\u3000".encode(), "语义".encode(), b"a", b"\0",
                          b"\xef\xbb\xbf", b"\xff\xfe", b"\xe4", b"\x1c", "\u2028".encode(), "“".encode(),
                          b"\xed\xa0\x80"])
FILES = st.lists(st.one_of(PIECES, st.binary(max_size=4)), max_size=40).map(b"".join)
TEXT = st.text(max_size=60)


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield os.path.join(folder, "file")


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece.load_tokenizer(str(ENCODER))


def outcome(read):
    try:
        return list(read())
    except console.InputError as error:
        return str(error)


@given(content=FILES, chunk=st.sampled_from([3, 5, 1 << 22]))
@example(content=b"\xef\xbb\xbf\xef\xbb\xbfa", chunk=3)
@example(content=b"a\r", chunk=3)
def test_texts_by_offset_are_the_texts(path, content, chunk):
    """Any bytes: a list of texts or one line of error, the same from both readers; line numbers are the file's."""
    with open(path, "wb") as file:
        file.write(content)
    before, line_reading.SCAN_BYTES = line_reading.SCAN_BYTES, chunk
    try:
        texts = outcome(lambda: read_texts(path, "--flag"))
        assert texts == outcome(lambda: textfile.TextFile(path, "--flag"))
        if isinstance(texts, list):
            lines = content.splitlines()
            kept = textfile.TextFile(path, "--flag")
            for row, text in enumerate(texts):
                assert lines[kept.line_number(row) - 1].decode("utf-8").replace("\ufeff", "").strip() == text
    finally:
        line_reading.SCAN_BYTES = before


@given(content=FILES, columns=st.integers(1, 3))
def test_rows_add_up(path, content, columns):
    """Rows that are read are rows of the file; strict, either all of them come or an error."""
    with open(path, "wb") as file:
        file.write(content)
    rows = outcome(lambda: (row.fields for row in textfile.read_rows(path, columns, "--flag")))
    console.settings.strict_data = True
    strict = outcome(lambda: (row.fields for row in textfile.read_rows(path, columns, "--flag")))
    console.settings.strict_data = False
    if isinstance(rows, str):
        assert rows.startswith("--flag ") and "\n" not in rows and isinstance(strict, str)
        return
    whole = [line.decode("utf-8").split("\t") for line in content.replace(b"\xef\xbb\xbf", b"").splitlines()]
    good = [row for row in ([field.strip() for field in line] for line in whole) if len(row) == columns and all(row)]
    assert rows == good
    assert strict == rows or isinstance(strict, str)


@given(texts=st.lists(TEXT, min_size=1, max_size=6), length=st.integers(3, 20))
def test_tokens_of_any_text(tokenizer, texts, length):
    """One by one as together, and in Rust alone; never longer than asked for; what is cut is the end."""
    together = tokenizer(texts, length)
    assert together == [tokenizer([text], length)[0] for text in texts]
    tokenizer._rust.enable_truncation(length)
    assert together == [encoding.ids for encoding in tokenizer._rust.encode_batch(texts)], "as of whole texts"
    for ids, longer in zip(together, tokenizer(texts, 512)):
        assert 2 <= len(ids) <= length and (ids[0], ids[-1]) == (tokenizer.cls, tokenizer.sep)
        assert ids[1:-1] == longer[1:-1][: length - 2]


@given(lengths=st.lists(st.integers(1, 30), max_size=50), size=st.one_of(st.none(), st.integers(1, 9)),
       tokens=st.integers(1, 100))
def test_batches_restore_the_order(lengths, size, tokens):
    ids = [[number + 1] * length for number, length in enumerate(lengths)]
    seen = {}
    for rows, input_ids, types in make_batches(ids, 0, size, tokens):
        assert len(rows) == len(input_ids) and not types.any()
        seen.update({row: [i for i in line if i] for row, line in zip(rows, input_ids.tolist())})
    assert [seen[row] for row in range(len(ids))] == ids


@given(count=st.integers(1, 60), batch=st.integers(1, 9), ranks=st.integers(1, 5), start=st.integers(0, 5))
def test_ranks_share_every_text(count, batch, ranks, start):
    parts = [data.ShuffledBatches(count, batch, rank, ranks) for rank in range(ranks)]
    batches = [list(part.epoch(0)) for part in parts]
    assert len({tuple(map(len, part)) for part in batches}) == 1 and len(batches[0]) == len(parts[0])
    rows = np.concatenate([np.concatenate(part) for part in batches])
    assert set(rows) == set(range(count)) and len(rows) == -(-count // ranks) * ranks
    for part, whole in zip(parts, batches):
        assert [each.tolist() for each in part.epoch(0, start)] == [each.tolist() for each in whole[start:]]


NAME = st.sampled_from(["甲", "乙", "丙", "丁", "戊"])


@given(pairs=st.lists(st.tuples(NAME, NAME), min_size=1, max_size=8), result=st.lists(
    st.tuples(NAME, NAME), min_size=1, max_size=30), depth=st.integers(1, 6))
def test_recall_by_counting(path, pairs, result, depth):
    """evaluate.py against a count written out, with duplicates and queries of no target."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{query}\t{document}\t0.5\n" for query, document in result)
    queries = {query for query, _ in pairs}
    targets = {query: Counter(target for other, target in pairs if other == query) for query in queries}
    ranked = evaluate.rank_targets(evaluate.read_hits(path, "text"), targets)
    values = measures.measure_queries([ranks.values() for ranks in ranked.ranks.values()], ["recall"], depth)
    recall = {k: mean_percent(values[f"recall@{k}"]) for k in measures.RECALL_KS}
    for k, value in recall.items():
        hits = sum(any((query, document) in pairs for document in [d for q, d in result if q == query][: min(k, depth)])
                   for query in queries)
        assert value == round(100 * hits / len(queries), 3)
    assert list(recall.values()) == sorted(recall.values()) and max(recall.values()) <= 100


@given(documents=st.integers(1, 80), k=st.integers(1, 90), shard_count=st.integers(1, 5), ranks=st.integers(1, 4),
       engine=st.sampled_from(INSTALLED_ENGINES), seed=st.integers(0, 999))
def test_shards_round_trip(documents, k, shard_count, ranks, engine, seed):
    """Any size on any number of ranks, kept and read again: exact rows where exact, all cosines true where not."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((documents + 5, 8)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    corpus, queries = vectors[:-5], vectors[-5:]
    manifest = manifest_of(engine, documents, 8, shard_count)

    def build_and_open(rank):
        index = ShardedIndex(manifest, 2, rank=rank, ranks=ranks)
        fill(index, corpus)
        with tempfile.TemporaryDirectory() as folder:
            index.save(folder)
            digests = {name: files.file_digest(os.path.join(folder, name)) for name in os.listdir(folder)}
            again = ShardedIndex(dataclasses.replace(manifest, files=digests), 2, rank=rank, ranks=ranks)
            again.load(folder)
        one, other = index.search(queries, k), again.search(queries, k)
        assert all((a == b).all() for a, b in zip(one, other))
        index.close()
        again.close()
        return one

    rows, cosines = (column[:, :documents] for column in ThreadRanks(ranks).run(build_and_open)[0])
    assert rows.shape == (5, min(k, documents)) and all(len(set(row)) == len(row) for row in rows.tolist())
    np.testing.assert_allclose(cosines, np.take_along_axis(queries @ corpus.T, rows, axis=1), atol=1e-5)
    approximate = LOCAL_ENGINES[engine].approximate
    if not approximate:
        np.testing.assert_allclose(cosines, exact_search(queries, corpus, k)[1], atol=1e-6)
    assert ann_recall(cosines, exact_search(queries, corpus, k)[1]) > (0.9 if approximate else 0.999)
