"""What a file is by its first lines that is no lines of texts with tabs between columns, and the command that makes
such ones of it."""

import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from simcse.console import InputError, settings, some, warn_data
from simcse.files import STDIN

SAMPLE = 100  # lines by which the format is guessed
MOST = 0.9  # of these lines have to agree
MANY = 20  # lines that hardly agree by chance
LABELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# What columns are called that number the rows; the first is that of pandas' index.
NUMBERING = {"", "id", "_id", "idx", "index", "rank", "line", "qid", "pid", "docid", "doc_id", "query_id", "编号",
             "序号"}
# What columns are called: words of which all are known, so that a text is not taken for a name.
_WORD = ("(?:abstract|anchor|answer|author|body|category|class|comment|content|context|corpus|date|description|doc|"
         "src|tgt|docid|document|duplicate|gold|hard|hypothesis|id|idx|index|is|item|keyword|label|name|neg|negative|paragraph|"
         "passage|pid|pos|positive|premise|product|qid|query|question|rank|relevance|response|review|score|sent|sentence|"
         "sim|similarity|source|string|summary|tag|target|text|title|topic|type|url)s?")
_CHINESE = ("(?:相似|相关|标准|扩展|用户|原始|候选|目标|参考|商品|产品|新闻|论文|发布)?"
            "(?:问题|问句|问法|问|查询|答案|回答|标题|题目|文本|文档|文章|原文|正文|内容|摘要|句子|语句|描述|评论|名称|"
            "正例|负例|标签|编号|序号|关键词|类别|类型|分类|时间|日期|作者|来源|分数|得分|相似度)[\\dA-Ba-b一二]?")
HEADER = re.compile(rf"_?{_WORD}\d?(?:[ _.-](?:{_WORD}|[a-z])\d?)*|[qs][12]|{_CHINESE}", re.I)
OF_TEXTS = {name + end for end in ("", "s") for name in ("text", "content", "sentence", "question", "title", "document",
                                                        "passage", "abstract")} | {"query", "queries", "sent", "doc"}
IDS = (1, 2)  # numbers of columns of documents, whose ids may stand before them
COLUMNS = {(1,): "a text a line", IDS: "a text a line, or an id, a tab and a text",
           (2,): "two texts a line, a tab between them",
           (3,): "two texts and a number a line, tabs between them",
           (2, 3): "two texts a line, or two texts and a number, tabs between them",
           (1, 2, 3): "one, two or three texts a line, tabs between them"}
TAKES_TEXTS = {"--text_pair_file": "inference.py --input_file takes texts, one a line",
               "--test_set_file": "--train_set_file takes texts, one a line",
               "--similar_text_pair": "recall.py takes documents, one a line, by --corpus_file, and queries, from "
               "stdin, by --query -"}
DOCUMENTS = {"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer; git lfs pull puts the file in its place",
             "<!doctype html>": "a page of HTML", r"<\?xml version=.*\?>": "an XML document"}  # by their first line


class Table(NamedTuple):
    """The first rows of a file of another format."""

    what: str
    names: list[str]  # of the columns; without a header their numbers, from 1
    rows: list[list[str]]
    default: list[str]  # the columns that to_tsv.py takes by itself
    quoted: bool = False  # whether there are quotes around fields


def checked(lines: Iterator[tuple[int, str]], name: str, flag: str,
            columns: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines of a file, or of "stdin", whose first ones, unless --plain_text, are not those of
    another format. Of stdin, where each line is answered as it comes, that is said when it is seen, unless the first
    text shows it."""
    if settings.plain_text:
        return lines
    if name == "stdin":
        return _watched(lines, flag, columns)
    ahead = list(itertools.islice(lines, SAMPLE))
    refuse_other_formats([line for _, line in ahead if line.strip()], name, flag, columns)
    return itertools.chain(ahead, lines)


def _watched(lines: Iterator[tuple[int, str]], flag: str, columns: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    seen: list[str] = []
    for number, line in lines:
        if line.strip() and len(seen) < SAMPLE:
            seen.append(line)
            try:
                refuse_other_formats(seen if len(seen) in (1, 3, 5, MANY, SAMPLE) else [], "stdin", flag, columns)
            except InputError as error:
                if len(seen) == 1:
                    raise
                warn_data(f"{error}; the lines before it were taken as they are")
                seen *= SAMPLE  # it is said once
        yield number, line


def refuse_other_formats(lines: Sequence[str], path: str, flag: str, columns: tuple[int, ...]) -> None:
    """InputError where the first lines of a file, without blank ones, are those of JSON, of CSV, or of a table with a
    header or with numbers where texts are needed: what it is, what is needed, and the command that converts it.
    `columns`: the numbers of columns that are taken, of which (1, 2, 3) are training texts."""
    if not lines:
        return
    lines = [line.strip(" \r\n") for line in lines]
    tabs = sum("\t" in line for line in lines)
    where = f"{flag} {path}"
    needed = f"needed: {COLUMNS.get(columns, f'columns between tabs, one of {columns}')}"
    anyway = "--plain_text takes its lines as they are"
    parsed = list(map(_json, lines))
    if kind := document(lines, parsed):
        raise InputError(f"{where}: {named(kind, path)}; {needed}; {anyway}")
    delimiters = ",\t" if tabs <= (1 - MOST) * len(lines) else "\t"
    tables = itertools.chain([table_of_objects(parsed)], (table(lines, each, columns) for each in delimiters))
    if found := next(filter(None, tables), None):
        options = conversion(found, columns)
        remedy = (f"there are too few columns of texts in it: {some(found.names)}" if options is None
                  else f"{command(path, options)} converts it")
        raise InputError(f"{where}: {found.what}; {needed}; {remedy}; {anyway}")
    if not tabs and flag in TAKES_TEXTS and (path != "stdin" or len(lines) > 1):
        raise InputError(f"{where}: one column; {needed}; {TAKES_TEXTS[flag]}")
    enough = len(lines) == MANY if path == "stdin" else len(lines) >= MANY  # of stdin it is said once
    if 1 in columns and not tabs and enough and (odd := odd_in_each(lines)):
        warn_data(f"{where}: each of the first {len(lines)} lines {odd}: "
                 f"{command(path, ['--format', 'csv'])}")


def is_pipe(path: str) -> bool:
    """Whether a path is stdin or a pipe, which no command can read again."""
    return path == "stdin" or (os.path.exists(path) and not os.path.isfile(path))


def command(path: str, options: Sequence[str]) -> str:
    """The command that converts a file; of a pipe the part of it that does."""
    words = ["python", "scripts/to_tsv.py", "--input_file", STDIN if is_pipe(path) else path, *options]
    if not is_pipe(path):
        root, end = os.path.splitext(path)
        words += ["--output_file", f"{root}{'_converted' if end == '.tsv' else ''}.tsv"]
    return shlex.join(words)


def named(advice: str, path: str) -> str:
    """A piece of advice with the names of the file and of a new one for FILE and NEW; of a pipe as it is."""
    if is_pipe(path):
        return advice
    root, end = os.path.splitext(path)
    return advice.replace("FILE", shlex.quote(path)).replace("NEW", shlex.quote(f"{root}_utf8{end}"))


def conversion(found: Table, columns: tuple[int, ...]) -> list[str] | None:
    """The flags with which to_tsv.py makes so many columns of a table; None: it has too few."""
    values = dict(zip(found.names, zip(*found.rows)))
    taken = [name for name in found.names if not numbers_rows(name, values[name]) and any(values[name])]
    options = []
    if columns == IDS and taken:
        ids = [name for name in found.names if numbers_rows(name, values[name])
               and len(set(values[name])) == len(found.rows)]
        taken = [*ids[:1], max(taken, key=lambda name: sum(map(len, values[name])))]
    elif not numbers_third(columns):
        if len(taken) == 3 and all(value in LABELS for value in values[taken[2]]):
            options = ["--labels", "positives"]
        else:
            taken = [name for name in taken if not all(map(NUMBER.fullmatch, values[name]))] or taken
    if len(taken) < min(columns):
        return None
    if max(columns) == 1:
        options, taken = [], [max(taken, key=lambda name: sum(map(len, values[name])))]
    elif not options:
        taken = taken[: max(columns)]
    if len(found.names) == 1:  # commas and quotes may be those of the texts
        options = ["--format", "csv" if found.quoted else "tsv"] if found.quoted or any(
            "," in row[0] for row in found.rows) else []
    return [*(["--fields", *taken] if taken != found.default else []), *options]


def numbers_rows(name: str, values: Sequence[str]) -> bool:
    """Whether a column of this name, or number, does nothing but number the rows."""
    return name.rsplit(".", 1)[-1].lower() in NUMBERING or (name == "1" and counts_up(values))


def numbers_third(columns: tuple[int, ...]) -> bool:
    """Whether the third column is of numbers; of training files it is of texts."""
    return 3 in columns and 1 not in columns


def counts_up(values: Sequence[str]) -> bool:
    """Whether the values are n, n + 1 and so on, or many different whole numbers."""
    if len(values) < 3 or not all(map(str.isdecimal, values)):
        return False
    numbers = list(map(int, values))
    return numbers == list(range(numbers[0], numbers[0] + len(values))) or len(set(numbers)) == len(numbers) >= MANY


def names_columns(row: Sequence[str], name: re.Pattern = HEADER) -> bool:
    """Whether all fields of a row are what columns are called; the first may have no name, as pandas' index."""
    named = row if row[0] else row[1:]
    return 0 < len(named) == len(set(named)) and all(name.fullmatch(field.strip()) for field in named)


def document(lines: Sequence[str], parsed: Sequence[Any]) -> str | None:
    """What a file is whose lines, `parsed` by `_json`, are parts of a whole, as of one array or object, or arrays."""
    for first, kind in DOCUMENTS.items():
        if re.fullmatch(first, lines[0], re.I):
            return kind
    if len(lines) > 1 and all(line.startswith("__label__") for line in lines):
        return "fastText's labels before texts; sed -E 's/^(__label__[^ ]* *)+//' FILE > NEW takes them away"
    advice = "jq -c '.[]' FILE makes lines of an array, and python scripts/to_tsv.py columns of those"
    if lines[0] in ("[", "{", "[{") and len(lines) > 1 and re.match(r'[\[{"]', lines[1].lstrip()):
        return f"a JSON document; {advice}"
    whole = parsed[0] if len(lines) == 1 else None
    if (isinstance(whole, list) and len(whole) > 1 and all(isinstance(each, (str, dict)) for each in whole)) or (
            lines[0][:2] == "[{" and lines[-1][-1] in ",]" and all(
                isinstance(_json(line.lstrip("[ ").rstrip(",] ")), dict) for line in lines)):
        return f"a JSON array; {advice}"
    if "\\u" in lines[0] and all(re.fullmatch(r'"([^"\\]|\\.)*"', line) for line in lines):
        return "JSON strings, one a line; jq -r . FILE > NEW makes texts of them"
    if all(re.fullmatch(r"\{'[^']*': .*\}", line) for line in lines):
        return "dicts as Python prints them; json.dumps writes what scripts/to_tsv.py reads"
    arrays = [found for found in parsed if isinstance(found, list)]
    if len(lines) > 1 and len(arrays) >= MOST * len(lines) and all(
            len(array) > 1 and any(isinstance(each, str) for each in array)
            and all(isinstance(each, (str, int, float)) for each in array) for array in arrays):
        return "lines that are JSON arrays; jq -r '@tsv' FILE makes columns of them"
    return None


def _json(line: str) -> Any:
    """The array or object that a line is; None: it is neither."""
    try:
        return json.loads(line) if line[:1] in "[{" and line else None
    except (ValueError, RecursionError):
        return None


def leaves(found: dict) -> Iterator[tuple[str, Any]]:
    """What a JSON object has in its fields, in the members of lists, and, as a.b, in objects in them."""
    for key, value in found.items():
        for member in (value or [None]) if isinstance(value, list) else [value]:
            if isinstance(member, dict):
                yield from ((f"{key}.{name}", each) for name, each in member.items())
            else:
                yield key, member


def table_of_objects(parsed: Sequence[Any]) -> Table | None:
    """The table of JSON lines, by what they are as JSON."""
    objects = [found for found in parsed if isinstance(found, dict) and found]
    if len(objects) < max(1, MOST * len(parsed)):
        return None
    firsts = [dict(reversed(list(leaves(found)))) for found in objects]  # of a list the first member
    names = list(dict.fromkeys(path for found in objects for path, _ in leaves(found)))
    rows = [["" if first.get(name) is None else str(first[name]) for name in names] for first in firsts]
    what = "JSON objects, one a line"
    if names[:2] == ["query", "results.rank"]:
        what += ", as recall.py --format jsonl writes them"
    filled = [name for name, values in zip(names, zip(*rows)) if any(values) and not numbers_rows(name, values)]
    return Table(what, names, rows, filled)


def csv_rows(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The fields, in their quotes, of rows by the grammar of CSV (RFC 4180): quotes stand around whole fields, and are
    doubled within, where alone there are delimiters and line breaks. No rows where more than a few are no such ones."""
    field = rf'"[^"]*(?:""[^"]*)*"|[^"\n{delimiter}]*'
    whole, each = re.compile(rf"(?:{field})(?:{delimiter}(?:{field}))*"), re.compile(rf"(?:^|{delimiter})({field})")
    rows, record, odd = [], [], 0
    for line in lines:
        record.append(line)
        odd ^= line.count('"') % 2
        if not odd:
            text, record = "\n".join(record), []
            rows.append(each.findall(text) if whole.fullmatch(text) else [])
    good = list(filter(None, rows))
    return good if len(record) < len(lines) / 2 and len(good) >= MOST * len(rows) else []


def table(lines: Sequence[str], delimiter: str, columns: tuple[int, ...]) -> Table | None:
    """The table in columns between tabs, or between commas, that lines are known to be; None where they may be texts.
    What makes it known is a header, quotes as CSV has them, or a column of numbers; commas alone do where texts without
    tabs would be refused anyway."""
    rows = csv_rows(lines, delimiter)
    quotes = rows and '"' in "".join(lines)
    if delimiter == "\t":
        rows = rows or [line.split(delimiter) for line in lines]
    width, agree = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
    if not rows or agree < MOST * len(rows):
        return None
    rows = [row for row in rows if len(row) == width]
    if delimiter == "," and 2 * sum(any(field[:1] == " " for field in row) for row in rows) > len(rows):
        return None  # a blank after a comma is that of a sentence
    in_quotes = [field for row in rows for field in row if field[:1] == '"'] if quotes else []
    values = [[unquoted(field) for field in row] for row in rows] if quotes else rows
    header = has_header(values)
    needs_quotes = sum(delimiter in field or "\n" in field or '""' in field[1:-1] for field in in_quotes)
    if width == 1:  # `"""` is Python's as well
        doubled = any('""' in field[1:-1].strip('"') for field in in_quotes)
        sure = needs_quotes >= 3 and (names_columns(values[0]) or len(in_quotes) == len(rows) or doubled)
    else:  # of two rows `"Yes,indeed",she said` may be one
        sure = needs_quotes >= (1 if header or len(rows) >= 5 or delimiter == "\t" else 2) or (
            len(in_quotes) == width * len(rows) and len(rows) > 1)
    kind = {"\t": "TSV", ",": "CSV"}[delimiter]
    names = values[0] if header else [str(number) for number in range(1, width + 1)]
    if sure:
        what = f"{kind} with quotes around fields"
    elif header and (width > 1 or delimiter == "\t"):
        what = f"{kind} with a header, {', '.join(names)}" if width > 1 else f"its first line is a header, {names[0]}"
    elif width > 1 and (odd := odd_column(list(zip(*values)), columns, delimiter)):
        what = f"{kind} {odd}"
    elif width > 1 and delimiter == "," and min(columns) > 1:
        what = "CSV, with commas between columns"
    else:
        return None
    default = [name for name in names if not header or name.lower() not in NUMBERING]
    return Table(what, names, values[header:], default, bool(in_quotes))


def has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row, and no other, has names of columns; of one column a name of texts, no list of words."""
    if len(rows[0]) == 1:
        words = [re.fullmatch(r"\w+", row[0], re.ASCII) for row in rows]
        return len(rows) > 1 and rows[0][0] in OF_TEXTS and not any(words[1:])
    return len(rows) > 1 and names_columns(rows[0]) and not any(map(names_columns, rows[1:]))


def odd_in_each(lines: Sequence[str]) -> str | None:
    """What each line has that may make CSV of them, and may not: as many commas as the others, without a blank after
    one, or quotes around it."""
    if all(re.fullmatch('"[^"]+"', line) for line in lines):
        return "is in quotes; if they are none of the text"
    commas = {line.count(",") for line in lines}
    if len(commas) > 1 or commas == {0} or any(", " in line for line in lines):
        return None
    return f"has {(count := commas.pop())} comma{'s' * (count > 1)}; if that makes columns of it"


def unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if field[:1] == '"' else field


def odd_column(fields: Sequence[Sequence[str]], columns: tuple[int, ...], delimiter: str) -> str | None:
    """What is said of a column that numbers the rows, or has labels or scores where texts are needed. `fields`: of each
    column."""
    first, *_, last = fields
    numbers = [all(map(NUMBER.fullmatch, column)) for column in fields]
    if columns == IDS and len(fields) == 2:
        return f"with numbers in its last column ({some(list(dict.fromkeys(last)), 3)})" if numbers[-1] else None
    if counts_up(first) and not all(numbers) and (delimiter == "\t" or first[0] == "0" or len(first) >= MANY):
        return "with rows numbered by its first column"
    if delimiter == "\t" and numbers_third(columns):
        return None
    if numbers == [False, False, True] and (delimiter == "\t" or labels(last) or scores(last)):
        return f"with numbers in its third column ({some(list(dict.fromkeys(last)), 3)}): labels or scores of pairs"
    for place, column, number in (("first", first, numbers[0]), ("last", last, numbers[-1])):
        if number and len(column) >= 5 * len(set(column)) and (delimiter == "\t" or labels(column)):
            return f"with a few numbers in its {place} column ({some(list(dict.fromkeys(column)), 3)}): labels"
    return None


def labels(values: Sequence[str]) -> bool:
    """Whether numbers between commas are labels, 0 and 1 or a few small ones: those of `apples,red,3` are none."""
    different = set(values)
    return len(values) > 4 and different <= {str(label) for label in range(-1, 6)} and len(different) > 1 and (
        different <= set(LABELS) or len(values) >= 5 * len(different))


def scores(values: Sequence[str]) -> bool:
    """Whether numbers between commas are scores: decimal fractions from 0 to 1."""
    return len(values) >= MANY and all("." in value and 0 <= float(value) <= 1 for value in values)
