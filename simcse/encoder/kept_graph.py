"""Keep the exported graph of a checkpoint beside it, so that the next start imports neither model nor paddlenlp."""

import contextlib
import importlib.metadata
import os
import shutil
from pathlib import Path

from simcse.console import InputError, log, warn
from simcse.encoder.engine import openvino_is_faster
from simcse.encoder.weights import CONFIG_FILE, model_digest, read_record
from simcse.files import file_digest, new_cache_folder, read_json, write_json

import paddle

FINGERPRINT_FILE = "fingerprint.json"
HERE = Path(__file__).resolve().parent
CODE = [*sorted(HERE.glob("*.py")), HERE.parents[1] / "model.py"]  # what shapes a graph


class KeptGraph:
    """The folder beside a checkpoint for its exported graph: <name>.graph, or <name>.int8.

    Its fingerprint says what the graph was made of: the checkpoint and the encoder by content, the libraries, the code,
    the calibration file of int8; and the folder's files, by content.

    Args:
        params_path: the checkpoint's file of weights.
        precision: "int8" or any other, for which there is one graph.
        model_name_or_path: the encoder of a checkpoint without a record.
        calibration_file: texts that int8 is calibrated with; None: a graph with any calibration will do.

    Attributes:
        folder: its path; it may not exist.
        fingerprint: digests and versions of all that a graph exported now depends on; `keep` writes them into the
            folder, and `is_current` compares them.
    """

    def __init__(self, params_path: str, precision: str, model_name_or_path: str | None = None,
                 calibration_file: str | None = None) -> None:
        is_int8 = precision == "int8"
        self.folder = os.path.splitext(params_path)[0] + (".int8" if is_int8 else ".graph")
        libraries = ["paddlenlp"]
        if openvino_is_faster() and not is_int8:
            libraries.append("openvino")
        self.fingerprint = {
            "model": model_digest(params_path, model_name_or_path), "paddlepaddle": paddle.__version__,
            "libraries": _installed_versions(libraries), "code": {path.name: file_digest(str(path)) for path in CODE}}
        if calibration_file:
            self.fingerprint["calibration"] = file_digest(calibration_file)

    def is_current(self, output_emb_size: int | None = None) -> bool:
        """Tell whether the folder has a whole graph of what the checkpoint, the libraries and the code are now.

        Args:
            output_emb_size: what its embeddings must have; None: any.
        """
        try:
            fingerprint = read_json(os.path.join(self.folder, FINGERPRINT_FILE))
            digests = {name: file_digest(os.path.join(self.folder, name)) for name in fingerprint["files"]}
            kept_size = read_record(self.folder)["output_emb_size"]
        except (OSError, LookupError, TypeError, InputError):  # there is none, or a damaged one
            return False
        is_same = all(fingerprint.get(name) == value for name, value in self.fingerprint.items())
        return is_same and fingerprint["files"] == digests and output_emb_size in (None, kept_size)

    def keep(self, exported: str, record: dict) -> bool:
        """Move an exported graph to the folder, which appears whole or, where it cannot be written, not at all.

        A folder that cannot be written is a warning: the graph can be made again.

        Args:
            exported: the folder that `export_fastest` has filled.
            record: the checkpoint's, to which that of the graph is joined.

        Returns:
            Whether the folder has the graph now.
        """
        write_json(os.path.join(exported, CONFIG_FILE), {**record, **read_record(exported)})
        files = {name: file_digest(os.path.join(exported, name)) for name in sorted(os.listdir(exported))}
        write_json(os.path.join(exported, FINGERPRINT_FILE), {**self.fingerprint, "files": files})
        try:
            with new_cache_folder(self.folder) as folder:
                for name in os.listdir(exported):
                    shutil.move(os.path.join(exported, name), folder)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            warn(f"{self.folder}: the exported graph cannot be kept there ({reason}), and every start exports it "
                 "again; make this path writable for quicker starts")
            return False
        log(f"kept the graph in {self.folder}, for quicker starts")
        return True


def _installed_versions(names: list[str]) -> dict[str, str]:
    """Return the versions of packages, without importing them; those that are not installed are left out."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
