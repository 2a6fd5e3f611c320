"""The READMEs: their table of flags is that of train.py."""

import re

import train
from simcse import flags

import pytest
from conftest import ROOT

ROW = re.compile(r"\| `(--\w+)` \| (.+?) \| ")  # the flag and what the table says of its default


@pytest.fixture
def actions(monkeypatch):
    """The flags of train.py by name, as argparse has them."""
    parsers = []

    class Parser(flags.ArgumentParser):
        def parse_args(self, *_):
            parsers.append(self)
            raise SystemExit

    monkeypatch.setattr(flags, "ArgumentParser", Parser)
    with pytest.raises(SystemExit):
        train.parse_args()
    return parsers[0]._option_string_actions


@pytest.mark.parametrize("page", ["README.md", "README_en.md"])
def test_flags_and_defaults_are_those_of_train(page, actions):
    text = (ROOT / page).read_text(encoding="utf-8")
    chapter = re.search(r"^## 5\..+?^## 6\.", text, re.DOTALL | re.MULTILINE)[0]
    rows = ROW.findall(chapter)
    assert len(rows) > 15
    for flag, default in rows:
        action = actions[flag]
        if action.default is None:
            in_code = re.fullmatch("`(.+)`", default)
            assert in_code is None or f"(default: {in_code[1]})" in action.help, flag
        else:
            assert default == f"`{action.default}`", flag
