"""The documentation's own commands and links, the shell scripts, the sample data, the download and the quickstart."""

import filecmp
import http.server
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile

from scripts import sample_texts
from scripts.make_sample_data import make_papers

import numpy as np
import pytest
from conftest import ROOT, command, succeed

# In the order in which their commands are run.
PAGES = ["training", "better-recall", "experiments", "index", "python", "milvus", "deployment", "integrations",
         "benchmarks", "sizing", "reliability"]
CHINESE = ["README.md", *(f"docs/zh/{page}.md" for page in PAGES)]
ENGLISH = ["README_en.md", *(f"docs/en/{page}.md" for page in PAGES)]

# Stands in for `python` where there is no GPU: runs the same script without the launcher, on the CPU, at a small size.
SHIM = """#!{python} -IS
import os, sys
words = sys.argv[1:]
for launcher, first in (("paddle.distributed.launch", "-m"), ("scripts/launch.py", "scripts/launch.py")):
    if launcher in words:
        start = words.index(first)
        del words[start:next(i for i, word in enumerate(words) if word.endswith(".py") and i > start)]
words = ["cpu" if before == "--device" and word == "gpu" else word for before, word in zip([""] + words, words)]
script = next(word for word in words if word.endswith(".py"))
if script == "train.py":
    words += ["--model_name_or_path", "pretrained/ernie_mini_zh", "--max_seq_length", "16"]
    words += ["--epochs", "1"] * ("--epochs 0" not in " ".join(words))
elif os.path.basename(os.path.dirname(script)) == "python" and "--device" not in words:
    words += ["--device", "cpu"]
os.execv({forked!r}, [{forked!r}, *words])
"""


@pytest.fixture(scope="module")
def clone(sample, tmp_path_factory):
    """What a fresh clone has, the small sample data in recall/, and the shim as `python`.

    The downloaded data has training pairs and the sample none: here those of dev.csv stand for them.
    """
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(sample, folder / "recall")
    shutil.copy(sample / "dev.csv", folder / "recall" / "train.csv")
    shim = folder / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(python=sys.executable, forked=command("")[0]))
    shim.chmod(0o755)
    return folder


def commands(name):
    """The ```bash blocks of a page, in order."""
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.S | re.M)


def shell(clone, lines, program="bash", **env):
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run([program, "-e", "-c", lines], cwd=clone, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PATH": path, "PYTHON": str(clone / "bin" / "python"), **env})


def test_both_readmes_have_the_same_commands():
    assert sorted(CHINESE[1:]) == sorted(f"docs/zh/{path.name}" for path in (ROOT / "docs" / "zh").iterdir())
    assert sorted(ENGLISH[1:]) == sorted(f"docs/en/{path.name}" for path in (ROOT / "docs" / "en").iterdir())
    for chinese, english in zip(CHINESE, ENGLISH):
        assert commands(chinese) == commands(english), chinese


@pytest.mark.parametrize("name", CHINESE + ENGLISH)
def test_links_and_pictures_exist(name):
    page = ROOT / name
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
               if not re.match(r"https?:", target)]
    for target in targets:
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.is_file(), target
        if anchor:
            text = there.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", text, re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            anchors += re.findall(r'^<a name="(.+?)"></a>$', text, re.M)
            assert anchor in anchors, target
    twin = dict(zip(CHINESE + ENGLISH, ENGLISH + CHINESE))[name]
    assert (ROOT / twin).resolve() in [(page.parent / target).resolve() for target in targets], "the other language"


def test_the_readmes_commands(clone):
    outputs = {}
    for lines in (each for name in CHINESE for each in commands(name)):
        result = shell(clone, lines)
        assert result.returncode == 0, lines + result.stdout + result.stderr
        outputs[lines.split("\n")[-2]] = result.stdout
        if "train.py" in lines and not (clone / "checkpoints" / "model_20000").exists():
            # The README's checkpoint of 20000 steps is here the one of two.
            shutil.copytree(clone / "checkpoints" / "model_2", clone / "checkpoints" / "model_20000")
    assert len(outputs) >= 16
    evaluated = outputs["bash scripts/evaluate.sh"]
    assert re.fullmatch(r"(recall@\d+=\d+\.\d+\n){5}", evaluated)
    assert outputs["python evaluate.py"] == evaluated
    rows = len((clone / "result.tsv").read_text().splitlines())
    assert rows == 10, "two of each --compare, one of --show_errors and of --targets id"
    assert len(outputs["sh scripts/predict.sh"].splitlines()) == 40
    assert outputs["sh deploy/python/deploy.sh"].startswith("(1, 256)\n")
    assert np.load(clone / "corpus.npy").shape == (120, 256)
    triples = [line.split("\t") for line in (clone / "train_triples.csv").read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("\t") for line in (clone / "recall" / "train.csv").read_text(encoding="utf-8").splitlines()]
    assert triples and all(len(row) == 3 and row[:2] in pairs and row[2] != row[1] for row in triples)


def test_scripts_run_under_dash_and_from_elsewhere(clone):
    """Plain POSIX shell; further flags are passed on; settings from the environment."""
    if not shutil.which("dash"):
        pytest.skip("dash is not installed")
    for script in ("train", "run_build_index", "predict", "export_model"):
        result = shell(clone, f"cd /; dash {clone}/scripts/{script}.sh --help", "dash", DEVICE="cpu")
        assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
    result = shell(clone, "dash scripts/evaluate.sh --recall_num 3", "dash", RESULT_DIR="nowhere")
    assert result.returncode == 2 and "nowhere/recall_result.txt: no such file" in result.stderr


@pytest.mark.parametrize("script, flags, named", [
    ("train", "--train_set_file mine.csv --test_set_file=my.csv --model_name_or_path encoder", ""),
    ("train", "--train_set_file mine.csv", "--model_name_or_path --test_set_file"),
    ("run_build_index", "--corpus_file mine.csv --similar_text_pair my.csv --params_path ck", ""),
    ("run_build_index", "--similar_text_pair_file corpus_file.csv", "--corpus_file --params_path"),
    ("run_build_index", "--query 语义 --corpus_file=mine.csv", "--params_path"),
    ("run_build_index", "--query 语义", "--corpus_file --params_path"),
    ("run_build_index", "--query 语义 --index_path index", "--params_path"),
    ("predict", "--text_pair_file mine.csv --params_path=ck", ""), ("predict", "-", "--params_path"),
    ("evaluate", "--similar_text_pair my.csv --recall_result_file one.txt two.txt --compare", ""),
    ("evaluate", "--recall_num 3", "--recall_result_file --similar_text_pair"),
    ("export_model", "--params_path ck", ""),
    ("serve", "--model_dir out --milvus_uri a.db", ""), ("serve", "--index_path=index", "--model_dir"),
    ("deploy", "--model_dir out", ""), ("deploy", "--text 语义", "--model_dir")])
def test_a_script_names_no_file_of_its_own_where_flags_name_one(bare_clone, tmp_path, script, flags, named):
    """argparse checks each file that is named, also one that a later flag replaces."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    own = dict.fromkeys(("DATA_DIR", "PARAMS_PATH", "RESULT_DIR", "OUTPUT_DIR", "INDEX_PATH"), "its own")
    path = ROOT / "deploy" / "python" / "deploy.sh" if script == "deploy" else f"scripts/{script}.sh"
    ran = subprocess.run(["sh", path, *flags.split()], cwd=bare_clone, capture_output=True, text=True,
                         env={**os.environ, **own, "PYTHON": str(stub), "DEVICE": "cpu"})
    assert ran.returncode == 0 and ran.stdout.endswith("\n".join(["", *flags.split(), ""])), ran.stderr
    values = re.findall(r"^(--\w+)[\n=](its own.*|rocketqa.*)$", ran.stdout, re.M)
    values = sorted(flag for flag, _ in values if flag not in ("--recall_result_dir", "--output_path"))
    assert values == named.split()


def test_train_sh_takes_a_pretrained_encoder(clone):
    """The encoder by masked words, and SimCSE on from it."""
    result = shell(clone, "python scripts/pretrain.py --device cpu --model_name_or_path pretrained/ernie_mini_zh "
                   "--train_set_file recall/train_unsupervised.csv --batch_size 64 --save_dir mlm")
    assert result.returncode == 0 and (clone / "mlm" / "model_2").is_dir(), result.stderr
    result = shell(clone, "sh scripts/train.sh --model_name_or_path mlm/model_2", DEVICE="cpu", SAVE_DIR="after",
                   PYTHON=sys.executable, EPOCHS="0")
    assert result.returncode == 0 and "recall@1=" in result.stdout, result.stderr


def test_every_script_is_executable_and_parses():
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("deploy/python/*.sh")]
    names = {path.stem for path in scripts}
    assert {"train", "run_build_index", "evaluate", "predict", "export_model", "quickstart", "run_tests",
            "download_data", "deploy"} <= names
    for path in scripts:
        strict = "bash" if "bash" in path.read_text().splitlines()[0] else "sh"
        assert subprocess.run([strict, "-n", path]).returncode == 0
        assert os.access(path, os.X_OK)


def test_sample_data_is_reproducible_and_honest(tmp_path):
    for name in "ab":
        succeed("scripts/make_sample_data.py", tmp_path / name)
    names = ["corpus.csv", "dev.csv", "test.csv", "train_unsupervised.csv"]
    assert sorted(os.listdir(tmp_path / "a")) == names
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[0] == names
    lines = {name: (tmp_path / "a" / name).read_text(encoding="utf-8").splitlines() for name in names}
    queries, targets = zip(*(line.split("\t") for line in lines["dev.csv"]))
    assert set(targets) <= set(lines["corpus.csv"]) and len(set(queries)) == len(queries) == 500
    assert not set(queries) & set(lines["train_unsupervised.csv"]), "no query is trained on"
    assert len(lines["train_unsupervised.csv"]) > 2000


# ------------------------------------------------------------------------------------------------------- download
@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("literature_search_data/recall/corpus.csv", "语义\n" * 20000)
        bundle.writestr("../../recall/../escaped.txt", "no")
        bundle.writestr("/recall/dev.csv", "a\tb\n")
        bundle.writestr("elsewhere/x.csv", "no")
    return path


@pytest.fixture
def server(archive):
    """Serves the archive with byte ranges; `requests` lists the ranges asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, wanted = archive.read_bytes(), self.headers.get("Range")
            self.server.ranges.append(wanted)
            start = int(wanted[6:].rstrip("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[start:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def bare_clone(tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    return folder


def download(folder, url):
    return subprocess.run(["sh", "scripts/download_data.sh"], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "DATA_URL": url, "PYTHON": sys.executable, "no_proxy": "*"})


@pytest.mark.skipif(not (shutil.which("curl") or shutil.which("wget")), reason="neither curl nor wget is installed")
def test_download_resumes_and_unpacks_only_what_belongs(bare_clone, archive, server, tmp_path):
    (bare_clone / "literature_search_data.zip.part").write_bytes(archive.read_bytes()[:100])
    result = download(bare_clone, f"http://127.0.0.1:{server.server_port}/data.zip")
    assert result.returncode == 0, result.stderr
    assert server.ranges == ["bytes=100-"]
    assert (bare_clone / "recall" / "corpus.csv").read_text(encoding="utf-8") == "语义\n" * 20000
    assert (bare_clone / "recall" / "dev.csv").read_text() == "a\tb\n"
    assert sorted(os.listdir(bare_clone / "recall")) == ["corpus.csv", "dev.csv"]
    assert not list(tmp_path.rglob("escaped.txt")) and not (bare_clone / "elsewhere").exists()


@pytest.mark.skipif(not (shutil.which("curl") or shutil.which("wget")), reason="neither curl nor wget is installed")
def test_download_offline_says_what_to_do(bare_clone):
    result = download(bare_clone, "http://127.0.0.1:9/data.zip")
    assert result.returncode == 1
    assert "Run the script again to resume" in result.stderr and "scripts/quickstart.sh" in result.stderr


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b.replace(b"\x00", b"\x01", 50), lambda b: b"x"])
def test_a_damaged_archive_is_not_unpacked(bare_clone, archive, damage):
    (bare_clone / "literature_search_data.zip").write_bytes(damage(archive.read_bytes()))
    result = download(bare_clone, "http://127.0.0.1:9/data.zip")
    assert result.returncode == 1 and "not a complete zip archive" in result.stderr, result.stderr
    assert not (bare_clone / "recall").exists()


# ------------------------------------------------------------------------------------------------------ quickstart
@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project, with a .venv whose Python is the forked one, so that the quickstart installs nothing."""
    folder = tmp_path_factory.mktemp("installed")
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in ("quickstart", "recall"):
            (folder / path.name).symlink_to(path)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(command("")[0])
    checksum = subprocess.run("cksum <requirements.txt", shell=True, cwd=folder, capture_output=True, text=True).stdout
    (folder / ".venv" / "installed").write_text(f"requirements.txt {checksum}")
    return folder


def test_quickstart(clone, installed, request):
    """With --slow as a user runs it, in the environment that the tests run in; else with a small sample, and forked.

    Recall rises by the training, too, if the sample is a whole one.
    """
    is_slow = request.config.getoption("--slow")
    folder = clone if is_slow else installed
    if is_slow:
        if not os.path.isfile(os.path.join(sys.prefix, "installed")):
            pytest.skip("only in the environment that scripts/run_tests.sh makes: it would install packages here")
        os.symlink(sys.prefix, clone / ".venv")
    result = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=folder, capture_output=True, text=True, timeout=1800,
                            env={**os.environ, "PAPERS": "1500" if is_slow else "120"})
    assert result.returncode == 0, result.stderr
    rows = [re.search(rf"^{name} +((?:[\d.]+ +){{5}})\d+ s$", result.stdout, re.M)[1].split() for name in (
        "untrained", "SimCSE, epochs: 1", "first_last_avg, whitened", "first_avg, trained on pairs",
        "first_last_avg, with BM25")]
    untrained, simcse, recipe, paired, hybrid = ([float(value) for value in row] for row in rows)
    assert not is_slow or all(b < a for b, a in zip(untrained, simcse)), (untrained, simcse)
    assert recipe[0] > max(untrained[0], simcse[0]) and hybrid[0] >= recipe[0], (simcse, recipe, hybrid)
    assert paired[0] > max(untrained[0], simcse[0]), (simcse, paired)
    assert max(map(len, result.stdout.splitlines())) < 200 and "made-up sample data" in result.stdout
    for name in ("scores.txt", "corpus.npy", "output/simcse_config.json", "deploy.txt", "hybrid/recall_result.txt"):
        assert (folder / "quickstart" / name).stat().st_size > 0
    assert (folder / "quickstart" / "query.txt").read_text(encoding="utf-8").count("\n") == 5


def quickstart(folder, *words, cwd=None, **env):
    return subprocess.run(["bash", folder / "scripts" / "quickstart.sh", *words], cwd=cwd or folder,
                          capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OUT": "", "DEVICE": "", **env})


def answers_of(stdout):
    """The answers that the quickstart prints: for each query its documents."""
    explanation, *lines = stdout.partition("\nRun these commands in ")[0].splitlines()
    assert explanation.startswith("Before each document: its cosine with the query, plus its BM25 score"), explanation
    answers = {}
    query = None
    for line in lines:
        if line.startswith("  "):
            answers[query].append(line.split(maxsplit=1)[1])
        elif line:
            query = line
            answers[query] = []
    return answers


def test_quickstart_with_documents_of_the_user(installed, tmp_path):
    """From documents with ids to the answers of their own clauses; what an earlier run left is gone."""
    documents = [paper.document for paper in make_papers(random.Random(1), 200)]
    file = tmp_path / "my papers.csv"
    file.write_text("".join(f"d{row}\t{text}\n" for row, text in enumerate(documents)), encoding="utf-8")
    before = file.read_bytes()
    out = installed / "quickstart" / "files" / "my papers"
    (out / "trained" / "model_1_whitened").mkdir(parents=True)
    (out / "made_by_quickstart").touch()

    result = quickstart(installed, file)
    assert result.returncode == 0, result.stderr
    assert file.read_bytes() == before and not (out / "trained" / "model_1_whitened").exists()
    assert re.findall(r"^== (\d)/6 .*: \d+ s$", result.stderr, re.M) == list("123456")
    assert "whiten first_avg, 512 tokens" in result.stderr and "4,000 pairs of 200 documents" in result.stderr
    answers = answers_of(result.stdout)
    assert [len(found) for found in answers.values()] == [5, 5, 5]
    for query in answers:
        assert any(query in text for text in documents) and len(query) <= 30
    ranked_first = next(line.split("\t") for line in (out / "answers.tsv").read_text(encoding="utf-8").splitlines())
    assert ranked_first[0] in ranked_first[1]

    more = re.search(r"^More queries:\n  (.*) --query 'TEXT'$", result.stdout, re.M)[1]
    assert "--distinct" in more
    assert set(re.findall(r"(\S+) .*sh scripts/", result.stdout)) == {"PYTHON=.venv/bin/python"}
    asked = subprocess.run(["bash", "-c", f"{more} --query 糖尿病"], cwd=installed, capture_output=True, text=True)
    assert asked.stdout.count("\n") == 5, asked.stderr

    with file.open("a", encoding="utf-8") as changed:
        changed.write("new\t无人机在山上运茶叶的试验\n")
    update = re.search(r"^After a change of the file .*:\n  (.*)$", result.stdout, re.M)[1]
    updated = subprocess.run(["bash", "-c", update.replace("TEXT", "无人机运茶叶")], cwd=installed,
                             capture_output=True, text=True)
    assert "1 new, 0 gone" in updated.stderr
    assert updated.stdout.split("\t")[1] == "无人机在山上运茶叶的试验"


def test_quickstart_with_few_documents(installed, tmp_path):
    """Which are too few to train on; file and folder of the user's are both relative to the user's own folder."""
    (tmp_path / "words").write_text("苹果\n香蕉\n语义\n检索\n编码\n索引\n白化\n训练\n文档\n查询", encoding="utf-8")
    result = quickstart(installed, "words", "语义 检索", cwd=tmp_path, OUT="out")
    assert result.returncode == 0, result.stderr
    assert "too few texts to whiten and to train on (10 documents and clauses, 500 are needed)" in result.stderr
    assert f"too few pairs to train on (0); the checkpoint stays {tmp_path}/out/whitened/model_0\n" in result.stderr
    answers = answers_of(result.stdout)
    assert list(answers) == ["语义 检索"] and set(answers["语义 检索"]) >= {"语义", "检索"}


def test_quickstart_refuses_what_it_cannot_use_before_it_installs(bare_clone, tmp_path):
    texts = bare_clone / "texts.txt"
    texts.write_text("语义\n检索\n", encoding="utf-8")
    (bare_clone / "empty.txt").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index").touch()
    own = tmp_path / "own"
    own.mkdir()
    (own / "made_by_quickstart").touch()
    (own / "pairs.csv").write_text("语义\n检索\n", encoding="utf-8")
    for words, env, message in [
            (["no.txt"], {}, "no.txt: no such file"),
            (["scripts"], {}, "scripts: not a regular file; it is read several times"),
            (["--out"], {}, "--out: no such flag; usage: bash scripts/quickstart.sh [FILE [QUERY ...]]"),
            (["texts.txt"], {"DEVICE": "tpu"}, "DEVICE=tpu: expected cpu or gpu"),
            (["texts.txt"], {"DEVICE": "gpu"}, "DEVICE=gpu: there is no paddlepaddle-gpu in .venv; docs/en/training.md "
             "says how to install it"),
            (["texts.txt", "-"], {}, "-: queries from stdin are not read; recall.py --query reads them"),
            (["texts.txt", "语义", " "], {}, "query ' ': is blank"),
            (["texts.txt", "--query", "语义"], {}, "--query: only queries follow the file, no flags"),
            (["empty.txt"], {}, "empty.txt: the file is empty"),
            (["texts.txt"], {"OUT": f"{texts}/x/y"}, f"{texts}/x/y: cannot be written; set OUT to another "
             "folder"),
            (["texts.txt"], {"OUT": str(tmp_path / "mine")}, f"OUT={tmp_path}/mine: exists and was not made by an "
             "earlier run with a file; name another folder"),
            ([own / "pairs.csv"], {"OUT": str(own)}, f"OUT={own}: {own}/pairs.csv is in it; name another folder")]:
        result = quickstart(bare_clone, *words, **env)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"quickstart.sh: error: {message}\n"
    assert sorted(os.listdir(bare_clone)) == ["empty.txt", "scripts", "texts.txt"] and texts.stat().st_size
    assert (own / "pairs.csv").stat().st_size and (tmp_path / "mine" / "index").exists()


@pytest.mark.parametrize("folder", ["", "index", "recall"])
def test_the_sample_run_keeps_the_results_of_a_users_file(bare_clone, folder):
    mark = bare_clone / "quickstart" / folder / "made_by_quickstart"
    mark.parent.mkdir(parents=True)
    mark.touch()
    result = quickstart(bare_clone, PYTHON="false")
    assert (result.returncode, result.stdout) == (2, "") and mark.exists()
    assert result.stderr == (f"quickstart.sh: error: quickstart/{folder}: holds the results of a run with a file, and "
                             "the sample run writes to it; move it elsewhere\n")


def test_quickstart_prints_its_usage(bare_clone):
    result = quickstart(bare_clone, "--help", cwd=bare_clone.parent)
    assert result.returncode == 0 and not result.stderr
    assert "\n  bash scripts/quickstart.sh FILE [QUERY ...] " in result.stdout and "set -" not in result.stdout


@pytest.mark.parametrize("content, message", [
    ("语义索引\n相似检索\n".encode("gbk"), "GBK"), (b"\n \n", "the file is empty")])
def test_quickstart_refuses_a_file_with_the_scripts_own_line(installed, tmp_path, content, message):
    """And what an earlier run has made stays."""
    (tmp_path / "texts.txt").write_bytes(content)
    out = tmp_path / "out"
    (out / "index").mkdir(parents=True)
    (out / "made_by_quickstart").touch()
    result = quickstart(installed, "texts.txt", cwd=tmp_path, OUT=str(out))
    assert result.returncode == 2 and not result.stdout and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("sample_texts.py: error: --corpus_file") and message in last
    assert (out / "index").is_dir()


def test_quickstart_ends_by_ctrl_c(bare_clone):
    """With exit code 130, also where the program that it interrupts has another one, as pip has."""
    (bare_clone / "texts.txt").write_text("语义\n检索\n", encoding="utf-8")
    python = bare_clone / "python"
    python.write_text("#!/bin/sh\ntrap 'exit 1' INT\necho started >&2\nwhile :; do sleep 0.1; done\n")
    python.chmod(0o755)
    (bare_clone / "requirements.txt").touch()
    process = subprocess.Popen(["bash", "scripts/quickstart.sh", "texts.txt"], cwd=bare_clone, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env={**os.environ, "PYTHON": str(python)})
    assert process.stderr.readline() == "== 1/6 install into .venv ...\n"
    assert process.stderr.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and not stdout and "Traceback" not in stderr, stderr


@pytest.mark.parametrize("call, expected", [
    ("pairs_per_document 300", "20"), ("pairs_per_document 24000", "10"), ("pairs_per_document 200000", "1"),
    ("pairs_per_document 1000000", "1"),
    ("pair_batch_size 60000", "4096"), ("pair_batch_size 200", "20"), ("pair_batch_size 9", "0"),
    ("choose_settings 64; echo $POOLING $LENGTH $PAIR_EPOCHS $PAIR_LEARNING_RATE", "first_avg 64 2 2e-4"),
    ("choose_settings 65; echo $POOLING $LENGTH $PAIR_EPOCHS $PAIR_LEARNING_RATE", "first_avg 512 4 4e-3"),
    ("DEVICE=gpu; choose_settings 64; echo $POOLING $LENGTH $PAIR_EPOCHS $PAIR_LEARNING_RATE $MAX_BATCH_SIZE",
     "first_last_avg 64 1 1e-4 128"),
    ("DEVICE=gpu; choose_settings 65; echo $POOLING $LENGTH $PAIR_EPOCHS $PAIR_LEARNING_RATE $MAX_BATCH_SIZE",
     "first_last_avg 128 1 2e-4 128"),
    ("default_folder 'x/my papers.txt'", "quickstart/files/my papers"),
    ("default_folder .txt", "quickstart/files/texts")])
def test_settings_follow_the_file_and_the_device(call, expected):
    lines = f"set -eu; . scripts/own_texts.sh; DEVICE=cpu; choose_settings 65; {call}"
    ran = subprocess.run(["bash", "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == expected, ran.stderr


PLENTY = {"documents": 400, "whitening_texts": 500, "can_make_pairs": "yes"}
STUBS = """
train_encoder() {
    model=model_9
    case "$*" in *"--epochs 0"*) model=model_0 ;; esac
    case "$*" in *--whiten) model=${model}_whitened ;; esac
    mkdir -p "$1/$model"
    touch "$1/$model/model_state.pdparams"
}
make_document_pairs() { printf '%20s' | tr ' ' '\\n' >"$3"; }
"""


@pytest.mark.parametrize("sizes, changes, checkpoint, said", [
    ({}, "", "trained/model_9", ""),
    ({"whitening_texts": 499}, "", "whitened/model_0", "too few texts to whiten and to train on (499 documents"),
    ({"can_make_pairs": "no"}, "", "whitened/model_0_whitened", "every text is too short for a query to be taken"),
    ({}, "make_document_pairs() { echo 'a\tb' >$3; }", "whitened/model_0_whitened", "too few pairs to train on (1)")])
def test_what_the_texts_do_not_suffice_for_is_left_out(tmp_path, sizes, changes, checkpoint, said):
    """train.py and make_pairs.py are stubs."""
    ran = train_on_file(tmp_path, {**PLENTY, **sizes}, changes)
    assert (ran.returncode, ran.stdout) == (0, f"{checkpoint}\n"), ran.stderr
    assert said in ran.stderr


@pytest.mark.parametrize("step", ["whiten_encoder", "make_document_pairs", "train_on_pairs"])
@pytest.mark.parametrize("code", [2, 130])
def test_a_step_that_fails_ends_the_quickstart(tmp_path, step, code):
    """With its own exit code: 2 may be a full disk, which is no reason to go on without the step."""
    ran = train_on_file(tmp_path, PLENTY, f"{step}() {{ return {code}; }}")
    assert (ran.returncode, ran.stdout) == (code, ""), ran.stderr
    assert ran.stderr.splitlines()[-1].endswith("/6 ...")


def train_on_file(folder, sizes, changes):
    """Run the steps between reading the file and the index, with stubs, and print the checkpoint that they leave."""
    (folder / "sizes.txt").write_text("".join(f"{name}={value}\n" for name, value in sizes.items()))
    lines = [f"set -euo pipefail; . {ROOT}/scripts/own_texts.sh; DEVICE=cpu; choose_settings 65", STUBS, changes,
             "run_step 3/6 whiten_if_enough .", "run_step 4/6 make_pairs_if_possible .",
             "run_step 5/6 train_if_enough .", "last_checkpoint ."]
    ran = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True)
    ran.stdout = ran.stdout.replace("./", "")
    return ran


@pytest.mark.parametrize("text, query", [
    ("目的探讨，为临床提供参考意见。方法采用随机对照试验和回归分析。好", "方法采用随机对照试验和回归分析"),
    ("苹果", "苹果"), ("长" * 40, "长" * 30), ("word " * 40, ("word " * 30).strip())])
def test_a_query_taken_out_of_a_document_can_be_read_at_a_glance(text, query):
    assert sample_texts.choose_query(text) == query


def test_few_documents_are_whitened_on_with_their_clauses():
    assert sample_texts.choose_whitening_texts(["苹果，香蕉。 ", "苹果"]) == ["苹果，香蕉。 ", "苹果", "香蕉"]
    many = [f"第{row}篇，完" for row in range(1000)]
    assert sample_texts.choose_whitening_texts(many) == many


def test_queries_are_of_documents_all_over_the_corpus():
    texts = [f"第{row}篇" for row in range(9)]
    assert sample_texts.draw_queries(texts, 3) == ["第1篇", "第4篇", "第7篇"]
    assert sample_texts.draw_queries(texts[:1], 3) == ["第0篇"]


def test_the_checkpoint_is_the_best_or_that_of_the_newest_weights(bare_clone, tmp_path):
    """Whatever is removed from an older folder afterwards."""
    def run(**env):
        return subprocess.run(["sh", "-c", ". scripts/common.sh; params_path"], cwd=bare_clone, capture_output=True,
                              text=True, env={**os.environ, "SAVE_DIR": str(tmp_path / "ck"), **env})

    def newest():
        return run().stdout.strip()

    assert newest() == f"{tmp_path}/ck/model_20000/model_state.pdparams"
    for age, (name, kind) in enumerate((("model_9", "pdparams"), ("model_4", "safetensors"), ("model_10", "pdparams"))):
        folder = tmp_path / "ck" / name
        folder.mkdir(parents=True)
        (folder / "training_state.json").write_text("")
        (folder / f"model_state.{kind}").write_text("")
        os.utime(folder / f"model_state.{kind}", (1000 + age, 1000 + age))
        assert newest() == str(folder / f"model_state.{kind}")
    (tmp_path / "ck" / "model_9" / "training_state.json").unlink()
    assert newest().endswith("model_10/model_state.pdparams") and not run().stderr
    (tmp_path / "ck" / "model_best" / "model_state.graph").mkdir(parents=True)
    assert newest().endswith("model_10/model_state.pdparams"), "it has no weights"
    weights = tmp_path / "ck" / "model_best" / "model_state.pdparams"
    weights.write_text("")
    os.utime(weights, (1, 1))
    assert newest() == str(weights)
    assert run().stderr == (f"using {tmp_path}/ck/model_best, the checkpoint of the best evaluation; "
                            "set PARAMS_PATH to use another\n")
    named = run(PARAMS_PATH="model_4")
    assert named.stdout == "model_4\n" and not named.stderr
