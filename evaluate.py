"""Recall@1/5/10/20/50 of a recall result; other measures, results side by side, and what went wrong.

    python evaluate.py --similar_text_pair recall/dev.csv --recall_result_file recall_result_dir/recall_result.txt
    python evaluate.py --recall_result_file before.txt after.txt --compare --metrics recall,mrr --plot recall.png
    python evaluate.py --show_errors 20
    python evaluate.py --qrels recall/qrels.tsv --recall_result_file run.txt --metrics recall,success,mrr,ndcg

A query counts as hit at k if any of its targets is among its first k documents: what others call success@k. By
judgements (--qrels), recall@k is the part of a query's relevant documents among its first k, and all measures are those
of trec_eval. Prints `recall@k=...` in percent and appends the figures, tab-separated, as a row to result.tsv. Needs
neither paddle nor paddlenlp.
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from simcse import console, flags
from simcse.files import new_file
from simcse.measures import (
    JUDGED_METRICS,
    METRICS,
    RECALL_KS,
    paired_bootstrap,
    per_query,
    percent,
    ranking,
    read_judgements,
    read_run,
)
from simcse.text import textfile

import numpy as np

PAIRS = "recall/dev.csv"
SHOWN = 3  # documents of a missed query that --show_errors lists
ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito 2008: told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
# After matplotlib's own, fonts with Chinese characters, of Linux, Windows and macOS.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
         "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
         "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS"]

Ranks = dict[str, dict[str, float]]  # of every query and each of its targets, from 0; infinite: none
Tops = dict[str, list[tuple[str, str]]]  # of a query the first documents and their scores


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--similar_text_pair", type=flags.readable_file, help="query and target, tab-separated, a pair a line; a query "
        f"may stand on several lines; None: {PAIRS}, unless there are --qrels")
    flags.add_targets_argument(parser)
    add("--qrels", type=flags.readable_file, help="judgements, instead of --similar_text_pair: query id, 0, document "
        "id, grade, as TREC has them, or BEIR, without the 0; the results are of recall.py --format trec then")
    add("--recall_result_file", type=flags.readable_file, nargs="+", default="./recall_result_dir/recall_result.txt",
        help="what recall.py wrote, tsv or jsonl, with ids for --targets id, or trec for --qrels; several files of the "
        "same queries are evaluated one after the other")
    add("--recall_num", type=flags.positive_int, default=50,
        help="documents looked at for each query; those below are ignored")
    add("--metrics", default="recall", help="what to print, separated by commas: "
        f"{', '.join(METRICS)}; with --qrels {', '.join(JUDGED_METRICS)}")
    add("--compare", action="store_true", help="print several files as a table, with each one's difference to the "
        "first and its paired bootstrap 95 %% interval")
    add("--plot", help="draw Recall@k of all files there, .png, .svg or .pdf; None: draw nothing")
    add("--show_errors", type=flags.positive_int,
        help="list so many of the queries whose first document is no target, the worst first; None: none")
    flags.add_data_arguments(parser)
    args = parser.parse_args()
    if not args.similar_text_pair and not args.qrels:
        try:
            args.similar_text_pair = flags.readable_file(PAIRS)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --similar_text_pair: {error}")
    if isinstance(args.recall_result_file, str):  # argparse checks a default only where it is no list
        args.recall_result_file = [args.recall_result_file]
    if args.compare and len(args.recall_result_file) < 2:
        parser.error("--compare needs at least two files after --recall_result_file")
    if args.show_errors and len(args.recall_result_file) > 1:
        parser.error("--show_errors takes one --recall_result_file")
    args.metrics = textfile.distinct(name.strip() for name in args.metrics.split(","))
    known = JUDGED_METRICS if args.qrels else METRICS
    for name in set(args.metrics) - set(known):
        parser.error(f"argument --metrics: {name!r} is not one of {', '.join(known)}")
    if args.qrels and (args.similar_text_pair or args.show_errors or args.targets == "id"):
        parser.error("--qrels takes the place of --similar_text_pair, without --targets and --show_errors")
    if args.plot and not args.plot.lower().endswith(ENDINGS):
        parser.error(f"argument --plot: {args.plot}: the name has to end in {', '.join(ENDINGS)}")
    if not os.path.isdir(folder := os.path.dirname(args.plot or "") or "."):
        parser.error(f"argument --plot: {folder}: no such folder")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"--plot: matplotlib {console.HOW_TO_INSTALL}")
    return args


def read_recalled(args: argparse.Namespace, path: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield query, target, document and score of a result of recall.py, tsv or jsonl; the target is the document, or
    its id. InputError: a line is neither, or there is no id."""
    with open(path, "rb") as file:
        is_jsonl = file.readline().lstrip().startswith(b'{"query"')
    if not is_jsonl:
        if args.targets == "id":
            raise console.InputError(f"--targets id: {path} has no ids; recall.py writes them with --format jsonl")
        for row in textfile.read_rows(path, 3, "--recall_result_file", check_format=False):
            query, document, score = row.fields
            yield query, document, document, score
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                for hit in found["results"]:
                    target = hit["id"] if args.targets == "id" else hit["document"]
                    yield found["query"], target, hit["document"], str(hit.get("cosine", hit.get("score")))
            except (ValueError, KeyError, TypeError) as error:
                missing = "the corpus had no ids" if error.args == ("id",) else "no line of recall.py --format jsonl"
                raise console.InputError(f"--recall_result_file {path}:{number}: {missing}") from None


def repeats(documents: Sequence[str], lines: int) -> int:
    """How often a result has the documents of a query of so many lines: recall.py writes them for each of its lines."""
    once = len(documents) // lines
    return lines if once and documents == documents[:once] * lines else 1


def read_result(args: argparse.Namespace, targets: Ranks, lines: Mapping[str, int], path: str) -> tuple[Ranks, Tops]:
    """The ranks that the targets have in the file, and, for --show_errors, the tops of the queries whose first document
    is no target. Says on stderr what makes the figures other than they seem."""
    ranks, tops = {query: dict(each) for query, each in targets.items()}, {}
    seen, unknown = dict.fromkeys(targets, 0), 0
    recalled: dict[str, list[str]] = {query: [] for query, count in lines.items() if count > 1}
    for query, target, document, score in read_recalled(args, path):
        if query not in targets:
            unknown += 1
            continue
        rank = seen[query]
        seen[query] += 1
        if query in recalled:
            recalled[query].append(target)
        # A document that stands there twice counts where it stands first; so does a query that recall.py wrote twice.
        if target in ranks[query]:
            ranks[query][target] = min(ranks[query][target], rank)
        missed = rank == 0 and target not in targets[query]
        if args.show_errors and (missed or (query in tops and rank < SHOWN)):
            tops.setdefault(query, []).append((document, score))
    if missing := [query for query, count in seen.items() if not count]:
        console.warn(f"{len(missing)} queries have no line in {path} and count as missed: "
                     + ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else ""))
    if unknown:
        console.warn(f"{unknown} lines of {path} belong to no query of {args.similar_text_pair}")
    depth = max((count // repeats(recalled.get(query, []), lines[query]) for query, count in seen.items()), default=0)
    if (depth := min(args.recall_num, depth)) < max(RECALL_KS):
        console.warn(f"only {depth} documents a query were looked at in {path}: recall@k is recall@{depth} for every "
                     "larger k")
    return ranks, tops


def compare(names: list[str], results: list[dict[str, np.ndarray]]) -> str:
    """A table of the results, and of each one's difference to the first in percentage points."""
    first, *others = (np.stack(list(values.values()), axis=1) for values in results)
    head = ["", *names]
    rows = [[measure, *(f"{percent(values[measure]):.3f}" for values in results)] for measure in results[0]]
    for name, other in zip(names[1:], others):
        head += [f"{name} - {names[0]}", "95 % interval  "]
        differences = 100 * (other - first)
        # Rounded before the sign is looked at, so that * agrees with what is printed; + 0.0 makes 0 of -0.
        figures = np.round([differences.mean(axis=0), *paired_bootstrap(differences)], 3) + 0.0
        for row, (mean, low, high) in zip(rows, figures.T):
            row += [f"{mean:+.3f}", f"{low:+8.3f} .. {high:+8.3f} {'*' if low > 0 or high < 0 else ' '}"]
    return (f"{table([head, *rows])}\n\n{len(first):,} queries, in percent. Interval: of the difference, by paired "
            "bootstrap (10,000 resamples of the queries, percentiles). *: it excludes 0.")


def errors(args: argparse.Namespace, ranks: Ranks, tops: Tops) -> str:
    """The --show_errors worst queries: those with no target in the file, then by the rank of the first, deepest first.
    Ranks are printed from 1."""
    missed = sorted((query for query, each in ranks.items() if min(each.values())),
                    key=lambda query: -min(ranks[query].values()))
    lines = [f"{len(missed)} of {len(ranks)} queries have another document than a target first"
             + (f"; the worst {args.show_errors}:" if args.show_errors < len(missed) else ":" if missed else "")]
    for query in missed[: args.show_errors]:
        lines += ["", f"query     {query}"]
        lines += [f"target    {target} ({'not in the file' if rank == math.inf else f'rank {rank + 1}'})"
                  for target, rank in ranks[query].items()]
        above = tops.get(query, [])[: min(SHOWN, *ranks[query].values())]
        lines += [f"recalled  {text} (rank {rank}, score {score})" for rank, (text, score) in enumerate(above, 1)]
    return "\n".join(lines)


def labels(paths: Sequence[str]) -> list[str]:
    """What tells the paths apart: each without the folders, and the name, that all have in common; of one its name.
    before/recall.txt and after/recall.txt are before and after. A path that is there again gets a number."""
    parts = [PurePath(os.path.normpath(path)).parts for path in paths]
    for _ in range(2):  # from the front and, turned round, from the back
        common = min(len(os.path.commonprefix(parts)), min(map(len, parts)) - 1)
        parts = [each[common:][::-1] for each in parts]
    names = ["/".join(each) for each in parts]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, earlier)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns, the first to the left, the others to the right; Chinese characters are two places wide."""
    def wide(text: str) -> int:
        return sum(unicodedata.east_asian_width(character) in "WF" for character in text)

    widths = [max(len(cell) + wide(cell) for cell in column) for column in zip(*rows)]
    aligned = [[f"{cell:{'>' if column else '<'}{widths[column] - wide(cell)}}" for column, cell in enumerate(row)]
               for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def draw_recall(path: str, results: Mapping[str, Sequence[float]], queries: int) -> None:
    """Draw Recall@k as bars, a group for every k and a colour for every result, to a file of one of the ENDINGS, which
    is complete or not at all. `results` are by label the means over `queries`, in percent, for every k of RECALL_KS."""
    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of fonts that are not installed
    places, width = np.arange(len(RECALL_KS)), 0.84 / len(results)
    columns = 2 if max(map(len, results)) <= 40 else 1  # of the legend
    with matplotlib.rc_context({
            "font.family": FONTS, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
            "axes.axisbelow": True, "axes.titlepad": 16}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        size = min(16, max(6.4, 1.6 + 2.2 * len(results))), 4.6 + 0.22 * -(-len(results) // columns)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(
            title=f"Recall@k of {queries:,} queries", xlabel="k", ylabel="queries with a target among the first k, %",
            ylim=(0, 100), xticks=places, xticklabels=RECALL_KS, yticks=range(0, 101, 20))
        axes.grid(axis="y", alpha=0.3)
        for number, recall in enumerate(results.values()):
            bars = axes.bar(places + (number - (len(results) - 1) / 2) * width, recall, 0.94 * width, label=str(number),
                            color=COLOURS[number % len(COLOURS)], hatch="/" * (3 * (number // len(COLOURS))))
            if len(results) <= 6:  # more would overlap
                axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False)
        for text, label in zip(legend.get_texts(), results):  # as it is: matplotlib leaves _x out and reads $x$ as TeX
            text.set(text=label, parse_math=False)
        with new_file(path, "wb") as file:
            figure.savefig(file, format=path.rsplit(".")[-1].lower(), dpi=150, bbox_inches="tight")


Measured = list[dict[str, np.ndarray]]  # of each result every figure, of every query


def by_targets(args: argparse.Namespace) -> tuple[int, Measured, str]:
    """How many queries --similar_text_pair has, the measures of each result, and what --show_errors lists."""
    targets: Ranks = {}  # recalled nowhere yet
    lines, measured, shown = Counter[str](), [], ""  # lines of each query
    for query, target in textfile.read_text_pairs(args.similar_text_pair, "--similar_text_pair"):
        targets.setdefault(query, {})[target] = math.inf
        lines[query] += 1
    for path in args.recall_result_file:
        ranks, tops = read_result(args, targets, lines, path)
        measured.append(per_query([each.values() for each in ranks.values()], args.measured, args.recall_num))
        shown = errors(args, ranks, tops) if args.show_errors else ""
    return len(targets), measured, shown


def by_judgements(args: argparse.Namespace) -> tuple[int, Measured, str]:
    """How many queries --qrels judges, and the measures of each result."""
    grades = {query: {document: grade for document, grade in each.items() if grade > 0}
              for query, each in read_judgements(args.qrels, "--qrels").items()}
    if not any(grades.values()):
        raise console.InputError(f"--qrels {args.qrels}: no document is judged to be relevant")
    measured = []
    for path in args.recall_result_file:
        run = read_run(path, "--recall_result_file")
        if missing := [query for query in grades if query not in run]:
            console.warn(f"{len(missing)} queries have no line in {path} and count as missed: "
                         f"{console.some(missing, 3)}")
        if unknown := len(run.keys() - grades.keys()):
            console.warn(f"{unknown} queries of {path} are not judged in {args.qrels}")
        values = {}
        for metric in args.measured:
            ranks = []
            for query, each in grades.items():
                places = {document: rank for rank, document in enumerate(ranking(run.get(query, {}), metric))}
                ranks.append([places.get(document, math.inf) for document in each])
            values.update(per_query(ranks, [metric], args.recall_num, [[*each.values()] for each in grades.values()],
                                    JUDGED_METRICS))
        measured.append(values)
    return len(grades), measured, ""


def main() -> None:
    args = parse_args()
    known, measure = (JUDGED_METRICS, by_judgements) if args.qrels else (METRICS, by_targets)
    args.measured = textfile.distinct(["recall", *args.metrics])
    queries, measured, shown = measure(args)
    names = labels(args.recall_result_file)
    recalls = [[percent(values[name]) for name in known["recall"]] for values in measured]
    results = [{name: values[name] for metric in args.metrics for name in known[metric]} for values in measured]
    if args.compare:
        print(compare(names, results))
    else:
        for number, (path, values) in enumerate(zip(args.recall_result_file, results)):
            if len(results) > 1:
                print("\n" * bool(number) + path)
            print("\n".join(f"{name}={percent(each)}" for name, each in values.items()))
    if shown:
        print("\n" + shown)
    with open("result.tsv", "a", encoding="utf-8") as file:
        file.writelines("\t".join(map(str, recall)) + "\n" for recall in recalls)
    if args.plot:
        draw_recall(args.plot, dict(zip(names, recalls)), queries)
        console.log(f"wrote {args.plot}")


if __name__ == "__main__":
    console.run(main)
