"""Reuse the vectors of an index that was built from an earlier version of the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass

from simcse.console import as_input_error
from simcse.index.documents import Documents
from simcse.index.engines import LOCAL_ENGINES
from simcse.index.key_table import KeyTable
from simcse.index.manifest import DAMAGE, REBUILD, Manifest
from simcse.index.protocols import NOT_FOUND
from simcse.index.shards import ShardedIndex
from simcse.index.vector_map import VectorMap

import numpy as np


@dataclass
class ReusedVectors:
    """What a previous index has of a piece of the rows.

    Attributes:
        rows: the piece, int64.
        vectors: float32 [rows, dim]; undefined for rows that have to be encoded.
        needs_encoding: bool [rows], whether the previous index has no vector for the tokens of a row.
    """

    rows: np.ndarray
    vectors: np.ndarray
    needs_encoding: np.ndarray

    def rows_to_encode(self) -> np.ndarray:
        """Return the rows that the previous index lacks, int64."""
        return self.rows[self.needs_encoding]

    def fill(self, encoded: np.ndarray) -> None:
        """Write the vectors of `rows_to_encode`, float32 [rows to encode, dim], into `vectors`."""
        self.vectors[self.needs_encoding] = encoded


@dataclass
class PreviousIndex:
    """The index in a folder, of an earlier version of the corpus.

    Attributes:
        path: its folder.
        where: the flag that names it, and its value, for messages.
        manifest: what it is made of.
        document_keys: int64 [documents]; see `Documents.keys`.
        row_keys: int64 [rows]; see `Documents.row_keys`.
        vector_map: its rows and vectors.
    """

    path: str
    where: str
    manifest: Manifest
    document_keys: np.ndarray
    row_keys: np.ndarray
    vector_map: VectorMap

    @classmethod
    def open(cls, path: str) -> "PreviousIndex":
        """Return the index in a folder, of which the vectors are not read yet.

        Raises:
            InputError: it is damaged.
        """
        where = f"--index_path {path}"
        manifest = Manifest.load(path, where, REBUILD)
        with as_input_error(f"{where}: damaged", *DAMAGE):
            manifest.check_arrays(path)
            document_keys = Documents.load_keys(path)
            row_keys = Documents.load_row_keys(path, manifest.passages)
            vector_map = VectorMap.load(path, manifest.rows)
        return cls(path, where, manifest, document_keys, row_keys, vector_map)

    @property
    def bytes_of_shard(self) -> int:
        """About the bytes of memory that one of its shards and its vectors take; `read_vectors` has one at a time."""
        vector_count = -(-self.vector_map.vector_count // self.manifest.index_shards)
        settings = {**self.manifest.build_settings, **self.manifest.search_settings}
        engine = LOCAL_ENGINES[self.manifest.ann_engine]
        bytes_needed = engine.bytes_needed(self.manifest.dimension, vector_count, settings)
        return 2 * bytes_needed if engine.copies_to_read else bytes_needed

    def vector_keys(self, row_keys: np.ndarray) -> np.ndarray:
        """Return the key of the vector of each row, int64 [rows]; NOT_FOUND: the index lacks the row.

        Args:
            row_keys: int64 [rows], the keys of the rows' texts.
        """
        rows = KeyTable(self.row_keys).find(row_keys)
        vector_keys = self.vector_map.keys[self.vector_map.vector_of_row[rows]]  # of the last row where there is none
        return np.where(rows == NOT_FOUND, NOT_FOUND, vector_keys)

    def read_vectors(self, vector_map: VectorMap, pieces: Sequence[np.ndarray]) -> list[ReusedVectors]:
        """Return what it has of each piece of the rows of the corpus now.

        Args:
            vector_map: that of the corpus now.
            pieces: rows that this rank needs.

        Raises:
            InputError: it is damaged.
        """
        previous_ids = KeyTable(self.vector_map.keys).find(vector_map.keys)
        reused = []
        previous_rows = []
        for rows in pieces:
            vector_ids = previous_ids[vector_map.vector_of_row[rows]]
            needs_encoding = vector_ids == NOT_FOUND
            vectors = np.empty((len(rows), self.manifest.dimension), "float32")
            reused.append(ReusedVectors(rows, vectors, needs_encoding))
            # `copy_vectors` takes rows; any row of a vector will do.
            previous_rows.append(np.where(needs_encoding, NOT_FOUND, self.vector_map.first_rows(vector_ids)))
        shards = self.manifest.index_shards
        for shard in range(shards):  # as if each were on a rank of its own, so that one is in memory
            index = ShardedIndex(self.manifest, threads=1, vector_map=self.vector_map, rank=shard, ranks=shards)
            with as_input_error(f"{self.where}: damaged", *DAMAGE):
                index.load(self.path)
            index.copy_vectors(previous_rows, [piece.vectors for piece in reused])
            del index  # before the next one is compared with the memory that is free
        return reused
