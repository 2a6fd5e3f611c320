"""The pages: punctuation of the Chinese ones, and the flags and defaults that they name."""

import ast
import re
from collections import defaultdict

import pytest
from conftest import ROOT
from test_scripts import CHINESE, ENGLISH

NO_PROSE = re.compile(r"`[^`]+`|\]\([^)\s]*\)|https?://[^\s)]+|<[^>]+>")  # code, targets of links, addresses, tags
CODE = "\ue000"
# A mark of ASCII after or before a Chinese character, or code among them.
HALF_WIDTH = re.compile(rf"(?<=[\u4e00-\u9fff{CODE}])[,;:()]|[,;:()](?=[\u4e00-\u9fff])")


def half_width_marks(text):
    """Yield the number of a line and what surrounds each mark of ASCII that stands in Chinese prose."""
    in_block = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_block = not in_block
        elif not in_block:
            prose = NO_PROSE.sub(CODE, line)
            for mark in HALF_WIDTH.finditer(prose):
                yield number, prose[max(0, mark.start() - 10) : mark.end() + 10]


@pytest.mark.parametrize("page", CHINESE)
def test_punctuation_is_of_full_width(page):
    assert not list(half_width_marks((ROOT / page).read_text(encoding="utf-8")))


def test_marks_that_are_found():
    text = "中文,中文(`a`):\n```\n中文,\n```\nRecall@1, @5 (Gao et al. 2021) [链接](a,b.md) 1,000 条，`x`；`y`, z"
    assert [number for number, _ in half_width_marks(text)] == [1, 1, 1, 5]


# Flags of other programs that pages name: of paddle's launcher, hf, pytest and PaddleNLP's in_batch_negative.
FOREIGN_FLAGS = {"gpus", "nnodes", "master", "nproc_per_node", "backend", "log_dir", "log_level", "local-dir", "slow",
                 "evaluate", "use_gradient_cache", "chunk_numbers", "use_amp", "log_steps", "pad_to_max_seq_len",
                 "dist", "help", "version"}


def code_files():
    return [path for pattern in ("*.py", "simcse/**/*.py", "scripts/*", "deploy/**/*.py", "benchmarks/*.py")
            for path in ROOT.glob(pattern) if path.is_file()]


@pytest.fixture(scope="module")
def words_of_the_code():
    return set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in code_files())))


# A flag, and in brackets after it the default that the page gives: a number, or code.
DEFAULT = re.compile(r"`(--\w+)`[^`|\n]{0,40}?[（(](?:默认|default:?)\s*(\d[\d. ]*|`[^`]+`)[）)]")


@pytest.fixture(scope="module")
def defaults():
    """The defaults of each flag, as argparse's calls in the code write them; several scripts may have the flag."""
    found = defaultdict(set)
    for path in code_files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                for keyword in node.keywords:
                    if keyword.arg == "default" and isinstance(keyword.value, (ast.Constant, ast.List, ast.Tuple)):
                        value = ast.literal_eval(keyword.value)
                        several = value if isinstance(value, (list, tuple)) else [value]
                        found[node.args[0].value].add(" ".join(map(str, several)))
    return found


@pytest.mark.parametrize("language", [CHINESE, ENGLISH])
def test_defaults_that_pages_give_are_those_of_the_code(language, defaults):
    given = [(page, flag, value.strip("` ")) for page in language
             for flag, value in DEFAULT.findall((ROOT / page).read_text(encoding="utf-8"))]
    assert len(given) >= 6
    assert [entry for entry in given if entry[2] not in defaults[entry[1]]] == []


@pytest.mark.parametrize("page", CHINESE + ENGLISH)
def test_flags_that_a_page_names_exist(page, words_of_the_code):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {flag.rstrip("-_") for code in re.findall(r"`([^`\n]+)`", text)
             for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code)}
    assert named - words_of_the_code - FOREIGN_FLAGS == set()
