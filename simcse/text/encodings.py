"""What a file is that is not UTF-8: no text at all by its first bytes, or another encoding by the part that fails."""

import codecs
import os
import re
from collections.abc import Callable, Sequence

from simcse.text.formats import MOST, command

BLOCK = 1 << 16  # bytes by which the encoding is guessed
CUT_OFF = "the file ends within a character: it was cut off; get it again, or remove its last line"
FEW, SURE = 8, 0.8  # bytes that are not ASCII and confidence below which no encoding is sure
MAGIC = {b"\x1f\x8b": "compressed by gzip: gunzip it", b"BZh91AY&SY": "compressed by bzip2: bunzip2 it",
         b"\xfd7zXZ\0": "compressed by xz: unxz it", b"\x28\xb5\x2f\xfd": "compressed by zstd: unzstd it",
         b"7z\xbc\xaf": "a 7z archive: unpack it", b"Rar!\x1a": "a rar archive: unpack it", b"%PDF-": "a PDF, no text",
         b"\xd0\xcf\x11\xe0": "an old workbook or document of Office: save it as CSV, UTF-8",
         b"PAR1\x15": "a Parquet file: pandas makes CSV of it (read_parquet, to_csv)",
         b"\x93NUMPY": "an array of numpy, no text"}
# Codecs that charset-normalizer may name: as people call them, and for iconv.
ENCODINGS = {"gb18030": ("GBK", "GB18030"), "big5": ("Big5", "BIG5"), "cp932": ("Shift-JIS", "CP932"),
             "euc_jp": ("EUC-JP", "EUC-JP"), "cp949": ("EUC-KR", "CP949"), "big5hkscs": ("Big5-HKSCS", "BIG5-HKSCS"),
             "cp1252": ("Windows-1252 (Latin)", "CP1252"), "cp1250": ("Windows-1250", "CP1250"),
             "cp1251": ("Windows-1251 (Cyrillic)", "CP1251"), "koi8_r": ("KOI8-R", "KOI8-R")}


def iconv(name: str) -> str:
    return f"convert it: iconv -f {name} -t UTF-8 FILE > NEW"


def known_bytes(head: bytes, convert: Callable[[str], str] = iconv) -> str | None:
    """What a file is by its first bytes, if it is no lines of text in an encoding without NUL bytes; `convert` says
    what to do with one in an encoding."""
    if head.startswith(b"PK\x03\x04"):
        return ("a workbook of Excel: save it as CSV, UTF-8; python scripts/to_tsv.py converts that" if b"xl/" in head
                else "a zip archive: unzip it")
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    # The BOM of UTF-32 begins with that of UTF-16 or with NUL bytes; of English in UTF-16 every second byte is one.
    bom = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return wide(head, convert) if bom or head.count(0) > len(head) / 4 else None


def wide(head: bytes, convert: Callable[[str], str] = iconv) -> str | None:
    """UTF-32 or UTF-16, with or without BOM; None: neither."""
    found = {}
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        try:
            text = codecs.getincrementaldecoder(name)().decode(head).removeprefix("\ufeff")
        except UnicodeDecodeError:
            continue
        plain = sum(character.isprintable() or character.isspace() for character in text)
        if text and plain >= MOST * len(text):
            found[name] = len(re.findall(r"[\0-\x7f\u3000-\u30ff\u4e00-\u9fff\uff00-\uff65]", text))
    if not found:
        return None
    # Hardly anything else is valid UTF-32; of UTF-16 that order of bytes is right which gives more common characters.
    name = next(iter(found)) if "UTF-32" in next(iter(found)) else max(found, key=found.get)
    marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    return f"it looks like {name[:6]}{'' if marked else ' without a BOM'}; {convert(name[:6] if marked else name)}"


def not_utf8(path: str, line: bytes, error: UnicodeDecodeError) -> str:
    """Why a line is not UTF-8, and what to do: by the whole file or, of stdin and pipes, by the line."""
    cut_off = error.reason == "unexpected end of data" and not line[: error.start].isascii()
    if not os.path.isfile(path):
        return CUT_OFF if cut_off else known_bytes(line) or guess([line])
    with open(path, "rb") as file:
        head = file.read(BLOCK)
        if found := known_bytes(head) or (wide(head) if b"\0" in head else None):
            return found
        file.seek(0)
        bad, size, lines, others, last = [], 0, 0, 0, b""
        for last in (line for chunk in file for line in chunk.splitlines()):
            lines += 1
            try:
                last.decode("utf-8")
                others += not last.isascii()
            except UnicodeDecodeError:
                bad.append((lines, last if size < BLOCK else b""))
                size += len(last)
    if not bad:  # it was changed meanwhile
        return guess([line])
    stray = stray_bytes(bad[0][1])
    if len(bad) == 1 and last is bad[0][1] and (cut_off or (error.reason == "unexpected end of data" and others)):
        return CUT_OFF
    if len(bad) == 1 and len(stray) == 1 and lines > 1:
        return f"a stray byte, 0x{stray.hex()}, in a file of UTF-8; correct this line"
    if others > len(bad):
        where = ", ".join(f"{path}:{row}" for row, _ in bad[:3])
        return (f"{len(bad)} of {lines} lines are in another encoding or damaged ({where}), the others are UTF-8; "
                f"correct them, or leave them out: {command(path, [])}")
    return guess([each for _, each in bad if each])


def stray_bytes(line: bytes) -> bytes:
    """The bytes of a line that are not UTF-8."""
    return bytes(ord(character) - 0xDC00 for character in line.decode("utf-8", "surrogateescape")
                 if "\udc80" <= character <= "\udcff")


def encodings(lines: Sequence[bytes]) -> dict[str, float]:
    """The codecs that fit lines of which none is UTF-8, the best first, each with the confidence, from 0 to 1, that
    charset-normalizer has in it; those that fit clearly less than the best are left out."""
    from charset_normalizer import from_bytes

    content = b"\n".join(lines)
    if not content or len(re.findall(rb"[\0-\x08\x0e-\x1b]", content)) > len(content) / 50:
        return {}
    among = list(ENCODINGS)
    found = from_bytes(content, cp_isolation=among) or from_bytes(content, cp_isolation=among, threshold=1 - SURE / 2)
    fits = sorted(found, key=lambda each: (each.chaos, -each.coherence, among.index(each.encoding)))
    return {each.encoding: 1 - each.chaos for each in fits
            if each.chaos < fits[0].chaos + 0.1 and each.coherence > fits[0].coherence - 0.1}


def guess(lines: Sequence[bytes]) -> str:
    """The encoding of lines of which none is UTF-8, and how to convert it; where several fit, which they are: a wrong
    one makes other characters of the text, without an error."""
    found = encodings(lines)
    if not found:
        return "it is damaged, or no text"
    said = [f"{ENCODINGS[codec][0]} ({sure:.0%})" for codec, sure in list(found.items())[:3]]
    name = ENCODINGS[next(iter(found))][1]
    if len(found) > 1 or max(found.values()) < SURE or len(re.findall(rb"[\x80-\xff]", b"".join(lines))) < FEW:
        return (f"charset-normalizer: it may be {' or '.join(said)}; look whether it reads well before you convert it: "
                f"iconv -f {name} -t UTF-8 FILE | head")
    return f"it looks like {said[0]} to charset-normalizer; {iconv(name)}"
