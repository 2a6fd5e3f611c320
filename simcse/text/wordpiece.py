"""Tokenize texts by WordPiece, with the tokenizers library, and load the tokenizer of an encoder or a checkpoint."""

import itertools
import json
import os
import re
import string
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from simcse.console import InputError, as_input_error, some, some_characters
from simcse.files import read_json, write_json
from simcse.hub_layout import find_encoder, is_hugging_face
from simcse.text.tokens import Ids, Tokens

import numpy as np

# Parts that a long text can lose without a change of its tokens: the end of a word that is [UNK] anyway, and blanks.
REDUNDANT = re.compile("([0-9A-Za-z]{101})[0-9A-Za-z]+|( ) +")
WORDPIECE_CLASSES = ("ErnieTokenizer", "BertTokenizer")  # the tokenizers of PaddleNLP that `WordPiece` replaces
HUGGING_FACE = "BertTokenizerFast"  # the tokenizer of Hugging Face's transformers that it replaces
BERT_LIKE = ("BertTokenizer", "DistilBertTokenizer", "ErnieTokenizer")  # transformers' tokenizers that are the same
SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
RUST = "PreTrainedTokenizerFast"  # what transformers calls any other tokenizer.json
WORD_CHARACTERS = 100  # of a word at most; a longer word is [UNK]
# BertPreTokenizer splits only at punctuation, PaddleNLP also at symbols and at some other code points. The last range
# are Chinese characters that a typo in the table of the tokenizers library leaves out.
SYMBOL = r"[\p{S}\x{AD}\x{B2}\x{B5}\x{BA}\x{D8}\x{14B}\x{1B1}\x{3007}\x{2B820}-\x{2B91F}]"
# Characters that are a token each: Chinese characters and common marks.
SINGLE_TOKENS = [*map(chr, range(0x4E00, 0xA000)), *string.punctuation, *"，。、；：？！“”‘’（）《》〈〉【】—…·～"]
PADDLE_PUNCTUATION = "～"  # which is a symbol to transformers, and part of a word
BLANKS = " \t\r\n"
# In the table of all characters: a part of a word, or a blank. Other values are token ids, >= 0.
IN_WORD, IS_BLANK = -1, -2
CODE_POINTS = 0x110000


class WordPiece:
    """Tokenize by BERT WordPiece, with the same tokens as PaddleNLP's tokenizers, or transformers' BertTokenizerFast.

    One difference is intended: "[SEP]" in a text is text.

    Many texts are tokenized together, as an array of their characters. A table gives the id of every character that is
    a token by itself. The tokenizers library tokenizes the words between them, each different word once: a corpus has
    few different ones, and their ids are cached.

    Args:
        vocab: token -> id.
        lowercase: make texts lower case, and strip accents.
        kind: the name of the class that it replaces: one of WORDPIECE_CLASSES, or HUGGING_FACE.

    Attributes:
        cls, sep, pad_token_id, unk_token_id: ids of special tokens.
        wordless: ids of tokens without a letter or digit, and of [UNK].
    """

    _CACHED_WORDS = 1 << 18  # words whose ids are cached at most
    _BLOCK_CHARACTERS = 1 << 16  # characters that are tokenized at a time

    def __init__(self, vocab: dict[str, int], lowercase: bool = True, kind: str = "ErnieTokenizer") -> None:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

        self.vocab = vocab
        self.lowercase = lowercase
        self.kind = kind
        self.cls = vocab["[CLS]"]
        self.sep = vocab["[SEP]"]
        self.pad_token_id = vocab["[PAD]"]
        self.unk_token_id = vocab.get("[UNK]")
        self.wordless = find_wordless(vocab, self.unk_token_id)

        self._rust = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=WORD_CHARACTERS))
        self._rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self._rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if kind != HUGGING_FACE:
            self._rust.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(SYMBOL), "isolated")])
        self._rust.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", self.cls), ("[SEP]", self.sep)])

        self._word_ids: dict[str, Ids] = {}
        self._lock = threading.Lock()  # evaluation runs while a thread makes batches
        # int32 [code points]: the id of a character that is a token by itself, IN_WORD or IS_BLANK
        self._table = np.full(CODE_POINTS, IN_WORD, "int32")
        for character in SINGLE_TOKENS:
            if kind == HUGGING_FACE and character in PADDLE_PUNCTUATION:
                continue
            self._table[ord(character)] = vocab.get(character, vocab.get("[UNK]", IN_WORD))
        for character in BLANKS:
            self._table[ord(character)] = IS_BLANK

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> Tokens:
        """Return the token ids of each text, [CLS] and [SEP] included, truncated to `max_seq_length`."""
        with self._lock:
            beginnings = self._shorten_texts(texts, max_seq_length)
            self._rust.no_truncation()
            all_flat, all_lengths = [np.empty(0, "int32")], [np.empty(0, "int64")]
            for block in _blocks(beginnings, self._BLOCK_CHARACTERS):
                tokens = self._tokenize_block(block)
                all_flat.append(tokens.flat)
                all_lengths.append(tokens.lengths)
        return Tokens(np.concatenate(all_flat), np.concatenate(all_lengths)).truncate(max_seq_length)

    def _tokenize_block(self, texts: Sequence[str]) -> Tokens:
        """Return the token ids of some texts.

        The texts are joined, each between two line feeds, which are no part of a word. `ids` has a number for each
        character: its id, IN_WORD or IS_BLANK. [CLS] and [SEP] take the places of the line feeds. Then each character
        is repeated as often as it has tokens: once if it is one, not at all if it is a blank, and the first character
        of a word as often as the word has tokens, the others not at all.
        """
        lengths = np.fromiter(map(len, texts), "int64") + 2
        ends = np.cumsum(lengths)
        starts = ends - lengths
        joined = "\n" + "\n\n".join(texts) + "\n"
        characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "uint32")
        ids = self._table[characters]
        in_word = ids == IN_WORD
        ids[starts] = self.cls
        ids[ends - 1] = self.sep

        changes = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1  # beginnings and ends of words in turn
        words = [joined[start:end] for start, end in changes.reshape(-1, 2).tolist()]
        ids_of_words = self._tokenize_words(words)
        counts = (ids >= 0).astype("int64")  # tokens of each character
        counts[changes[::2]] = np.fromiter(map(len, ids_of_words), "int64", len(words))
        flat = np.repeat(ids, counts)
        flat[flat == IN_WORD] = np.fromiter(itertools.chain.from_iterable(ids_of_words), "int32")
        return Tokens(flat, np.add.reduceat(counts, starts))

    def _tokenize_words(self, words: Sequence[str]) -> list[Ids]:
        """Return the ids of each word, [CLS] and [SEP] excluded."""
        if len(self._word_ids) > self._CACHED_WORDS:
            self._word_ids = {}
        new = list(set(words).difference(self._word_ids))
        if new:
            for word, encoding in zip(new, self._rust.encode_batch_fast(new)):
                self._word_ids[word] = encoding.ids[1:-1]
        return [self._word_ids[word] for word in words]

    def encode(self, texts: Sequence[str], max_seq_length: int) -> list:
        """Return the tokenizers library's encoding of each text: ids, and where in the text each token stands."""
        with self._lock:
            beginnings = self._shorten_texts(texts, max_seq_length, keep_offsets=True)
            return self._rust.encode_batch(beginnings)

    def _shorten_texts(self, texts: Sequence[str], max_seq_length: int, *, keep_offsets: bool = False) -> list[str]:
        """Set the tokenizer's truncation; return of each text a beginning that has the same first tokens.

        So less is tokenized than with whole texts.

        Args:
            texts: of any length.
            max_seq_length: how many first tokens are needed, [CLS] and [SEP] included.
            keep_offsets: remove nothing within a text, so that tokens have the same offsets as in the whole text.
        """
        self._rust.enable_truncation(max_seq_length)
        room = max_seq_length - 2
        # A Chinese character is a token and ends the word before it: nothing after the first `room` of them is needed.
        enough = re.compile(f"(?:[^\u4e00-\u9fff]*[\u4e00-\u9fff]){{{room}}}")
        beginnings = []
        for text in texts:
            if len(text) > room:
                text = self._shorten_long_text(text, room, keep_offsets=keep_offsets)
                match = enough.match(text)
                if match:
                    text = match[0]
            beginnings.append(text)
        return beginnings

    def _shorten_long_text(self, text: str, room: int, *, keep_offsets: bool) -> str:
        """Return a text, or of a very long one a beginning with the same first `room` tokens.

        A word has at most WORD_CHARACTERS tokens; a longer one is a single [UNK]. So if a beginning has WORD_CHARACTERS
        tokens more than `room`, the word that is cut at its end comes after the tokens that are needed.
        """
        size = 16 * (room + WORD_CHARACTERS)
        if len(text) <= 4 * size:
            return text
        if not keep_offsets:
            text = REDUNDANT.sub(r"\1\2", text)
        while size < len(text):
            encoding, = self._rust.encode_batch_fast([text[:size]])
            if room * len(encoding.overflowing) >= room + WORD_CHARACTERS:  # each overflowing part has `room` tokens
                return text[:size]
            size *= 4
        return text

    def save_rust(self, folder: str) -> None:
        """Write tokenizer.json, from which the tokenizers library loads a tokenizer with the same ids."""
        self._rust.no_truncation()
        self._rust.save(os.path.join(folder, "tokenizer.json"), pretty=False)

    def save_pretrained(self, folder: str) -> None:
        """Write vocab.txt and tokenizer_config.json, which PaddleNLP's AutoTokenizer reads."""
        with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as file:
            file.writelines(token + "\n" for token in sorted(self.vocab, key=self.vocab.get))
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
        with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
            json.dump({"do_lower_case": self.lowercase, **names, "tokenizer_class": self.kind}, file)


def find_wordless(vocab: dict[str, int], unk_token_id: int | None) -> set[int | None]:
    """Return the ids of the unknown token and of the tokens without a letter or digit.

    Args:
        vocab: token -> id.
    """
    wordless = {unk_token_id}
    for token, number in vocab.items():
        if not any(character.isalnum() for character in token):
            wordless.add(number)
    return wordless


def _blocks(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield texts in blocks of about `size` characters."""
    start = characters = 0
    for row, text in enumerate(texts):
        characters += len(text)
        if characters >= size:
            yield texts[start : row + 1]
            start = row + 1
            characters = 0
    if start < len(texts):
        yield texts[start:]


class PaddleTokenizer:
    """Give any other tokenizer of PaddleNLP the interface of `WordPiece`; it is slower."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.pad_token_id = tokenizer.pad_token_id
        self.unk_token_id = tokenizer.unk_token_id
        self.wordless = {tokenizer.unk_token_id}

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> Tokens:
        """Return the token ids of each text, special tokens included, truncated to `max_seq_length`."""
        encoded = self._tokenizer(list(texts), max_length=max_seq_length, truncation=True,
                                  return_token_type_ids=False, return_attention_mask=False)
        return Tokens.of(encoded["input_ids"])

    def save_pretrained(self, folder: str) -> None:
        """Write the tokenizer's files as PaddleNLP does."""
        self._tokenizer.save_pretrained(folder)


class RustTokenizer:
    """Give any tokenizer.json of Hugging Face the interface of `WordPiece`.

    Args:
        path: of tokenizer.json.
        pad_token, unk_token: special tokens in it.

    Raises:
        InputError: the file is damaged, or lacks these tokens.
    """

    def __init__(self, path: str, pad_token: str, unk_token: str) -> None:
        from tokenizers import Tokenizer

        with as_input_error(f"{path}: not a tokenizer", Exception):  # tokenizers raises nothing narrower
            self._rust = Tokenizer.from_file(path)
        self._rust.no_padding()
        self._tokens = {"pad_token": pad_token, "unk_token": unk_token}
        for name, token in self._tokens.items():
            if not isinstance(token, str) or self._rust.token_to_id(token) is None:
                raise InputError(f"{path}: has no token {token!r}; name its {name} in tokenizer_config.json")
        self.pad_token_id = self._rust.token_to_id(pad_token)
        self.unk_token_id = self._rust.token_to_id(unk_token)
        self.wordless = find_wordless(self._rust.get_vocab(), self.unk_token_id)
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> Tokens:
        """Return the token ids of each text, special tokens included, truncated to `max_seq_length`."""
        with self._lock:
            self._rust.enable_truncation(max_seq_length)
            return Tokens.of([encoding.ids for encoding in self._rust.encode_batch_fast(list(texts))])

    def save_pretrained(self, folder: str) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        with self._lock:
            self._rust.no_truncation()
            self._rust.save(os.path.join(folder, "tokenizer.json"), pretty=False)
        write_json(os.path.join(folder, "tokenizer_config.json"), {"tokenizer_class": RUST, **self._tokens})


def load_tokenizer(name_or_path: str) -> WordPiece | RustTokenizer | PaddleTokenizer:
    """Load the tokenizer of an encoder or of a checkpoint, by hub name or by folder.

    A folder with a vocab.txt is read without importing paddlenlp, which takes seconds.

    Raises:
        InputError: there is no tokenizer.
    """
    name_or_path = find_encoder(name_or_path)
    tokenizer_class = read_json(os.path.join(name_or_path, "tokenizer_config.json")).get("tokenizer_class")
    if is_hugging_face(name_or_path) or tokenizer_class in (HUGGING_FACE, RUST):
        return _read_hugging_face(name_or_path)
    tokenizer = _read_wordpiece(name_or_path)
    if tokenizer:
        return tokenizer
    from paddlenlp.transformers import AutoTokenizer

    # paddlenlp raises OSError, ValueError, KeyError or errors of its own; IndexError for a class that it does not have.
    names = os.listdir(name_or_path) if os.path.isdir(name_or_path) else []
    remedy = ""
    if "tokenizer.json" in names and "vocab.txt" not in names:
        remedy = "; the folder has a tokenizer.json, which PaddleNLP may not read, and no vocab.txt"
    unknown_class = (f"no tokenizer in {name_or_path}: PaddleNLP does not have the tokenizer_class that "
                     "tokenizer_config.json names; write BertTokenizer there if it is BertTokenizerFast")
    with as_input_error(unknown_class, IndexError), as_input_error(
            f"no tokenizer in {name_or_path}", OSError, ValueError, KeyError, TypeError, AttributeError, remedy=remedy):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)  # nosec B615  the user names what is fetched
    kind = type(tokenizer).__name__
    if kind in WORDPIECE_CLASSES:
        return WordPiece(dict(tokenizer.vocab.token_to_idx), tokenizer.do_lower_case, kind)
    return PaddleTokenizer(tokenizer)


def _read_hugging_face(folder: str) -> WordPiece | RustTokenizer:
    """Return the tokenizer of a folder in the layout of Hugging Face, or of a checkpoint of such an encoder."""
    config = read_json(os.path.join(folder, "tokenizer_config.json"))
    path = os.path.join(folder, "tokenizer.json")
    rust = read_json(path)
    vocabulary = os.path.join(folder, "vocab.txt")
    if rust and (config.get("tokenizer_class") == RUST or not _is_bert(rust, config)):
        return RustTokenizer(path, *_special_tokens(folder, config))
    if rust:
        vocab = rust["model"]["vocab"]
    elif os.path.isfile(vocabulary):
        vocab = _read_vocabulary(vocabulary)
        _check_like_bert(folder, config, vocab)
    else:
        raise InputError(f"no tokenizer in {folder}: it has neither vocab.txt nor tokenizer.json")
    lowercase = config.get("do_lower_case", True)  # where a class is named, transformers does not ask tokenizer.json
    if rust and "tokenizer_class" not in config:
        lowercase = rust["normalizer"]["lowercase"]
    _check_lowercase(folder, lowercase)
    return WordPiece(vocab, lowercase, HUGGING_FACE)


def _is_bert(rust: dict[str, Any], config: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json, and the tokenizer_config.json beside it, are of a tokenizer as `WordPiece`."""
    try:
        model, normalizer = rust["model"], rust["normalizer"]
        is_wordpiece = (model["type"] == "WordPiece" and model["continuing_subword_prefix"] == "##"
                        and set(SPECIAL_TOKENS) - {"[MASK]"} <= model["vocab"].keys())
        is_normalized_so = (normalizer["type"] == "BertNormalizer" and normalizer["clean_text"]
                            and normalizer["handle_chinese_chars"] and normalizer["strip_accents"] is None)
        added_tokens = {token["content"] for token in rust.get("added_tokens") or []}
        return (is_wordpiece and is_normalized_so and rust["pre_tokenizer"]["type"] == "BertPreTokenizer"
                and added_tokens <= set(SPECIAL_TOKENS) and not _differences_from_bert(config))
    except (KeyError, TypeError, AttributeError):
        return False


def _differences_from_bert(config: dict[str, Any]) -> list[str]:
    """Return the settings of a tokenizer_config.json that `WordPiece` cannot have."""
    differences = []
    if config.get("strip_accents") is not None:
        differences.append("strip_accents")
    if config.get("tokenize_chinese_chars", True) is not True:
        differences.append("tokenize_chinese_chars")
    if config.get("tokenizer_class", HUGGING_FACE).removesuffix("Fast") not in BERT_LIKE:
        differences.append("tokenizer_class")
    return differences


def _check_like_bert(folder: str, config: dict[str, Any], vocab: dict[str, int]) -> None:
    """Raise InputError if a folder with vocab.txt alone is of a tokenizer that `WordPiece` is not."""
    remedy = "; write a tokenizer.json: AutoTokenizer.from_pretrained(old).save_pretrained(new) of transformers"
    for name in _differences_from_bert(config):
        raise InputError(f"{folder}: tokenizer_config.json has {name} {config[name]!r}{remedy}")
    with as_input_error(f"{folder}: tokenizer_config.json", TypeError, KeyError, AttributeError):
        added = [token["content"] for token in (config.get("added_tokens_decoder") or {}).values()]
    added += read_json(os.path.join(folder, "added_tokens.json"))
    missing = [token for token in added if token not in vocab]
    if missing:
        raise InputError(f"{folder} has added tokens that vocab.txt lacks: {some(missing)}{remedy}")


def _special_tokens(folder: str, config: dict[str, Any]) -> tuple[str, str]:
    """Return the padding and the unknown token that the files beside a tokenizer.json name."""
    named = {**read_json(os.path.join(folder, "special_tokens_map.json")), **config}
    tokens = []
    for name, default in (("pad_token", "[PAD]"), ("unk_token", "[UNK]")):
        token = named.get(name) or default
        tokens.append(token["content"] if isinstance(token, dict) and "content" in token else token)
    return tokens[0], tokens[1]


def _check_lowercase(folder: str, lowercase: Any) -> None:
    if not isinstance(lowercase, bool):
        raise InputError(f"{os.path.join(folder, 'tokenizer_config.json')}: do_lower_case: expected true or false, "
                         f"got {some_characters(json.dumps(lowercase))}")


def _read_wordpiece(folder: str) -> WordPiece | None:
    """Return the WordPiece tokenizer in a folder; None: the folder has none, or another kind of tokenizer."""
    vocabulary = os.path.join(folder, "vocab.txt")
    config = read_json(os.path.join(folder, "tokenizer_config.json"))
    kind = config.get("tokenizer_class")
    if (not os.path.isfile(vocabulary) or kind not in WORDPIECE_CLASSES or config.get("added_tokens_decoder")
            or config.get("tokenize_chinese_chars") is False):
        return None
    vocab = _read_vocabulary(vocabulary)
    _check_added_tokens(folder, vocab)
    lowercase = config.get("do_lower_case", True)
    _check_lowercase(folder, lowercase)
    return WordPiece(vocab, lowercase, kind)


def _read_vocabulary(path: str) -> dict[str, int]:
    """Return the ids of the tokens in a vocab.txt."""
    with (as_input_error(f"{path}: not a vocabulary in UTF-8", UnicodeDecodeError),
          open(path, encoding="utf-8", newline="\n") as file):
        vocab: dict[str, int] = {}
        for number, line in enumerate(file):
            token = line.rstrip("\r\n")
            if token in vocab:
                raise InputError(f"{path}:{number + 1}: the token {token!r} is there twice, first in line "
                                 f"{vocab[token] + 1}; a saved checkpoint would count the tokens after it otherwise")
            vocab[token] = number
    missing = [token for token in SPECIAL_TOKENS[:4] if token not in vocab]
    if missing:
        raise InputError(f"{path}: not a vocabulary, a token a line: it lacks {', '.join(missing)}")
    return vocab


def _check_added_tokens(folder: str, vocab: dict[str, int]) -> None:
    """Raise InputError where tokenizer.json adds tokens that vocab.txt lacks; their texts would lose them."""
    path = os.path.join(folder, "tokenizer.json")
    added = read_json(path).get("added_tokens") or []
    with as_input_error(f"{path}: added_tokens", TypeError, KeyError):
        missing = [token["content"] for token in added if token["content"] not in vocab]
    if missing:
        raise InputError(f"{path} adds tokens that vocab.txt lacks: {some(missing)}; append them to vocab.txt, in the "
                         "order of their ids")


def find_unknown(tokenizer: WordPiece | RustTokenizer | PaddleTokenizer, ids: Sequence[Ids],
                 prefix_tokens: np.ndarray | int = 0) -> list[int]:
    """Return the rows of the texts without a known word: texts without tokens, or of [UNK] and punctuation only.

    The encoder cannot tell such texts apart: each would match every other one perfectly.

    Args:
        ids: the token ids of each text.
        prefix_tokens: how many of them, after [CLS], are a prefix, which is no part of the text; int64 [texts] or one
            number for all.
    """
    ids = Tokens.of(ids)
    if not len(ids):
        return []
    is_word = ~np.isin(ids.flat, list(tokenizer.wordless))
    is_word[ids.starts] = False  # [CLS]
    is_word[ids.ends - 1] = False  # [SEP]
    first_of_text = 1 + np.broadcast_to(prefix_tokens, len(ids))  # [CLS] and the prefix left out
    if np.any(prefix_tokens):
        places = np.arange(len(ids.flat)) - np.repeat(ids.starts, ids.lengths)  # of each token in its text
        is_word[places < np.repeat(first_of_text, ids.lengths)] = False
    has_word = np.logical_or.reduceat(is_word, ids.starts)
    unknown = []
    for row in np.flatnonzero(~has_word).tolist():
        tokens = ids[row][first_of_text[row] : -1]
        if not tokens or tokenizer.unk_token_id in tokens:
            unknown.append(row)
    return unknown
