"""The engines of an index, by the names that --ann_engine has for them."""

from simcse import console
from simcse.index.exact import ExactIndex
from simcse.index.hnsw import HnswIndex
from simcse.index.milvus import MilvusIndex
from simcse.index.protocols import VectorIndex

# Kept in a folder, one index a shard. A new one is a `VectorIndex` and a line here.
LOCAL_ENGINES: dict[str, type[VectorIndex]] = {
    "hnswlib": HnswIndex,
    "exact": ExactIndex,
}
DEFAULT_ENGINE = "hnswlib"
ENGINES: dict[str, type[VectorIndex] | type[MilvusIndex]] = {**LOCAL_ENGINES, "milvus": MilvusIndex}


def check_installed(name: str) -> None:
    """Raise InputError if a package that an engine needs is missing, without importing it."""
    engine = ENGINES[name]
    console.check_installed(f"--ann_engine {name}", engine.requirements, *engine.packages)
