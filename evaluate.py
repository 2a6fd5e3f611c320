"""Recall@1/5/10/20/50 of a recall result; other measures, results side by side, and what went wrong.

    python evaluate.py --similar_text_pair recall/dev.csv --recall_result_file recall_result_dir/recall_result.txt
    python evaluate.py --recall_result_file before.txt after.txt --compare --metrics recall,mrr --plot recall.png
    python evaluate.py --show_errors 20

A query counts as hit at k if any of its targets is among its first k documents. Prints `recall@k=...` in percent and
appends the figures, tab-separated, as a row to result.tsv. Needs neither paddle nor paddlenlp.
"""

import argparse
import importlib.util
import logging
import math
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import data
from simcse import console, flags
from simcse.files import new_file
from simcse.measures import METRICS, RECALL_KS, paired_bootstrap, per_query, percent

import numpy as np

SHOWN = 3  # documents of a missed query that --show_errors lists
Targets = dict[str, dict[str, float]]  # of every query and each of its targets the rank, from 0; infinite: none
Values = dict[str, np.ndarray]  # by measure its value for every query, float64 [Q], from 0 to 1
Tops = dict[str, list[tuple[str, str]]]  # of a query the first documents and their scores


ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito 2008: told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
# Fonts with Chinese characters, of Linux, Windows and macOS.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei",
             "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
             "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS")


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--similar_text_pair", type=flags.readable_file, default="recall/dev.csv",
                        help="query and target, tab-separated, a pair a line; a query may stand on several lines")
    parser.add_argument("--recall_result_file", type=flags.readable_file, nargs="+",
                        default="./recall_result_dir/recall_result.txt",
                        help="what recall.py wrote: query, document, score, best first; several files of the same "
                        "queries are evaluated one after the other")
    parser.add_argument("--recall_num", type=flags.positive_int, default=50,
                        help="documents looked at for each query; those below are ignored")
    parser.add_argument("--metrics", type=metric_names, default="recall",
                        help=f"what to print, separated by commas: {', '.join(METRICS)}")
    parser.add_argument("--compare", action="store_true",
                        help="print several files as a table, with each one's difference to the first and its paired "
                        "bootstrap 95 %% interval")
    parser.add_argument("--plot", type=picture_file, default=None,
                        help="draw Recall@k of all files there, .png, .svg or .pdf; None: draw nothing")
    parser.add_argument("--show_errors", type=flags.positive_int, default=None,
                        help="list so many of the queries whose first document is no target, the worst first; None: "
                        "none")
    flags.add_strict_argument(parser)
    args = parser.parse_args()
    if isinstance(args.recall_result_file, str):  # argparse checks a default only where it is no list
        args.recall_result_file = [args.recall_result_file]
    if args.compare and len(args.recall_result_file) < 2:
        parser.error("--compare needs at least two files after --recall_result_file")
    if args.show_errors and len(args.recall_result_file) > 1:
        parser.error("--show_errors takes one --recall_result_file")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"--plot: matplotlib {console.HOW_TO_INSTALL}")
    return args


def metric_names(text: str) -> list[str]:
    """The names in a comma-separated list, each once."""
    names = data.distinct(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(METRICS)}")
    return names


def picture_file(path: str) -> str:
    """Check that a picture can be written there."""
    if not path.lower().endswith(ENDINGS):
        raise argparse.ArgumentTypeError(f"{path}: the name has to end in {', '.join(ENDINGS)}")
    flags.folder(os.path.dirname(path) or ".")
    return path


def read_targets(args: argparse.Namespace) -> Targets:
    """The distinct queries and their distinct targets, recalled nowhere yet."""
    targets: Targets = {}
    for query, target in data.read_text_pairs(args.similar_text_pair, "--similar_text_pair", args.strict_data):
        targets.setdefault(query, {})[target] = math.inf
    return targets


def read_result(args: argparse.Namespace, targets: Targets, path: str) -> tuple[Values, Targets, Tops]:
    """Recall and what else is asked for, of every query; the ranks that the targets have anywhere in the file; and,
    for --show_errors, the tops of the queries whose first document is no target."""
    seen: Counter[str] = Counter()
    ranks, tops = {query: dict(each) for query, each in targets.items()}, {}
    unknown = 0
    for query, document, score in data.read_rows(path, 3, "--recall_result_file", args.strict_data):
        if query not in targets:
            unknown += 1
            continue
        rank = seen[query]
        seen[query] += 1
        # A document that stands there twice counts where it stands first; so does a query that recall.py wrote twice.
        if document in ranks[query]:
            ranks[query][document] = min(ranks[query][document], rank)
        missed = rank == 0 and document not in targets[query]
        if args.show_errors and (missed or (query in tops and rank < SHOWN)):
            tops.setdefault(query, []).append((document, score))
    report(args, path, [query for query in targets if query not in seen], unknown, max(seen.values(), default=0))
    looked_at = [[rank if rank < args.recall_num else math.inf for rank in each.values()] for each in ranks.values()]
    return per_query(looked_at, data.distinct(["recall", *args.metrics])), ranks, tops


def report(args: argparse.Namespace, path: str, missing: list[str], unknown: int, most: int) -> None:
    """Say on stderr what makes the figures other than they seem."""
    if missing:
        console.warn(f"{len(missing)} queries have no line in {path} and count as missed: "
                     + ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else ""))
    if unknown:
        console.warn(f"{unknown} lines of {path} belong to no query of {args.similar_text_pair}")
    if (depth := min(args.recall_num, most)) < max(RECALL_KS):
        console.warn(f"only {depth} documents a query were looked at in {path}: recall@k is recall@{depth} for every "
                     "larger k")


def asked_for(args: argparse.Namespace, values: Values) -> Values:
    """Those of the --metrics, in their order."""
    return {name: values[name] for metric in args.metrics for name in METRICS[metric]}


def compare(names: list[str], results: list[Values]) -> str:
    """A table of the results, and of each one's difference to the first in percentage points."""
    measures, queries = list(results[0]), len(next(iter(results[0].values())))
    head = ["", *names]
    rows = [[measure, *(f"{percent(values[measure]):.3f}" for values in results)] for measure in measures]
    for name, values in zip(names[1:], results[1:]):
        head += [f"{name} - {names[0]}", "95 % interval  "]
        differences = 100 * np.stack([values[measure] - results[0][measure] for measure in measures], axis=1)
        # Rounded before the sign is looked at, so that * agrees with what is printed; + 0.0 makes 0 of -0.
        figures = np.round([differences.mean(axis=0), *paired_bootstrap(differences)], 3) + 0.0
        for row, (mean, low, high) in zip(rows, figures.T):
            row += [f"{mean:+.3f}", f"{low:+8.3f} .. {high:+8.3f} {'*' if low > 0 or high < 0 else ' '}"]
    return (f"{table([head, *rows])}\n\n{queries:,} queries, in percent. Interval: of the difference, by paired "
            "bootstrap (10,000 resamples of the queries, percentiles). *: it excludes 0.")


def errors(args: argparse.Namespace, ranks: Targets, tops: Tops) -> str:
    """The --show_errors worst queries: those with no target in the file, then by the rank of the first, deepest first.
    Ranks are printed from 1."""
    def place(rank: float) -> str:
        return "not in the file" if rank == math.inf else f"rank {rank + 1}"

    missed = sorted((query for query, each in ranks.items() if min(each.values())),
                    key=lambda query: -min(ranks[query].values()))
    lines = [f"{len(missed)} of {len(ranks)} queries have another document than a target first"
             + (f"; the worst {args.show_errors}:" if args.show_errors < len(missed) else ":" if missed else "")]
    for query in missed[: args.show_errors]:
        each = ranks[query]
        lines += ["", f"query     {query}", *(f"target    {text} ({place(rank)})" for text, rank in each.items())]
        above = tops.get(query, [])[: min(SHOWN, *each.values())]
        lines += [f"recalled  {text} (rank {rank}, score {score})" for rank, (text, score) in enumerate(above, 1)]
    return "\n".join(lines)


def labels(paths: Sequence[str]) -> list[str]:
    """What tells the paths apart: each without the folders, and the name, that all have in common; of one its name.

    before/recall.txt and after/recall.txt are before and after. A path that is there again gets a number.
    """
    parts = [PurePath(os.path.normpath(path)).parts for path in paths]
    if len(paths) == 1:
        return [parts[0][-1]]
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        while min(map(len, parts)) > 1 and len({each[end] for each in parts}) == 1:
            parts = [each[rest] for each in parts]
    seen: Counter[str] = Counter()
    names = []
    for name in ("/".join(each) for each in parts):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns, the first to the left, the others to the right; Chinese characters are two places wide."""
    def width(text: str) -> int:
        return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)

    widths = [max(map(width, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        spaces = [" " * (most - width(cell)) for cell, most in zip(row, widths)]
        cells = [row[0] + spaces[0], *(space + cell for cell, space in zip(row[1:], spaces[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def draw_recall(path: str, results: Mapping[str, Sequence[float]], queries: int) -> None:
    """Draw Recall@k as bars, a group for every k and a colour for every result.

    Args:
        path: where to, ending in one of ENDINGS; complete or not at all.
        results: by label Recall@k in percent, for every k of RECALL_KS.
        queries: of how many it is the mean.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    places, width = range(len(RECALL_KS)), 0.84 / len(results)
    columns = 2 if max(map(len, results)) <= 40 else 1  # of the legend
    with matplotlib.rc_context({"font.family": fonts, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        size = min(16, max(6.4, 1.6 + 2.2 * len(results))), 4.6 + 0.22 * -(-len(results) // columns)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for number, recall in enumerate(results.values()):
            shift = (number - (len(results) - 1) / 2) * width
            bars = axes.bar([place + shift for place in places], recall, 0.94 * width, label=str(number),
                            color=COLOURS[number % len(COLOURS)], hatch="/" * (3 * (number // len(COLOURS))))
            if len(results) <= 6:  # more would overlap
                axes.bar_label(bars, [f"{value:.1f}" for value in recall], padding=2, fontsize=8)
        axes.set_title(f"Recall@k of {queries:,} queries", pad=16)
        axes.set(xlabel="k", ylabel="queries with a target among the first k, %", ylim=(0, 100), xticks=places,
                 xticklabels=RECALL_KS, yticks=range(0, 101, 20))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False)
        for text, label in zip(legend.get_texts(), results):  # as it is: matplotlib leaves _x out and reads $x$ as TeX
            text.set(text=label, parse_math=False)
        with new_file(path, "wb") as file:
            figure.savefig(file, format=path.rsplit(".")[-1].lower(), dpi=150, bbox_inches="tight")


def main() -> None:
    args = parse_args()
    targets, files = read_targets(args), args.recall_result_file
    results = []
    for path in files:
        values, ranks, tops = read_result(args, targets, path)
        results.append(values)
    names = labels(files)
    if args.compare:
        print(compare(names, [asked_for(args, values) for values in results]))
    else:
        for number, (path, values) in enumerate(zip(files, results)):
            if len(files) > 1:
                print("\n" * bool(number) + path)
            for name, each in asked_for(args, values).items():
                print(f"{name}={percent(each)}")
    if args.show_errors:
        print("\n" + errors(args, ranks, tops))
    recalls = [[percent(values[name]) for name in METRICS["recall"]] for values in results]
    with open("result.tsv", "a", encoding="utf-8") as file:
        file.writelines("\t".join(map(str, recall)) + "\n" for recall in recalls)
    if args.plot:
        draw_recall(args.plot, dict(zip(names, recalls)), len(targets))
        console.log(f"wrote {args.plot}")


if __name__ == "__main__":
    console.run(main)
