"""The Chinese pages: their punctuation."""

import re

import pytest
from conftest import ROOT
from test_scripts import CHINESE

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
