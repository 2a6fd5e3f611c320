"""The index types of a Milvus server, by the names that --milvus_index has for them, and their parameters.

To add one, add a line to INDEX_TYPES. Its check, its entries in the manifest and its help text follow from that. A
parameter whose default depends on the corpus has the default None, and gets its value in `complete_settings`.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simcse.console import InputError
from simcse.index.settings import HNSW_EF, HNSW_M, Setting, integer

INDEX_TYPE = "milvus_index"  # the build setting that names the type
DEEPER_FACTOR = 4  # how many times larger ef, nprobe and the like are in the second measurement of recall

_MAX_NLIST = 65536  # a limit of Milvus; it checks the others when it indexes, long after it has taken them

M = Setting("M", integer(2, 2048), HNSW_M.default, "links per node")
EF_CONSTRUCTION = Setting("efConstruction", integer(1), None, "candidates that building keeps", "ef")
EF = Setting("ef", integer(1), HNSW_EF.default, "candidates that a search keeps, at least twice --recall_num")
NLIST = Setting("nlist", integer(1, _MAX_NLIST), None, "clusters of a segment", "4 times the square root of its rows")
NPROBE = Setting("nprobe", integer(1), None, "clusters that a search looks at", "an eighth of nlist, at least 16")
SUBVECTORS = Setting("m", integer(1), None, "subvectors of product quantization",
                     "a quarter of the dimension; the dimension if 4 does not divide it")
NBITS = Setting("nbits", integer(1, 16), 8, "bits of each subvector")
REORDER_K = Setting("reorder_k", integer(1), 400,
                    "candidates that are re-ranked by the original vectors, at least twice --recall_num")
SEARCH_LIST = Setting("search_list", integer(1), 100, "candidates that a search keeps, at least twice --recall_num")
SETTING_OF_FLAG = {HNSW_M.name: M.name, HNSW_EF.name: EF.name}  # other names that recall.py has for the same


@dataclass(frozen=True)
class IndexType:
    """A way in which Milvus indexes vectors.

    Attributes:
        description: what --help says of it.
        build_settings: the parameters with which vectors are indexed. A collection has them for good.
        search_settings: the parameters of a search.
        candidates: the search setting that a search for k raises to 2 k; None: it has none.
        deeper: the search settings of which larger values find more; an exact search has none.
        is_quantized: whether Milvus scores compressed vectors, so that cosines have to be computed again.
    """

    description: str
    build_settings: Sequence[Setting] = ()
    search_settings: Sequence[Setting] = ()
    candidates: Setting | None = None
    deeper: Sequence[Setting] = ()
    is_quantized: bool = False

    @property
    def is_approximate(self) -> bool:
        """Whether a search may miss some of the nearest."""
        return bool(self.deeper)


INDEX_TYPES: dict[str, IndexType] = {
    "HNSW": IndexType("a graph", (M, EF_CONSTRUCTION), (EF,), candidates=EF, deeper=(EF,)),
    "FLAT": IndexType("exact"),
    "IVF_FLAT": IndexType("clusters", (NLIST,), (NPROBE,), deeper=(NPROBE,)),
    "IVF_SQ8": IndexType("clusters, a byte a dimension", (NLIST,), (NPROBE,), deeper=(NPROBE,), is_quantized=True),
    "IVF_PQ": IndexType("clusters, product quantization", (NLIST, SUBVECTORS, NBITS), (NPROBE,), deeper=(NPROBE,),
                        is_quantized=True),
    "SCANN": IndexType("clusters, 4-bit product quantization, candidates re-ranked by the original vectors", (NLIST,),
                       (NPROBE, REORDER_K), candidates=REORDER_K, deeper=(NPROBE, REORDER_K)),
    "DISKANN": IndexType("a graph on the server's disk", (), (SEARCH_LIST,), candidates=SEARCH_LIST,
                         deeper=(SEARCH_LIST,)),
}
DEFAULT_TYPE = "HNSW"
LITE_TYPE = "FLAT"  # the only one of a file of Milvus Lite

_SEGMENT_BYTES = 512 << 20  # of vectors that Milvus indexes together at most (dataCoord.segment.maxSize)

def is_lite(uri: str) -> bool:
    """Return whether an address is a file of Milvus Lite, and not a server."""
    return not uri.startswith(("http://", "https://"))


# ------------------------------------------------------------------------------------------------------ what users give
def is_collection_name(name: str) -> bool:
    """Return whether a server takes a name for a collection. Milvus Lite takes any."""
    return re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,254}", name) is not None


def build_settings() -> dict[str, Setting]:
    """Return the parameters with which vectors are indexed, those of all types, by name."""
    return {setting.name: setting for index_type in INDEX_TYPES.values() for setting in index_type.build_settings}


def search_settings() -> dict[str, Setting]:
    """Return the parameters of a search, those of all types, by name; none is called as one of `build_settings`."""
    return {setting.name: setting for index_type in INDEX_TYPES.values() for setting in index_type.search_settings}


def split_settings(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split values of parameters into those of build settings and those of search settings."""
    to_build = {name: value for name, value in values.items() if name in build_settings()}
    to_search = {name: value for name, value in values.items() if name in search_settings()}
    return to_build, to_search


def describe_settings(settings: dict[str, Setting]) -> str:
    """Return a help text for some settings."""
    return "; ".join(f"{name}: {setting.help} (default: {setting.default_text})" for name, setting in settings.items())


def parse_parameters(text: str) -> dict[str, int]:
    """Return parameters such as "nlist=4096,nprobe=64" by name; an argparse type."""
    settings = {**build_settings(), **search_settings()}
    values: dict[str, int] = {}
    for pair in text.split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE,..., got {pair!r} in {text!r}")
        if name not in settings:
            raise argparse.ArgumentTypeError(f"no index type has a parameter {name!r}; {_describe_names()}")
        if name in values:
            raise argparse.ArgumentTypeError(f"{name} is given twice")
        try:
            values[name] = settings[name].type(value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return values


def _describe_names() -> str:
    """Return which parameters each index type has."""
    return "; ".join(f"{name} has {_join(_names_of(name))}" for name in INDEX_TYPES)


def _names_of(index_type: str) -> list[str]:
    """Return the names of the parameters of an index type."""
    settings = (*INDEX_TYPES[index_type].build_settings, *INDEX_TYPES[index_type].search_settings)
    return [setting.name for setting in settings]


def _join(names: Sequence[str]) -> str:
    return ", ".join(names) or "no parameters"


def check_names(index_type: str, settings: Sequence[str]) -> None:
    """Raise InputError if an index type lacks one of some parameters."""
    known = _names_of(index_type)
    for name in settings:
        if name not in (INDEX_TYPE, *known):
            other_flags = [f"--{flag}" for flag, parameter in SETTING_OF_FLAG.items() if parameter == name]
            flags = ["--milvus_index_params", *other_flags]
            raise InputError(f"{name} ({' or '.join(flags)}) is not for {index_type}, which has {_join(known)}")


# -------------------------------------------------------------------------------------------------------------- values
def complete_settings(given_to_build: dict[str, Any], given_to_search: dict[str, Any], rows: int,
                      dimension: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a value for each setting of an index type: the given one, else its default.

    Args:
        given_to_build: the type, and any of its parameters.
        given_to_search: any of its parameters.
        rows: how many vectors there are.
        dimension: of the vectors.

    Raises:
        InputError: the vectors cannot be cut into "m" equal parts.
    """
    index_type = INDEX_TYPES[given_to_build[INDEX_TYPE]]
    build = {setting.name: given_to_build.get(setting.name, setting.default) for setting in index_type.build_settings}
    search = {setting.name: given_to_search.get(setting.name, setting.default)
              for setting in index_type.search_settings}
    if EF_CONSTRUCTION.name in build and build[EF_CONSTRUCTION.name] is None:
        build[EF_CONSTRUCTION.name] = search[EF.name]
    if NLIST.name in build and build[NLIST.name] is None:
        rows_of_segment = min(rows, _SEGMENT_BYTES // (4 * dimension))
        build[NLIST.name] = max(1, min(_MAX_NLIST, round(4 * rows_of_segment**0.5)))
    if NPROBE.name in search and search[NPROBE.name] is None:
        search[NPROBE.name] = min(build[NLIST.name], max(16, build[NLIST.name] // 8))
    if SUBVECTORS.name in build and build[SUBVECTORS.name] is None:
        build[SUBVECTORS.name] = dimension // 4 if dimension % 4 == 0 else dimension
    if SUBVECTORS.name in build and dimension % build[SUBVECTORS.name]:
        raise InputError(f"--milvus_index_params m={build[SUBVECTORS.name]}: does not divide the dimension of the "
                         f"vectors, {dimension}")
    return {INDEX_TYPE: given_to_build[INDEX_TYPE], **build}, search


def parameters_to_build(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what Milvus takes to index vectors with some build settings, without the name of the type."""
    return {name: value for name, value in settings.items() if name != INDEX_TYPE}


def parameters_to_search(index_type: IndexType, settings: dict[str, Any], k: int) -> dict[str, Any]:
    """Return what Milvus takes to search for k vectors with some search settings."""
    parameters = dict(settings)
    if index_type.candidates is not None:
        name = index_type.candidates.name
        parameters[name] = max(parameters[name], 2 * k)
    return parameters


def deeper_settings(build_settings: dict[str, Any], search_settings: dict[str, Any], k: int) -> dict[str, Any]:
    """Return search settings that find more than the given ones in a search for k; {}: these find all they can."""
    index_type = INDEX_TYPES[build_settings[INDEX_TYPE]]
    parameters = parameters_to_search(index_type, search_settings, k)
    deeper = {**parameters, **{setting.name: DEEPER_FACTOR * parameters[setting.name] for setting in index_type.deeper}}
    if NPROBE.name in deeper:  # at most all clusters
        deeper[NPROBE.name] = min(deeper[NPROBE.name], build_settings[NLIST.name])
    return {} if deeper == parameters else deeper


def to_text(settings: dict[str, Any]) -> str:
    """Return settings as --milvus_index_params takes them."""
    return ",".join(f"{name}={value}" for name, value in settings.items())
