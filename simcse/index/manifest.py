"""The manifest of an index: what it is made of, kept with it and compared when it is used again."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

from simcse.console import InputError, warn
from simcse.files import file_digest, read_json, write_json

FORMAT = 6  # of an index folder and of a collection; one of another format is refused
MANIFEST_FILE = "manifest.json"
DIGEST_FIELD = "digest"  # in that file, SHA-256 of what else is in it
REBUILD = "name another folder, or remove this one to build it again"
DAMAGE = (OSError, RuntimeError, ValueError)  # what reading a damaged file raises
EARLIER_FILE = "fingerprint.json"  # what formats before 5 have instead


@dataclass
class AnnRecall:
    """How many of the exact nearest neighbours an approximate index finds.

    Attributes:
        k: how deep it was measured.
        queries: how many of what, such as "100 documents".
        recall: the fraction of the exact k nearest that the search finds.
        settings: the search settings.
        deeper_recall: the fraction with `deeper_settings`.
        deeper_settings: search settings that look deeper; {}: none were tried.
        rows: of the index when it was measured; None: an earlier version measured it.
    """

    k: int
    queries: str
    recall: float
    settings: dict[str, Any]
    deeper_recall: float
    deeper_settings: dict[str, Any]
    rows: int | None = None


@dataclass
class Manifest:
    """A record of what an index is made of, or a request for what it has to be made of.

    A record is kept with the index, and has a value everywhere. A request is the argument that is called `wanted`; it
    has None, or lacks a setting, wherever any value will do: `Manifest()` takes every index.

    Attributes, all of which `differences` compares:
        model: SHA-256 of the checkpoint (`model_digest`).
        max_seq_length: tokens of a text.
        precision: that in which the documents were encoded.
        passages: whether documents are split into passages.
        document_prefix: put before each document, or passage, that was encoded.
        ann_engine: its name in ENGINES.
        index_shards: parts of a folder index; None in one to build: `choose_shard_count` of its vectors.
        dimension: of the vectors.
        build_settings: values by name; see `LocalEngine.build_settings`.

    Which state of the corpus it has, compared by `has_corpus_of`:
        corpus: SHA-256 of the file.
        corpus_columns: 1, texts, or 2, ids and texts.

    What is only recorded:
        calibration: SHA-256 of the file that the int8 graph was calibrated with; None: it is not int8, or not known.
            `warn_other_calibration` compares it.
        search_settings: those of a search that asks for no others.
        lines, documents, rows: how many it has; see `DocumentStore`.
        ann_recall: measured when it was built.
        files: SHA-256 by name of the files in the folder.
        format: FORMAT, when it was written.
    """

    model: str | None = None
    max_seq_length: int | None = None
    precision: str | None = None
    passages: bool | None = None
    document_prefix: str | None = None
    ann_engine: str | None = None
    index_shards: int | None = None
    dimension: int | None = None
    build_settings: dict[str, Any] = field(default_factory=dict)
    corpus: str | None = None
    corpus_columns: int | None = None
    calibration: str | None = None
    search_settings: dict[str, Any] = field(default_factory=dict)
    lines: int | None = None
    documents: int | None = None
    rows: int | None = None
    ann_recall: AnnRecall | None = None
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    COMPARED = ("model", "max_seq_length", "precision", "passages", "document_prefix", "ann_engine", "index_shards",
                "dimension")
    HIDDEN = ("model",)  # compared, and not shown
    QUOTED = ("document_prefix",)  # shown in quotes
    OPTIONAL = ("calibration", "document_prefix")  # which a manifest of this FORMAT may lack

    def differences(self, wanted: "Manifest") -> list[str]:
        """Return how it differs from `wanted`, such as "max_seq_length 32, not 64"; []: it can be used."""
        found = {name: getattr(self, name) for name in self.COMPARED} | self.build_settings
        asked = {name: getattr(wanted, name) for name in self.COMPARED} | wanted.build_settings
        differences = []
        for name, value in asked.items():
            if value is None or found.get(name) == value:
                continue
            if found.get(name) is None or name in self.HIDDEN:
                differences.append(f"another {name}")
            elif name in self.QUOTED:
                differences.append(f"{name} {found[name]!r}, not {value!r}")
            else:
                differences.append(f"{name} {found[name]}, not {value}")
        return differences

    def check(self, wanted: "Manifest", where: str, remedy: str) -> None:
        """Raise InputError if the index is not as `wanted`.

        Args:
            where: the flag that names the index, and its value.
            remedy: what to do then.
        """
        differences = self.differences(wanted)
        if differences:
            raise InputError(f"{where}: was built with {', and '.join(differences)}; {remedy}")

    def completed_by(self, previous: "Manifest") -> "Manifest":
        """Return this request with what every index has: as it asks, else as in the index of a previous corpus.

        Settings of engines are left to the caller.
        """
        return dataclasses.replace(
            self,
            passages=bool(previous.passages if self.passages is None else self.passages),
            calibration=previous.calibration or self.calibration)  # most vectors are those of the previous index

    def has_corpus_of(self, wanted: "Manifest") -> bool:
        """Return whether the index was built from the corpus of `wanted`; True if `wanted` names none."""
        return (wanted.corpus in (None, self.corpus)
                and wanted.corpus_columns in (None, self.corpus_columns))

    def warn_other_calibration(self, wanted: "Manifest", where: str, remedy: str) -> None:
        """Warn if the index was made by another int8 graph than the one of `wanted`, as far as both are known.

        Args:
            where, remedy: see `check`.
        """
        if wanted.calibration and self.calibration and wanted.calibration != self.calibration:
            warn(f"{where}: was made by an int8 graph with another calibration file, so that cosines are a little off; "
                 f"use that graph, or {remedy}")

    def check_arrays(self, folder: str) -> None:
        """Raise ValueError if an array in the folder is not what was written; shards are checked when they are read."""
        for name, digest in self.files.items():
            if name.endswith(".npy"):
                check_digest(os.path.join(folder, name), digest)

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_dict(cls, content: dict[str, Any], where: str, remedy: str) -> "Manifest":
        """Return what `to_json` or `save` has written.

        Args:
            content: the parsed JSON.
            where, remedy: see `check`.

        Raises:
            InputError: another version has written it.
        """
        if content.get("format") != FORMAT:
            raise InputError(f"{where}: another version of recall.py built it; {remedy}")
        try:
            names = {each.name for each in dataclasses.fields(cls)}
            if not names - set(cls.OPTIONAL) <= content.keys() <= names:
                raise TypeError
            manifest = cls(**content)
            if manifest.ann_recall:
                manifest.ann_recall = AnnRecall(**content["ann_recall"])
            manifest.document_prefix = manifest.document_prefix or ""  # a manifest older than the flag lacks it
        except TypeError:  # other fields
            raise InputError(f"{where}: damaged: its manifest lacks fields, or has others; {remedy}") from None
        return manifest

    def save(self, folder: str) -> None:
        """Write it to a folder, with a digest of itself by which an edited or damaged one is told."""
        content = json.loads(self.to_json())
        write_json(os.path.join(folder, MANIFEST_FILE), {**content, DIGEST_FIELD: _digest(content)})

    @classmethod
    def load(cls, folder: str, where: str, remedy: str) -> "Manifest":
        """Return the manifest of an index folder.

        Args:
            where, remedy: see `check`.

        Raises:
            InputError: the folder is no index, its manifest is damaged, or another version has written it.
        """
        try:
            content = read_json(os.path.join(folder, MANIFEST_FILE)) or read_json(os.path.join(folder, EARLIER_FILE))
        except InputError as error:
            raise InputError(f"{where}: damaged: {error}") from None
        if not content:
            raise InputError(f"{where}: exists, but is not an index that recall.py wrote")
        if not is_as_written(content):
            raise InputError(f"{where}: damaged: {MANIFEST_FILE} is not what was written; {remedy}")
        content.pop(DIGEST_FIELD, None)
        return cls.from_dict(content, where, remedy)


def check_digest(path: str, digest: str) -> None:
    """Raise ValueError if a file does not have this SHA-256."""
    if not os.path.isfile(path) or file_digest(path) != digest:
        raise ValueError(f"{os.path.basename(path)} is not what was written")


def is_as_written(content: dict[str, Any]) -> bool:
    """Return whether a manifest that was read is what `Manifest.save` has written, by its digest.

    Other formats may have none.
    """
    fields = {name: value for name, value in content.items() if name != DIGEST_FIELD}
    if DIGEST_FIELD not in content and content.get("format") != FORMAT:
        return True
    return content.get(DIGEST_FIELD) == _digest(fields)


def _digest(content: dict[str, Any]) -> str:
    """Return SHA-256 of JSON content, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
