"""The Python code of the documentation, run as in a notebook that is in a folder of its own."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, succeed

LANGUAGES = [("docs/zh/python.md", "docs/en/python.md"), ("README.md", "README_en.md")]


def blocks(name):
    """The ```python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture(scope="module")
def notebook_folder(checkpoint, sample, tmp_path_factory):
    """A folder with the checkpoint and the index that the pages name, and nothing else."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model_20000").symlink_to(checkpoint)
    (folder / "my_model").mkdir()
    (folder / "my_model" / "model_0_whitened").symlink_to(checkpoint)
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--query", "语义", "--index_path", folder / "my_index")
    return folder


def run_blocks(name, folder):
    """Run the blocks of a page in one process and one namespace, but those that need a service."""
    program = "\n".join(block for block in blocks(name) if "from openai" not in block)
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300,
                          encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"})


@pytest.mark.parametrize("chinese, english", LANGUAGES)
def test_both_languages_have_the_same_code(chinese, english):
    """Comments may differ, which a syntax tree has none of."""
    assert blocks(english)
    for one, other in zip(blocks(chinese), blocks(english), strict=True):
        assert ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


def test_the_blocks_of_the_page(notebook_folder):
    ran = run_blocks("docs/en/python.md", notebook_folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("(2, 128) float32\n")
    titles = r"\d\.\d{3}  海岸带经济开发的问题与前景  海岸带经济开发中的问题和前景"
    assert re.search(f"^{titles}$", ran.stdout, re.M), "near-duplicates"
    assert len(re.findall(r"^[012] \d+ \S+$", ran.stdout, re.M)) == 3, "clusters"
    assert len(re.findall(r"^\d\.\d{3}  \d+  \S+$", ran.stdout, re.M)) == 3, "hits"
    assert ran.stdout.endswith("--index_path no_index: no such folder; build the index with recall.py --index_path "
                               "no_index\n")
    assert "using the index in my_index" in ran.stderr and "Traceback" not in ran.stderr
    assert (notebook_folder / "projector").is_dir()


def test_the_blocks_of_the_readme(notebook_folder):
    ran = run_blocks("README_en.md", notebook_folder)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 10
