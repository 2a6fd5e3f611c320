"""The house as its imports stand: scripts -> model, data, ann_util -> simcse; deploy/python stands alone."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

NINE = {"model", "data", "ann_util", "train", "recall", "evaluate", "predict", "inference", "export_model"}
SHARED = {"model", "data", "ann_util"}
ROOMS = ("text", "encoder", "index", "training")  # of simcse, each above those before it
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
           for path in ROOT.glob("simcse/**/*.py") if path.stem != "__init__"}


def imported(path):
    """Return the modules that a file imports anywhere, functions included; of `from x import y` both x and x.y."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def tops(path):
    return {name.split(".")[0] for name in imported(path)}


def test_nine_scripts_at_the_top():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.removesuffix(".py") for name in listed if "/" not in name} == NINE


@pytest.mark.parametrize("path", sorted(ROOT.glob("simcse/**/*.py")), ids=lambda path: path.stem)
def test_nothing_in_simcse_imports_what_is_above(path):
    assert not tops(path) & (NINE | {"deploy", "scripts", "benchmarks", "tests"})


@pytest.mark.parametrize("name", sorted(NINE))
def test_scripts_import_downwards(name):
    allowed = SHARED - {name} if name not in SHARED else {"model": {"data"}, "data": set(), "ann_util": {"data"}}[name]
    assert not tops(ROOT / f"{name}.py") & (NINE | {"deploy", "scripts", "benchmarks", "tests"}) - allowed


def test_no_circle_in_simcse():
    """Modules in the order of their imports, each above what it imports; what functions import counts as well."""
    below = {name: imported(path) & MODULES.keys() for name, path in MODULES.items()}
    while below:
        lowest = {module for module, others in below.items() if not others & below.keys()}
        assert lowest, f"a circle among {sorted(below)}"
        below = {module: others for module, others in below.items() if module not in lowest}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rooms_import_downwards(name):
    """A room imports only rooms before it; what all rooms share imports none, except flags, which is above them."""
    room = name.split(".")[1] if name.count(".") == 2 else None
    if room:
        assert "simcse.flags" not in imported(MODULES[name]), "flags reads the rooms' tables, so it is above them"
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) if room else set(ROOMS) if name == "simcse.flags" else set()
    rooms = {module.split(".")[1] for module in imported(MODULES[name]) if module.startswith("simcse.")}
    assert not rooms & set(ROOMS) - allowed


@pytest.mark.parametrize("readme", ["README.md", "README_en.md"])
def test_the_readme_lists_every_file_of_simcse(readme):
    """Each on a line of its own in the tree, below its room."""
    tree = (ROOT / readme).read_text(encoding="utf-8").split("├── simcse/")[1].split("├── pretrained/")[0]
    listed = set()
    room = ""
    for name in re.findall(r"── (\S+)", tree):
        if name.endswith("/"):
            room = f"{name[:-1]}."
        elif f"simcse.{room}{name[:-3]}" not in MODULES:
            room = ""
        if name.endswith(".py"):
            listed.add(f"simcse.{room}{name[:-3]}")
    assert listed - {"simcse.__init__"} == MODULES.keys()


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/python/*.py")), ids=lambda path: path.name)
def test_deploy_python_imports_nothing_of_the_project(path):
    siblings = {each.stem for each in ROOT.glob("deploy/python/*.py")}
    assert not tops(path) & ((NINE | {"simcse", "deploy", "scripts", "benchmarks", "tests", "paddlenlp"}) - siblings)


@pytest.mark.parametrize("script", ["train.py", "recall.py", "evaluate.py", "predict.py", "inference.py",
                                    "export_model.py", "scripts/pretrain.py", "scripts/make_pairs.py",
                                    "scripts/mine_negatives.py", "scripts/sample_texts.py"])
def test_the_environment_is_set_before_numpy_and_paddle(script):
    """The project's modules come before third-party ones, and simcse is the first that any of them imports."""
    for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            if name.split(".")[0] in SHARED | {"simcse"}:
                return
            assert name.split(".")[0] not in ("numpy", "paddle", "paddlenlp"), script
    pytest.fail(f"{script} imports nothing of the project")
