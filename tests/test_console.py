"""What a person sees on stderr: the first line, progress with and without a terminal, --quiet; how signals end it."""

import argparse
import ctypes
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios

from deploy.python import predictor
from simcse import console, flags, signals
from simcse.files import new_file

import numpy as np
import pytest
from conftest import ROOT, command, refuse, run_script, succeed


def on_a_terminal(*words, **options):
    """Run a command whose stderr is a terminal: exit code, stdout, what the terminal got."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    with subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=end, text=True, cwd=ROOT,
                          **options) as process:
        os.close(end)
        shown = b""
        try:
            while chunk := os.read(terminal, 4096):
                shown += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
        return process.wait(), process.stdout.read(), shown.decode()


STEPS = """
import sys, time
from simcse import console
console.SECONDS_PER_LINE = 0.2
console.settings.quiet = "quiet" in sys.argv
terminal = sys.stderr.isatty()
now = time.monotonic()
if not terminal:
    time.monotonic = lambda: now
with console.progress("counting", None if "unknown" in sys.argv else 1000, "sheep") as advance:
    console.log("a log line")
    for _ in range(10):
        time.sleep(0.15 * terminal)
        now += 0.15
        advance(90)
    console.warn("a warning")
"""


def test_on_a_terminal_a_bar_with_rate_and_remaining_time():
    code, _, shown = on_a_terminal(sys.executable, "-c", STEPS)
    assert code == 0
    found = re.findall(r"counting: +(\d+)%\|[^|\r]*\| (\d+)/1000 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ sheep/s", shown)
    assert found and all(int(percent) == int(done) // 10 for percent, done in found)
    assert found[-1] == ("90", "900")
    assert re.search(r"(^|[\r\n])a warning\r\n", shown), "the bar is not written into log lines"


def test_elsewhere_plain_lines():
    result = subprocess.run([sys.executable, "-c", STEPS], cwd=ROOT, capture_output=True, text=True)
    lines = result.stderr.splitlines()
    assert "\r" not in result.stderr and lines[0] == "a log line" and lines[-1] == "a warning"
    shapes = [re.fullmatch(r"counting: (\d+) of 1000 \((\d+) %\), ([\d.]+) sheep/s, \d\d:\d\d left", line)
              for line in lines[1:-1]]
    assert len(shapes) == 5 and all(shapes), "0.15 s a step, and a line after every 0.2 s"
    for shape in shapes:
        assert round(int(shape[1]) / 10) == int(shape[2]) and float(shape[3]) == pytest.approx(600, abs=1)
    unknown = subprocess.run([sys.executable, "-c", STEPS, "unknown"], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"^counting: \d+, [\d.]+ sheep/s$", unknown.stderr, re.M)


def test_quiet_leaves_warnings():
    result = subprocess.run([sys.executable, "-c", STEPS, "quiet"], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == "a warning\n"


@pytest.fixture(scope="module")
def stages(checkpoint, exported, sample, tmp_path_factory):
    """Every stage's command, and what its first line has to say beside the device."""
    folder = tmp_path_factory.mktemp("stages")
    model = ["--params_path", checkpoint]
    encode = ["--device", "cpu", "--cpu_threads", 1, "--precision", "fp32"]
    weights, here = f"{checkpoint}/model_state.pdparams", "cpu, 1 thread, fp32"
    corpus, dev, test = sample / "corpus.csv", sample / "dev.csv", sample / "test.csv"
    return {
        "train.py": (["--device", "cpu", "--cpu_threads", 1, "--init_from_ckpt", checkpoint, "--train_set_file",
                      sample / "train_unsupervised.csv", "--epochs", 0, "--save_dir", folder / "checkpoints",
                      "--visualdl_dir", folder / "log"],
                     f"{here}; {weights}; 128 training texts; 0 epochs in batches of 32"),
        "recall.py": ([*model, *encode, "--corpus_file", corpus, "--similar_text_pair", dev, "--recall_result_dir",
                       folder], f"{here}; {weights}; 120 documents for hnswlib; 60 queries"),
        "predict.py": ([*model, *encode, "--text_pair_file", test], f"{here}; {weights}; 40 pairs"),
        "inference.py": ([*model, *encode, "--text", "语义"], f"{here}; {weights}; 1 text"),
        "export_model.py": ([*model, "--output_path", folder / "output"],
                            rf"cpu, \d+ threads?, fp32; {weights} to {folder}/output"),
        "deploy/python/predict.py": (["--model_dir", exported, *encode, "--text_pair_file", test],
                                     f"{here}; {exported}; 0 texts; 40 pairs"),
    }


@pytest.mark.parametrize("script", ["train.py", "recall.py", "predict.py", "inference.py", "export_model.py",
                                    "deploy/python/predict.py"])
def test_the_first_line_says_what_is_about_to_happen(stages, script, tmp_path):
    flags, says = stages[script]
    result = succeed(script, *flags, cwd=tmp_path)
    assert re.fullmatch(f"{os.path.basename(script)}: {says}", result.stderr.splitlines()[0])


@pytest.mark.parametrize("script", ["train.py", "recall.py"])
def test_quiet_says_nothing_but_warnings(stages, script, tmp_path):
    lines = succeed(script, *stages[script][0], "--quiet", cwd=tmp_path).stderr.splitlines()
    assert lines and all(" longer than 32 tokens and cut" in line for line in lines)


def test_quiet_keeps_errors(tmp_path):
    (tmp_path / "dev.csv").write_text("a\tA\nb\n")
    (tmp_path / "result.txt").write_text("a\tA\t0.5\n")
    files = ["--similar_text_pair", "dev.csv", "--recall_result_file", "result.txt"]
    assert "dev.csv:2 (columns: 1 instead of 2)" in succeed("evaluate.py", *files, "--quiet", cwd=tmp_path).stderr
    assert "dev.csv:2" in refuse("evaluate.py", *files, "--quiet", "--strict_data", cwd=tmp_path)


def test_reading_and_encoding_show_bars_on_a_terminal(checkpoint, tmp_path):
    lines = "".join(f"第{row}条关于语义检索和向量召回的文本,长一些\n" for row in range(12000))
    (tmp_path / "texts.txt").write_text(lines, encoding="utf-8")
    code, _, shown = on_a_terminal(*command(
        "inference.py", "--device", "cpu", "--params_path", checkpoint, "--input_file", tmp_path / "texts.txt",
        "--output_file", tmp_path / "texts.npy"))
    assert code == 0 and len(np.load(tmp_path / "texts.npy")) == 12000
    assert re.search(r"encoding: +\d+%\|.*?\| \d+/12000 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ texts/s", shown)


def test_what_a_text_holds_breaks_no_line():
    text = "a\tb\r\nc\x0b\x0cd\x1c\x1d\x1ee\x85f\u2028g\u2029h\u3000i"
    assert console.line("tsv", text=text, numbers=[1.5, 2], missing=None) == "a b c d e f g h\u3000i\t1.5 2\t\n"
    line = console.line("jsonl", text=text, missing=None)
    assert len(line.splitlines()) == 1 and json.loads(line) == {"text": text, "missing": None}
    assert flags.given_text(f" \t{text}\n") == "a b c d e f g h\u3000i"
    with pytest.raises(argparse.ArgumentTypeError, match="an empty text"):
        flags.given_text("\x85\n\u3000")


def test_counts_agree_with_nouns_and_verbs():
    assert console.part(1, 1, "text", "are") == "1 of 1 text is"
    assert console.part(1, 1000, "query", "have") == "1 of 1,000 queries has"
    assert console.part(0, 2, "line", "stand") == "0 of 2 lines stand"
    assert [console.verb(number, "count") for number in (0, 1, 2)] == ["count", "counts", "count"]


# -------------------------------------------------------------------------------------------------------------- signals
IMPORT_INTERRUPTED = """
import os, signal, sys
sys.path.remove(os.path.dirname(__file__))
del sys.modules["numpy"]
try:
    os.kill(os.getpid(), signal.SIGINT)
    import numpy
except KeyboardInterrupt:  # as numpy does
    raise ImportError("Unable to import required dependencies")
sys.modules["numpy"] = numpy
"""


@pytest.mark.parametrize("script", ["recall.py", "train.py", "scripts/to_tsv.py", "deploy/python/predict.py"])
def test_control_c_while_modules_are_imported(tmp_path, script):
    (tmp_path / "numpy.py").write_text(IMPORT_INTERRUPTED)
    result = run_script(script, "--help", env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 130
    assert result.stderr == f"{os.path.basename(script)}: interrupted\n"


def test_sigterm_leaves_an_earlier_result_and_no_other_file(tmp_path, capsys):
    (tmp_path / "result.txt").write_text("of an earlier run")

    def main():
        with new_file(str(tmp_path / "result.txt")) as file:
            file.write("unfinished")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        console.run(main)
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a second one ends the process at once"
    assert os.listdir(tmp_path) == ["result.txt"] and (tmp_path / "result.txt").read_text() == "of an earlier run"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("hold_signals", [signals.hold_signals, predictor.signals_held])
def test_signals_that_come_while_paddle_is_imported(hold_signals):
    """Paddle takes SIGTERM without Python's knowledge, as libc does here."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    seen = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    with hold_signals():
        libc.signal(signal.SIGTERM, None)  # the default, which ends this process
        signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt), hold_signals():
        signal.raise_signal(signal.SIGINT)
        seen.append("later")
    assert seen == [signal.SIGTERM, "later"]


def test_a_full_disk_of_stdout_is_one_line(tmp_path):
    """Also of what Python flushes when it ends."""
    code = "from simcse import console; console.run(lambda: print('语义'))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "-c: error: no space left on the disk of stdout, or of temporary files\n"
