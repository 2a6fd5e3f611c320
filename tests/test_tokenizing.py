"""Tokens and batches; nothing here needs paddle."""

import json

from deploy.python import encoder
from deploy.serving.shapes import BatchShapes, choose_shapes
from simcse import console, files
from simcse.text import tokens, wordpiece

import numpy as np
import pytest
from conftest import ENCODER, SHARED


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece.load_tokenizer(str(ENCODER))


def test_tokens_agree_with_the_original(tokenizer):
    path = SHARED / "compat" / "tokenization.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer([line["text"] for line in lines], 64)
    assert [line["text"] for line, got in zip(lines, ids) if got != line["input_ids"]] == []


def test_tokens_agree_with_paddlenlp(tokenizer, tmp_path):
    """On text that no file holds, and after a round trip through save_pretrained."""
    from paddlenlp.transformers import AutoTokenizer, ErnieTokenizer

    python = ErnieTokenizer(str(ENCODER / "vocab.txt"))
    texts = ["Ｆｕｌｌ　ｗｉｄｔｈ ①②", "naïve café ÅÉ", "a～b∶c≤d+e=f", "〇零一二 𠮷野家", "한국어 日本語カタカナ ﷺ",
             "e\u0301\u200b\u00ad", "x" * 300, "😀👍🏽", "", "   ", "[SEP] [CLS]", "1,234.5%", "Größe ΣΑΣ"]
    expected = [python(text, max_length=20, truncation=True)["input_ids"] for text in texts]
    assert tokenizer(texts, 20) == expected
    tokenizer.save_pretrained(str(tmp_path))
    assert wordpiece.load_tokenizer(str(tmp_path))(texts, 20) == expected
    reloaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(reloaded).__name__ == "ErnieTokenizer"
    assert reloaded("国有企业 SimCSE")["input_ids"] == python("国有企业 SimCSE")["input_ids"]


@pytest.mark.parametrize("name, content, message", [
    ("vocab.txt", b"", r"vocab.txt: not a vocabulary, .*: it lacks \[CLS\], \[SEP\], \[PAD\], \[UNK\]"),
    ("vocab.txt", b"[PAD]\n[CLS]\n[SEP]\n\xe8\xaf", "vocab.txt: not a vocabulary in UTF-8"),
    ("vocab.txt", b"[PAD]\n[CLS]\na\n[SEP]\na\n", "vocab.txt:5: the token 'a' is there twice, first in line 3"),
    ("tokenizer_config.json", b'{"tokenizer_class": "ErnieTokenizer", "do_lower_case": "x"}',
     'tokenizer_config.json: do_lower_case: expected true or false, got "x"'),
    ("tokenizer.json", '{"added_tokens": [{"content": "[CLS]"}, {"content": "新词"}]}'.encode(),
     "tokenizer.json adds tokens that vocab.txt lacks: 新词; append them to vocab.txt")])
def test_a_damaged_tokenizer_is_an_input_error(tokenizer, tmp_path, name, content, message):
    tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(console.InputError, match=message):
        wordpiece.load_tokenizer(str(tmp_path))


def test_a_tokenizer_json_without_a_vocabulary_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(console.InputError, match="; the folder has a tokenizer.json, .* and no vocab.txt$"):
        wordpiece.load_tokenizer(str(tmp_path))


def test_batches_cover_every_text_once(tokenizer):
    """Batches of like length, padded to the multiple, by count or by tokens."""
    texts = ["字" * (1 + 7 * i % 11) for i in range(23)]
    windows = [tokenizer(texts[start : start + 7], 9) for start in range(0, 23, 7)]
    for options, fits in (({"batch_size": 3}, lambda shape: shape[0] <= 3),
                          ({"batch_tokens": 24}, lambda shape: shape[0] * shape[1] <= 24),
                          ({"batch_tokens": 1}, lambda shape: shape[0] == 1)):
        for ids in windows:
            seen = {}
            for rows_, input_ids, token_type_ids in tokens.make_batches(ids, 0, **options):
                longest = max(len(ids[row]) for row in rows_)
                assert input_ids.dtype == token_type_ids.dtype == np.int64 and input_ids.shape == token_type_ids.shape
                assert fits(input_ids.shape) and not token_type_ids.any()
                assert input_ids.shape[1] == min(-(-longest // 4) * 4, max(map(len, ids)))
                seen.update({row: [i for i in line if i] for row, line in zip(rows_, input_ids.tolist())})
            assert [seen[row] for row in range(len(ids))] == ids


def test_prefetch_is_one_ahead_and_passes_errors_on():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise console.InputError("broken")

    ahead = files.prefetch(items())
    assert next(ahead) == 0
    assert next(ahead) == 1 and made[:2] == [0, 1]
    assert next(ahead) == 2
    with pytest.raises(console.InputError, match="broken"):
        next(ahead)


def test_cutting_before_tokenizing_changes_nothing(tokenizer):
    """What follows the last character that has room is left out, wherever words, marks and symbols lie."""
    texts = ["語" * 30, "abc def " * 20, "字a\u0301" * 20, "中文abc，" * 9, "a" * 40 + "字" * 20, "①≤x字" * 12]
    for room in (1, 2, 5, 10):
        assert tokenizer(texts, room + 2) == [[ids[0], *ids[1:-1][:room], ids[-1]] for ids in tokenizer(texts, 512)]


# Words, and what is none, of all scripts; what the tokenizer drops, splits at, or has [UNK] for.
PIECES = ["语", "義", "a" * 90, "b7" * 70, "word", "ЖЩй", "Größe", "ΣΑΣ", "หลักสูตรก็ดี", "العَرَبِيَّة", "한국어",
          "カタガ", "हिन्दी", "e\u0301\u0327", "\u0301" * 40, "\u200b", "\x00", "\x85", "\ufffd", "😀👍🏽",
          "①≤∶～", "。，", "[SEP]", "it's 3.14%", "\U0002b820", "𠮷", "µØŋ", "    ", "\u3000", "\t", " ", " ", " "]


def long_texts(seed):
    """Texts of some thousand characters, of few kinds of pieces each."""
    random = np.random.default_rng(seed)
    for count in random.integers(1, 6, 15):
        kinds = [PIECES[at] for at in random.integers(0, len(PIECES), count)]
        kinds += ["".join(map(chr, random.integers(1, 0xD800, 20)))] * (random.random() < 0.3)
        text = "".join(kinds[at] for at in random.integers(0, len(kinds), 20000))
        yield "语" * (random.random() < 0.2) + text[: random.integers(6000, 16000)]


@pytest.mark.parametrize("seed", range(2))
def test_the_beginning_of_a_long_text_has_its_tokens(tokenizer, seed, tmp_path):
    tokenizer.save_rust(str(tmp_path))
    deployed, texts = encoder.Tokenizer(str(tmp_path)), list(long_texts(seed))
    for length in (3, 20):
        tokenizer._rust.enable_truncation(length)
        whole = tokenizer._rust.encode_batch(texts)
        assert tokenizer(texts, length) == deployed(texts, length) == [encoding.ids for encoding in whole]
        assert [each.offsets for each in tokenizer.encode(texts, length)] == [
            encoding.offsets for encoding in whole]
    cut = [len(tokenizer._shorten_long_text(text, 1, keep_offsets=False)) < len(text) for text in texts]
    assert cut.count(True) > 5


def test_ids_of_many_texts_in_one_array():
    """Read as a list of lists; cut, and padded in any order; in blocks of characters as at once."""
    rows = [[1, 5, 6, 7, 2], [1, 2], [1, 9, 2]]
    ids = tokens.Tokens.of(rows)
    assert ids == rows and rows == ids and ids != rows[:2] and (len(ids), ids[-1], ids[1:]) == (3, [1, 9, 2], rows[1:])
    assert ids.truncate(3) == [[1, 5, 2], [1, 2], [1, 9, 2]] and ids.truncate(5) is ids and tokens.Tokens.of(ids) is ids
    assert ids.pad([2, 0], 0, 6).tolist() == [[1, 9, 2, 0, 0, 0], [1, 5, 6, 7, 2, 0]]
    assert tokens.Tokens.of([]) == []


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_characters_change_nothing(tokenizer, monkeypatch, block):
    texts = ["", "语义abc，检索", "  ", "x" * 150, "a\nb\r\nc", "", "e\u0301", "字" * 40, ""]
    expected = tokenizer(texts, 20)
    monkeypatch.setattr(tokenizer, "_BLOCK_CHARACTERS", block)
    assert tokenizer(texts, 20) == expected == [tokenizer([text], 20)[0] for text in texts] and tokenizer([], 20) == []


def test_pieces_that_are_known_are_forgotten_when_there_are_too_many(tokenizer, monkeypatch):
    texts = ["语义abc", "abc 检索", "x\u0301语\u0301", "a\x1cb", "一\u3000二\u2028三", "[SEP]", ""]
    expected = [tokenizer([text], 9)[0] for text in texts]
    monkeypatch.setattr(tokenizer, "_CACHED_WORDS", 2)
    for _ in range(3):
        assert tokenizer(texts, 9) == expected and [tokenizer([text], 9)[0] for text in texts] == expected
        assert len(tokenizer._word_ids) < 20


def test_a_tokenizer_that_does_not_split_han_characters_is_paddlenlps(tmp_path):
    (tmp_path / "vocab.txt").write_bytes((ENCODER / "vocab.txt").read_bytes())
    config = json.loads((ENCODER / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenize_chinese_chars": False}))
    assert wordpiece._read_wordpiece(str(tmp_path)) is None
    assert wordpiece._read_wordpiece(str(ENCODER)) is not None


@pytest.mark.parametrize("seed", range(5))
def test_fixed_batches_have_few_shapes_and_every_text_once(seed):
    rng = np.random.default_rng(seed)
    sizes, lengths = (1, 8, 32), [8, 16, 24, 60]
    ids = [list(rng.integers(1, 100, rng.integers(2, 61))) for _ in range(rng.integers(1, 150))]
    seen = {}
    for rows, input_ids, token_type_ids in BatchShapes(sizes, lengths).make_batches(ids, 0):
        assert input_ids.shape[0] in sizes and input_ids.shape[1] in lengths and not token_type_ids.any()
        assert 3 * len(rows) >= 2 * len(input_ids), "two thirds full"
        assert input_ids.shape[1] == min(each for each in lengths if each >= len(ids[rows[0]]))
        for row, padded in zip(rows, input_ids.tolist()):
            assert padded == ids[row] + [0] * (len(padded) - len(ids[row]))
            assert row not in seen
            seen[row] = True
    assert len(seen) == len(ids)


@pytest.mark.parametrize("weights, longest, shapes", [
    (0, 8, ([1, 2, 4, 8, 16], [8])), (0, 9, ([1, 2, 4, 8, 16], [8, 9])),
    (0, 64, ([1, 2, 4, 8, 16], [8, 12, 16, 24, 32, 48, 64])), (1 << 40, 60, ([1, 4, 16], [16, 32, 60])),
    (1 << 40, 9, ([1, 4, 16], [9])), (1 << 40, 513, ([1, 4, 16], [16, 32, 64, 128, 256, 512, 513]))])
def test_a_large_model_has_fewer_shapes(weights, longest, shapes):
    assert choose_shapes(weights, longest) == shapes
