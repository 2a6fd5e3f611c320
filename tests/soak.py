"""Train, save, recall and evaluate in a loop, killed by kill -9 at random moments, and check what is left each time.

    python tests/soak.py --minutes 30 --data_dir quickstart/recall

Training is gone on with by --resume until it ends, and has to end with the weights of a run that was never killed; the
recall result has to be that of an unbroken run, or not to be there. Prints counts as JSON.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from simcse.encoder import weights  # noqa: E402
from simcse.text import wordpiece  # noqa: E402
from simcse.training import checkpoints  # noqa: E402

MARK = "SIMCSE_SOAK"


class Soak:
    def __init__(self, folder: Path, data_dir: Path, seed: int) -> None:
        self.folder, self.random, self.counts = folder, random.Random(seed), {}
        lines = (data_dir / "train_unsupervised.csv").read_text(encoding="utf-8").splitlines(True)[:256]
        (folder / "train.csv").write_text("".join(lines), encoding="utf-8")
        for name, count in (("corpus.csv", 300), ("dev.csv", 50)):
            rows = (data_dir / name).read_text(encoding="utf-8").splitlines(True)[:count]
            (folder / name).write_text("".join(rows), encoding="utf-8")
        self.train = ["train.py", "--device", "cpu", "--model_name_or_path", ROOT / "pretrained" / "ernie_mini_zh",
                      "--train_set_file", "train.csv", "--max_seq_length", 16, "--batch_size", 8, "--epochs", 2,
                      "--save_steps", 3, "--keep_checkpoints", 3, "--resume", "--output_emb_size", 64]
        self.memory: list[float] = []

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def run(self, words: list, kill_within: float | None = None) -> bool:
        """Run a script; whether it ended by itself. It has to end well, or be killed."""
        process = subprocess.Popen([sys.executable, ROOT / words[0], *map(str, words[1:])], cwd=self.folder,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, MARK: str(self.folder)})
        end = time.monotonic() + (self.random.uniform(0.2, kill_within) if kill_within else 300)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if process.poll() is None:
            process.kill()
            process.communicate()
            self.count(f"{words[0]} killed")
            return False
        _, error = process.communicate()
        assert process.returncode == 0, f"{words[0]}: {error[-2000:]}"
        self.count(f"{words[0]} ended")
        self.memory.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        return True

    def check_checkpoints(self, save_dir: str) -> None:
        """Every folder under its final name has all its files, and they can be read."""
        folder = self.folder / save_dir
        for step in checkpoints.saved_steps(str(folder)):
            path = folder / f"model_{step}"
            assert len(weights.read_weights(str(path / "model_state.pdparams"), "--flag")) > 50
            json.loads((path / "simcse_config.json").read_text(encoding="utf-8"))
            wordpiece.load_tokenizer(str(path))
            self.count("checkpoints verified")

    def digest(self, *names: str) -> str:
        digest = hashlib.sha256()
        for name in names:
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def weights(self, save_dir: str) -> str:
        state = weights.read_weights(str(self.folder / save_dir / "model_64" / "model_state.pdparams"), "--flag")
        return hashlib.sha256(b"".join(name.encode() + state[name].tobytes() for name in sorted(state))).hexdigest()

    def recall(self, name: str) -> list:
        return ["recall.py", "--device", "cpu", "--params_path", "reference/model_64", "--corpus_file", "corpus.csv",
                "--similar_text_pair", "dev.csv", "--recall_result_dir", name, "--index_path", f"{name}_index"]

    def start(self) -> None:
        self.run([*self.train, "--save_dir", "reference"])
        self.run(self.recall("whole"))
        self.expected = self.weights("reference"), self.digest("whole/recall_result.txt")

    def turn(self) -> None:
        """One training, killed as often as not, and one recall."""
        while not self.run([*self.train, "--save_dir", "broken"], kill_within=16):
            self.check_checkpoints("broken")
        self.check_checkpoints("broken")
        assert self.weights("broken") == self.expected[0], "other weights than those of a run that was never killed"
        self.count("trainings with the weights of an unbroken one")
        result = self.folder / "broken" / "recall_result.txt"
        while not self.run(self.recall("broken"), kill_within=9):
            assert not result.exists() or self.digest("broken/recall_result.txt") == self.expected[1]
        assert self.digest("broken/recall_result.txt") == self.expected[1]
        self.run(["evaluate.py", "--similar_text_pair", "dev.csv", "--recall_result_file", result])
        left = [path for path in self.folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]
        self.count("result files of killed runs left beside the result", len([p for p in left if p.is_file()]))
        assert not [path for path in left if path.is_dir()], left
        shutil.rmtree(self.folder / "broken")
        shutil.rmtree(self.folder / "broken_index")

    def orphans(self) -> int:
        """Processes of this soak that are left, beside this one."""
        found = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                found += f"{MARK}={self.folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak, end = Soak(Path(folder), args.data_dir, args.seed), time.monotonic() + 60 * args.minutes
        soak.start()
        while time.monotonic() < end:
            soak.turn()
            print(json.dumps(soak.counts), file=sys.stderr, flush=True)
        memory = soak.memory
        print(json.dumps({**soak.counts, "orphans": soak.orphans(), "peak memory, first and last, MB":
                          [round(memory[2]), round(memory[-1])]}, indent=1))


if __name__ == "__main__":
    main()
