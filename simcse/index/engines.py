"""The engines of an index, by the names that --ann_engine has for them."""

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
ENGINES: dict[str, type] = {**LOCAL_ENGINES, "milvus": MilvusIndex}
