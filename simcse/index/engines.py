"""The engines of an index, by the names that --ann_engine has for them."""

from simcse import console
from simcse.index.exact import ExactEngine
from simcse.index.hnsw import HnswEngine
from simcse.index.milvus import MilvusIndex
from simcse.index.protocols import LocalEngine

# Kept in a folder, one index a shard. A new one is a `LocalEngine` and a line here.
LOCAL_ENGINES: dict[str, type[LocalEngine]] = {
    "hnswlib": HnswEngine,
    "exact": ExactEngine,
}
DEFAULT_ENGINE = "hnswlib"
ENGINES: dict[str, type[LocalEngine] | type[MilvusIndex]] = {**LOCAL_ENGINES, "milvus": MilvusIndex}


def check_installed(name: str) -> None:
    """Raise InputError if a package that an engine needs is missing, without importing it."""
    engine = ENGINES[name]
    console.check_installed(f"--ann_engine {name}", engine.requirements, *engine.packages)
