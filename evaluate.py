"""Recall@1/5/10/20/50 of a recall result; other metrics, results side by side, and the worst queries.

    python evaluate.py --similar_text_pair recall/dev.csv --recall_result_file recall_result_dir/recall_result.txt
    python evaluate.py --recall_result_file before.txt after.txt --compare --metrics recall,mrr --plot recall.png
    python evaluate.py --show_errors 20
    python evaluate.py --qrels recall/qrels.tsv --recall_result_file run.txt --metrics recall,success,mrr,ndcg

A query counts as hit at k if any of its targets is among its first k documents: what others call success@k. By
judgements (--qrels), recall@k is the fraction of a query's relevant documents among its first k, and all metrics are
those of trec_eval. Prints `recall@k=...` in percent, and appends recall@k, tab-separated, as a row to result.tsv,
whatever --metrics says. Needs neither paddle nor paddlenlp.
"""

import argparse
import codecs
import importlib.util
import json
import logging
import math
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NamedTuple

from simcse import console, flags
from simcse.files import check_not_input, check_writable, new_file
from simcse.measures import (
    JUDGED_METRICS,
    METRICS,
    RECALL_KS,
    Formula,
    mean_percent,
    measure_queries,
    paired_bootstrap,
    rank_documents,
    read_judgements,
    read_run,
)
from simcse.text import textfile
from simcse.text.lines import read_lines

import numpy as np

PAIRS = "recall/dev.csv"
RESULT = "./recall_result_dir/recall_result.txt"
SHOWN = 3  # documents of a missed query that --show_errors lists
ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito 2008: told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
# After matplotlib's own, fonts with Chinese characters, of Linux, Windows and macOS.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
         "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
         "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS"]

Values = dict[str, np.ndarray]  # of one result, by "recall@5" and so on: float64 [Q] in [0, 1]


# -------------------------------------------------------------------------------------------------------------- flags
def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--similar_text_pair", type=flags.readable_file, help="query and target, tab-separated, a pair a line; a query "
        f"may have several lines (default: {PAIRS}, unless --qrels is given)")
    flags.add_targets_argument(parser)
    add("--qrels", type=flags.readable_file, help="judgements, instead of --similar_text_pair: query id, 0, document "
        "id and grade, as TREC has them, or BEIR's, without the 0; for results of recall.py --format trec")
    add("--recall_result_file", type=flags.readable_file, nargs="+", default=RESULT,
        help="what recall.py wrote, tsv or jsonl, with ids for --targets id, or trec for --qrels; several files of the "
        "same queries are evaluated one after the other")
    add("--ignore_identical_ids", action="store_true", help="with --qrels: leave out a query's document that has the "
        "query's own id, as BEIR does for sets whose queries are documents, such as ArguAna")
    add("--recall_num", type=flags.positive_int, default=50, help="documents of each query that count, the best ones")
    add("--metrics", default="recall", help="what to print, separated by commas: "
        f"{', '.join(METRICS)}; with --qrels {', '.join(JUDGED_METRICS)}")
    add("--compare", action="store_true", help="print several files as a table, with each one's difference to the "
        "first and its paired bootstrap 95 %% interval")
    add("--plot", help="draw Recall@k of all files to this file, .png, .svg or .pdf")
    add("--show_errors", type=flags.positive_int, metavar="N",
        help="list N of the queries whose first document is no target, the worst first")
    flags.add_data_arguments(parser)
    args = parser.parse_args()
    if isinstance(args.recall_result_file, str):  # argparse checks a default only where it is no list
        args.recall_result_file = [args.recall_result_file]
    set_default_pairs(parser, args)
    args.metrics = textfile.distinct(name.strip() for name in args.metrics.split(","))
    check_files(parser, args)
    check_metrics(parser, args)
    check_plot(parser, args)
    return args


def set_default_pairs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set --similar_text_pair to PAIRS, which has to exist, where neither it nor --qrels is given."""
    if args.similar_text_pair or args.qrels:
        return
    try:
        args.similar_text_pair = flags.readable_file(PAIRS)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --similar_text_pair: {error}")


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not suit the number or the kind of the files."""
    if args.compare and len(args.recall_result_file) < 2:
        parser.error("--compare needs at least two files after --recall_result_file")
    if args.show_errors and len(args.recall_result_file) > 1:
        parser.error("--show_errors takes one --recall_result_file")
    if args.qrels and (args.similar_text_pair or args.show_errors or args.targets == "id"):
        parser.error("--qrels takes the place of --similar_text_pair, without --targets and --show_errors")


def check_metrics(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse unknown names in --metrics, and flags of judgements without them."""
    if args.ignore_identical_ids and not args.qrels:
        parser.error("--ignore_identical_ids needs --qrels")
    table = metrics_table(args)
    for name in args.metrics:
        if name not in table:
            parser.error(f"argument --metrics: {name!r} is not one of {', '.join(table)}")


def metrics_table(args: argparse.Namespace) -> dict[str, dict[str, Formula]]:
    """Return the table of the metrics that --metrics can name."""
    return JUDGED_METRICS if args.qrels else METRICS


def check_plot(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a --plot that cannot be drawn, before anything takes time."""
    if not args.plot:
        return
    if not args.plot.lower().endswith(ENDINGS):
        parser.error(f"argument --plot: {args.plot}: the name has to end in {', '.join(ENDINGS)}")
    folder = os.path.dirname(args.plot) or "."
    if not os.path.isdir(folder):
        parser.error(f"argument --plot: {folder}: no such folder")
    check_writable(args.plot, "--plot")
    check_not_input(args.plot, "--plot", {
        "--similar_text_pair": args.similar_text_pair, "--qrels": args.qrels,
        "--recall_result_file": args.recall_result_file})
    if importlib.util.find_spec("matplotlib") is None:
        parser.error(f"--plot: matplotlib {console.HOW_TO_INSTALL}")


# ------------------------------------------------------------------------------------------------- reading the results
class Hit(NamedTuple):
    """A document of a recall result."""

    query: str
    target: str  # what --similar_text_pair has in its second column: the document or, with --targets id, its id
    document: str
    score: str


def read_hits(path: str, targets: str) -> Iterator[Hit]:
    """Yield the documents of a result of recall.py, of each query the best first.

    Args:
        path: a file of --format tsv or jsonl.
        targets: "text" or "id", what `Hit.target` is.

    Raises:
        InputError: a line is of neither format, or there is no id.
    """
    with open(path, "rb") as file:
        is_jsonl = file.readline().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b'{"query"')
    if is_jsonl:
        yield from read_jsonl_hits(path, targets)
        return
    if targets == "id":
        raise console.InputError(f"--targets id: {path} has no ids; recall.py writes them with --format jsonl")
    for row in textfile.read_rows(path, 3, "--recall_result_file", check_format=False):
        query, document, score = row.fields
        yield Hit(query, document, document, score)


def read_jsonl_hits(path: str, targets: str) -> Iterator[Hit]:
    """Yield the documents of a result of recall.py --format jsonl; see `read_hits`."""
    for number, line in read_lines(path, "--recall_result_file", path):
        try:
            content = json.loads(line)
            for result in content["results"]:
                document = result["document"]
                target = result["id"] if targets == "id" else document
                if not all(isinstance(text, str) for text in (content["query"], document, target)):
                    raise TypeError
                score = result.get("cosine", result.get("score"))
                yield Hit(content["query"], target, document, str(score))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = "the corpus had no ids" if error.args == ("id",) else "no line of recall.py --format jsonl"
            raise console.InputError(f"--recall_result_file {path}:{number}: {problem}") from None


# --------------------------------------------------------------------------------------------------- ranks of targets
@dataclass
class RankedResult:
    """Where a recall result has the targets.

    A query with several lines in --similar_text_pair may have its documents several times in the result: recall.py
    writes all of them for each of these lines.

    Attributes:
        ranks: by query and target the rank, from 0; infinite: not recalled.
        hit_counts: by query, how many lines the result has.
        unknown: how many lines belong to queries that have no target.
        hits_of_repeated: by query that has several lines in --similar_text_pair, `Hit.target` of all its lines.
        wrong: by query whose first document is no target, its first documents.
    """

    ranks: dict[str, dict[str, float]]
    hit_counts: dict[str, int]
    unknown: int = 0
    hits_of_repeated: dict[str, list[str]] = field(default_factory=dict)
    wrong: dict[str, list[Hit]] = field(default_factory=dict)


def rank_targets(hits: Iterable[Hit], pairs: Mapping[str, Counter]) -> RankedResult:
    """Find the rank of every target.

    Args:
        hits: of each query the best first.
        pairs: by query, its targets, and how many lines of --similar_text_pair have the pair.
    """
    result = RankedResult(
        ranks={query: dict.fromkeys(targets, math.inf) for query, targets in pairs.items()},
        hit_counts=dict.fromkeys(pairs, 0),
        hits_of_repeated={query: [] for query, targets in pairs.items() if targets.total() > 1})
    for hit in hits:
        if hit.query not in pairs:
            result.unknown += 1
            continue
        rank = result.hit_counts[hit.query]
        result.hit_counts[hit.query] += 1
        if hit.query in result.hits_of_repeated:
            result.hits_of_repeated[hit.query].append(hit.target)
        ranks = result.ranks[hit.query]
        if hit.target in ranks:
            # A document that is there twice counts where it is first, also where recall.py wrote a query twice.
            ranks[hit.target] = min(ranks[hit.target], rank)
        if rank == 0 and hit.target not in ranks:
            result.wrong[hit.query] = []
        if hit.query in result.wrong and rank < SHOWN:
            result.wrong[hit.query].append(hit)
    return result


def count_documents(result: RankedResult, query: str, line_count: int) -> int:
    """Return how many documents a query has in a result.

    recall.py writes a query's result again for each line that has the query; it is counted once.

    Args:
        line_count: how many lines the query has in --similar_text_pair.
    """
    count = result.hit_counts[query]
    hits = result.hits_of_repeated.get(query, [])
    once = hits[: count // line_count]
    if once and hits == once * line_count:
        return len(once)
    return count


def warn_incomplete(args: argparse.Namespace, path: str, result: RankedResult, pairs: Mapping[str, Counter]) -> None:
    """Warn of queries that the result lacks, unknown queries, and fewer documents than the largest k."""
    warn_missing(path, [query for query, count in result.hit_counts.items() if not count])
    if result.unknown:
        lines = console.count(result.unknown, "line")
        console.warn(f"{lines} of {path} with a query that is not in {args.similar_text_pair}")
    counts = [count_documents(result, query, targets.total()) for query, targets in pairs.items()]
    depth = min(args.recall_num, max(counts, default=0))
    if 0 < depth < max(RECALL_KS):
        console.warn(f"{path} has at most {console.count(depth, 'document')} per query: recall@k is recall@{depth} for "
                     "every larger k")


def warn_missing(path: str, queries: Sequence[str]) -> None:
    """Warn of queries that a result lacks, if there are any."""
    if queries:
        console.warn(f"{path} lacks {console.count(len(queries), 'query')}, counted as missed: "
                     f"{console.some(queries, 3)}")


# --------------------------------------------------------------------------------------------------------- evaluation
@dataclass
class Evaluation:
    """What is printed and drawn.

    Attributes:
        query_count: how many queries there are.
        values: of each result; those of "recall" first, and those of --metrics.
        errors: what --show_errors lists.
    """

    query_count: int
    values: list[Values]
    errors: str = ""


def evaluate_by_pairs(args: argparse.Namespace) -> Evaluation:
    """Evaluate the results by the targets in --similar_text_pair."""
    pairs: dict[str, Counter] = {}
    for query, target in textfile.read_text_pairs(args.similar_text_pair, "--similar_text_pair"):
        pairs.setdefault(query, Counter())[target] += 1
    evaluation = Evaluation(query_count=len(pairs), values=[])
    for path in args.recall_result_file:
        result = rank_targets(read_hits(path, args.targets), pairs)
        warn_incomplete(args, path, result, pairs)
        ranks = [ranks.values() for ranks in result.ranks.values()]
        evaluation.values.append(measure_queries(ranks, metrics_to_compute(args), depth=args.recall_num))
        if args.show_errors:
            evaluation.errors = describe_errors(result, args.show_errors)
    return evaluation


def metrics_to_compute(args: argparse.Namespace) -> list[str]:
    """Return --metrics, with "recall" first, which result.tsv and --plot have in any case."""
    return textfile.distinct(["recall", *args.metrics])


def evaluate_by_judgements(args: argparse.Namespace) -> Evaluation:
    """Evaluate the results by the judgements in --qrels, as trec_eval does."""
    relevant = {}
    for query, grades in read_judgements(args.qrels, "--qrels").items():
        relevant[query] = {document: grade for document, grade in grades.items() if grade > 0}
    if not any(relevant.values()):
        raise console.InputError(f"--qrels {args.qrels}: no document is judged to be relevant")
    evaluation = Evaluation(query_count=len(relevant), values=[])
    for path in args.recall_result_file:
        run = read_run(path, "--recall_result_file")
        handle_identical_ids(args, path, run)
        warn_missing(path, [query for query in relevant if query not in run])
        unknown = run.keys() - relevant.keys()
        if unknown:
            console.warn(f"{path} has {console.count(len(unknown), 'query')} that {args.qrels} does not judge")
        values = {}
        for metric in metrics_to_compute(args):
            ranks = rank_relevant(relevant, run, metric)  # each metric orders documents of equal scores in its way
            grades = [grades.values() for grades in relevant.values()]
            values.update(measure_queries(ranks, [metric], args.recall_num, grades, JUDGED_METRICS))
        evaluation.values.append(values)
    return evaluation


def handle_identical_ids(args: argparse.Namespace, path: str, run: dict[str, dict[str, float]]) -> None:
    """Leave out of a run the documents with their query's own id, or, without the flag, warn of them."""
    identical = [query for query, scores in run.items() if query in scores]
    if not identical:
        return
    queries = console.count(len(identical), "query")
    if not args.ignore_identical_ids:
        console.warn(f"{path}: {queries} of {len(run):,} with a document of the query's own id; where queries are "
                     "documents, BEIR leaves it out: --ignore_identical_ids")
        return
    for query in identical:
        del run[query][query]
    console.log(f"{path}: left out the document of the query's own id for {queries}")


def rank_relevant(relevant: Mapping[str, Mapping[str, int]], run: Mapping[str, dict[str, float]],
                  metric: str) -> list[list[float]]:
    """Return, of each query, the ranks of its relevant documents in a run; infinite: not recalled."""
    ranks = []
    for query, grades in relevant.items():
        documents = rank_documents(run.get(query, {}), metric)
        rank_of = {document: rank for rank, document in enumerate(documents)}
        ranks.append([rank_of.get(document, math.inf) for document in grades])
    return ranks


# ------------------------------------------------------------------------------------------------------------- output
def describe_errors(result: RankedResult, most: int) -> str:
    """Return the worst queries with their targets and first documents, one field a line; ranks count from 1 there.

    The worst are those without a target in the result, then those whose first target is deepest.
    """
    first_ranks = {query: min(ranks.values()) for query, ranks in result.ranks.items()}
    missed = [query for query, rank in first_ranks.items() if rank > 0]
    missed.sort(key=first_ranks.get, reverse=True)
    head = f"{console.part(len(missed), len(first_ranks), 'query', 'have')} another document than a target first"
    if most < len(missed):
        head += f"; the worst {most}:"
    elif missed:
        head += ":"
    lines = [head]
    for query in missed[:most]:
        lines += ["", f"query     {query}"]
        for target, rank in result.ranks[query].items():
            place = "not in the file" if rank == math.inf else f"rank {rank + 1}"
            lines.append(f"target    {target} ({place})")
        for rank, hit in enumerate(result.wrong.get(query, [])):
            if rank < first_ranks[query]:
                lines.append(f"recalled  {hit.document} (rank {rank + 1}, score {hit.score})")
    return "\n".join(lines)


def compare(names: list[str], results: list[Values]) -> str:
    """Return a table of the results, and of the difference of each one to the first, in percentage points."""
    header = ["", *names]
    rows = []
    for metric in results[0]:
        means = [f"{mean_percent(values[metric]):.3f}" for values in results]
        rows.append([metric, *means])
    first = np.stack(list(results[0].values()), axis=1)  # float64 [Q, M]
    for name, values in zip(names[1:], results[1:]):
        header += [f"{name} - {names[0]}", "95 % interval  "]
        differences = 100 * (np.stack(list(values.values()), axis=1) - first)
        means = differences.mean(axis=0)
        intervals = paired_bootstrap(differences).T
        for row, mean, (low, high) in zip(rows, means, intervals):
            row += format_difference(mean, low, high)
    return (f"{format_table([header, *rows])}\n\n{console.count(len(first), 'query')}, in percent. "
            "Interval: of the difference, by paired bootstrap (10,000 resamples of the queries, percentiles). "
            "*: it excludes 0.")


def format_difference(mean: float, low: float, high: float) -> list[str]:
    """Return the two cells of a difference: its mean, and its interval with a star if that excludes 0."""
    # Rounded before the sign is looked at, so that * agrees with what is printed; + 0.0 makes 0 of -0.
    mean, low, high = np.round([mean, low, high], 3) + 0.0
    star = "*" if low > 0 or high < 0 else " "
    return [f"{mean:+.3f}", f"{low:+8.3f} .. {high:+8.3f} {star}"]


def name_results(paths: Sequence[str]) -> list[str]:
    """Return short names that tell the paths apart: without the folders and names that all of them have.

    before/recall.txt and after/recall.txt become before and after; a single path becomes its file name. The second path
    of the same name gets " (2)" after it, and so on.
    """
    split_paths = [PurePath(os.path.normpath(path)).parts for path in paths]
    split_paths = drop_common_start(split_paths)
    reversed_paths = drop_common_start([parts[::-1] for parts in split_paths])
    names = ["/".join(parts[::-1]) for parts in reversed_paths]
    numbered = []
    for place, name in enumerate(names):
        earlier = names[:place].count(name)
        numbered.append(f"{name} ({earlier + 1})" if earlier else name)
    return numbered


def drop_common_start(split_paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Drop the parts that all paths begin with, but leave each path one part."""
    shortest = min(len(parts) for parts in split_paths)
    common = 0
    while common < shortest - 1 and len({parts[common] for parts in split_paths}) == 1:
        common += 1
    return [parts[common:] for parts in split_paths]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows in columns, the first column to the left, the others to the right."""
    padded_columns = []
    for place, column in enumerate(zip(*rows)):
        widths = [display_width(cell) for cell in column]
        padded = []
        for cell, width in zip(column, widths):
            padding = " " * (max(widths) - width)
            padded.append(padding + cell if place else cell + padding)
        padded_columns.append(padded)
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded_columns))


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text takes; Chinese characters take two each."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide


def draw_recall(path: str, results: Mapping[str, Sequence[float]], query_count: int) -> None:
    """Draw Recall@k as bars, a group for every k and a colour for every result.

    Args:
        path: a file that ends in one of ENDINGS; it is written completely or not at all.
        results: by name, the means in percent for every k of RECALL_KS.
        query_count: how many queries there are, for the title.
    """
    import matplotlib
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it reports fonts that are not installed
    style = {"font.family": FONTS, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
             "axes.axisbelow": True, "axes.titlepad": 16}
    legend_columns = 2 if max(map(len, results)) <= 40 else 1
    legend_rows = math.ceil(len(results) / legend_columns)
    width = min(16, max(6.4, 1.6 + 2.2 * len(results)))
    height = 4.6 + 0.22 * legend_rows
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw_bars(figure, results, query_count)
        legend = figure.legend(loc="outside lower center", ncols=legend_columns, frameon=False)
        for text, name in zip(legend.get_texts(), results):
            text.set(text=name, parse_math=False)  # set here: matplotlib leaves out _x, and reads $x$ as TeX
        with new_file(path, "wb", flag="--plot") as file:
            figure.savefig(file, format=path.rsplit(".")[-1].lower(), dpi=150, bbox_inches="tight")


def draw_bars(figure, results: Mapping[str, Sequence[float]], query_count: int) -> None:
    """Add the axes with the bars of all results to a figure of matplotlib."""
    groups = np.arange(len(RECALL_KS))
    axes = figure.add_subplot(
        title=f"Recall@k of {console.count(query_count, 'query')}", xlabel="k",
        ylabel="queries with a target among the first k, %",
        ylim=(0, 100), xticks=groups, xticklabels=RECALL_KS, yticks=range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    width = 0.84 / len(results)
    for number, recall in enumerate(results.values()):
        places = groups + (number - (len(results) - 1) / 2) * width
        colour = COLOURS[number % len(COLOURS)]
        hatch = "/" * (3 * (number // len(COLOURS)))  # denser each time that the colours begin again
        bars = axes.bar(places, recall, 0.94 * width, label=str(number), color=colour, hatch=hatch)
        if len(results) <= 6:  # the numbers of more would overlap
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)


def print_values(paths: Sequence[str], results: Sequence[Values]) -> None:
    """Print name=value lines in percent, of several results below their paths."""
    for number, (path, values) in enumerate(zip(paths, results)):
        if number > 0:
            print()
        if len(results) > 1:
            print(path)
        for name, values_of_queries in values.items():
            print(f"{name}={mean_percent(values_of_queries)}")


def select(values: Values, metrics: Iterable[str], args: argparse.Namespace) -> Values:
    """Return the values of some metrics, in their order."""
    return {name: values[name] for metric in metrics for name in metrics_table(args)[metric]}


def main() -> None:
    args = parse_args()
    evaluation = evaluate_by_judgements(args) if args.qrels else evaluate_by_pairs(args)
    names = name_results(args.recall_result_file)
    results = [select(values, args.metrics, args) for values in evaluation.values]
    if args.compare:
        print(compare(names, results))
    else:
        print_values(args.recall_result_file, results)
    if evaluation.errors:
        print("\n" + evaluation.errors)
    recalls = []  # of each result, Recall@k for every k of RECALL_KS
    for values in evaluation.values:
        recall_values = select(values, ["recall"], args)
        recalls.append([mean_percent(values_of_queries) for values_of_queries in recall_values.values()])
    try:
        with open("result.tsv", "a", encoding="utf-8") as file:
            for recall in recalls:
                file.write("\t".join(map(str, recall)) + "\n")
    except OSError as error:  # the values are printed
        console.warn(f"result.tsv cannot be written here: {(error.strerror or str(error)).lower()}")
    if args.plot:
        draw_recall(args.plot, dict(zip(names, recalls)), evaluation.query_count)
        console.log(f"wrote {args.plot}")


if __name__ == "__main__":
    console.run(main)
