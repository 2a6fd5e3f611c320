"""Measure what each way of training is worth: Recall@1/5/10/20/50 and MRR on real text, over several seeds.

    python benchmarks/quality.py --data_dir ../shared/data --json quality.json       # all recipes: hours, on 2 cores
    python benchmarks/quality.py plain whitened --data_dir ../shared/data --seeds 1000    # some of them, once

--data_dir holds csl/recall/ and lcqmc/recall/. Each recipe is commands of this project, run as a user runs them from
`pretrained/ernie_mini_zh` on (--show prints them), then recall.py with exact search over the whole corpus and
evaluate.py. Runs that are in --json are not run again. Prints a table: the mean over the seeds, and their spread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from simcse import console, files, flags, measures  # noqa: E402
from simcse.text import textfile  # noqa: E402

import numpy as np  # noqa: E402

MEASURES = [*(f"recall@{k}" for k in measures.RECALL_KS), "mrr"]
TRAINING_FILES = {"csl": "train_unsupervised.csv", "lcqmc": "corpus.csv"}
PLAIN, ENCODER = "--output_emb_size 256 --infer_with_fc_pooler", "--model_name_or_path {encoder}"
WHITE = "--epochs 0 --pooling first_last_avg --whiten --max_seq_length 64"
MLM = f"scripts/pretrain.py {ENCODER} --learning_rate 1e-4 --warmup_proportion 0.1 --epochs 2"
FROM = "train.py --init_from_ckpt {0} --infer_with_fc_pooler"
PAIRS = [FROM + " --train_set_file {pairs}"]
TRIPLES = ["recall.py --params_path {0} --corpus_file {corpus} --similar_text_pair {pairs} --recall_num 50",
           "predict.py --params_path {0} --text_pair_file {pairs}",
           "scripts/mine_negatives.py --similar_text_pair {pairs} --positive_scores {2} --output_file {new} "
           "--recall_result_file recall_result_dir/recall_result.txt", FROM + " --train_set_file {3}"]
SEEN = 62  # characters of a document that an encoder of 64 tokens sees, about
SHORT = {f", first {SEEN} characters": "--corpus_file {corpus_seen} --similar_text_pair {queries_seen}"}
HYBRID = {f"{cut} + BM25": f"{flags} --hybrid_bm25" for cut, flags in {"": "", **SHORT}.items()}
# Commands, {0} being what the first of them made and {new} what this one makes; {encoder}, {texts}, {pairs} and
# {corpus} are files. And recall.py's flags, by what is added to the recipe's name; {corpus_seen} and {queries_seen}
# have only so much of every document as an encoder sees.
RECIPES: dict[str, tuple[list[str], dict[str, str]]] = {
    "untrained": ([f"train.py {ENCODER} {PLAIN} --epochs 0"], {"": ""}),
    "plain": ([f"train.py {ENCODER} {PLAIN}"], {"": ""}),
    "mean": ([f"train.py {ENCODER} --pooling mean"], {"": ""}),
    "first_last_avg": ([f"train.py {ENCODER} --pooling first_last_avg"], {"": ""}),
    "crop": ([f"train.py {ENCODER} {PLAIN} --crop_rate 0.5"], {"": ""}),
    "pairs": ([f"train.py {ENCODER} {PLAIN}", *PAIRS], {"": ""}),
    "triples": ([f"train.py {ENCODER} {PLAIN}", *TRIPLES], {"": ""}),
    "first_last_avg, pairs": ([f"train.py {ENCODER} --pooling first_last_avg", *PAIRS], {"": ""}),
    "first_last_avg, triples": ([f"train.py {ENCODER} --pooling first_last_avg", *TRIPLES], {"": ""}),
    "mlm": ([MLM, f"train.py {PLAIN} --model_name_or_path {{0}}"], {"": ""}),
    "mean, whitened": ([f"train.py {ENCODER} {WHITE} --pooling mean"], {"": ""}),
    "whitened": ([f"train.py {ENCODER} {WHITE}"], {"": "", **SHORT, **HYBRID}),
    "first_avg, whitened": ([f"train.py {ENCODER} {WHITE} --pooling first_avg"], {"": "", " + BM25": "--hybrid_bm25"}),
    "first_avg, whitened at 512": ([f"train.py {ENCODER} {WHITE} --pooling first_avg --max_seq_length 512"], {
        "": "--max_seq_length 512", " + BM25": "--max_seq_length 512 --hybrid_bm25"}),
    "whitened, pairs": ([f"train.py {ENCODER} {WHITE}", *PAIRS], {"": ""}),
    "whitened, triples": ([f"train.py {ENCODER} {WHITE}", *TRIPLES], {"": ""}),
    "whitened, SimCSE": ([f"train.py {ENCODER} {WHITE}", FROM + " --learning_rate 1e-5 --crop_rate 0.5"], {"": ""}),
    "mlm, whitened": ([MLM, f"train.py {WHITE} --model_name_or_path {{0}}"], {"": ""}),
}
TRAINING = ("--device cpu --batch_size 64 --max_seq_length 32 --save_steps 1000000 --save_dir {new} "
            "--train_set_file {texts}")
COMMON = {"train.py": TRAINING, "scripts/pretrain.py": TRAINING,
          "recall.py": "--device cpu --ann_engine exact --max_seq_length 64",
          "predict.py": "--device cpu --max_seq_length 64", "scripts/mine_negatives.py": ""}


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="recipe", help=f"of {', '.join(RECIPES)}; none: all")
    parser.add_argument("--data_dir", type=flags.folder, required=True, help="folder of csl/recall and lcqmc/recall")
    parser.add_argument("--data_sets", nargs="+", choices=TRAINING_FILES, default=list(TRAINING_FILES),
                        help="which of them")
    parser.add_argument("--seeds", nargs="+", type=flags.natural_int, default=[1000, 1001, 1002], help="random seeds")
    parser.add_argument("--lines", type=flags.natural_int, default=0, help="training lines to take; 0: all")
    parser.add_argument("--jobs", type=flags.positive_int, default=1,
                        help="runs side by side, a share of the cores each")
    parser.add_argument("--json", default="quality.json", help="results, read and added to")
    parser.add_argument("--show", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in RECIPES]:
        parser.error(f"no such recipe: {unknown[0]}; there are {', '.join(RECIPES)}")
    return args


def run(script: str, flags: list[str], folder: str) -> str:
    """Run a script of the project in `folder`; its stdout."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *flags], cwd=folder, text=True,
                          capture_output=True)
    if done.returncode:
        raise console.InputError(f"{script} {' '.join(flags)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def newest(folder: str) -> str:
    """The checkpoint that a training run left, whitened where it was."""
    names = sorted(os.listdir(folder), key=lambda name: (name.endswith("_whitened"), int(name.split("_")[1])))
    return os.path.join(folder, names[-1])


def prepare(args: argparse.Namespace, data_set: str, folder: str) -> dict[str, str]:
    """Training texts, pairs to train on, and queries that are not among these, in `folder`; all files by name.

    CSL's train.csv has other titles than dev.csv. LCQMC's dev_labeled.csv is a part of dev.csv, which is left out of
    the queries.
    """
    source = os.path.abspath(os.path.join(args.data_dir, data_set, "recall"))
    files = {"encoder": os.path.join(ROOT, "pretrained", "ernie_mini_zh"), "corpus": f"{source}/corpus.csv",
             **{name: f"{folder}/{name}.csv" for name in ("texts", "pairs", "queries", "corpus_seen", "queries_seen")}}
    texts = list(textfile.TextFile(f"{source}/{TRAINING_FILES[data_set]}", "--data_dir"))
    queries = textfile.read_text_pairs(f"{source}/dev.csv", "--data_dir")
    if data_set == "csl":
        pairs = textfile.read_text_pairs(f"{source}/train.csv", "--data_dir")
    else:
        rows = textfile.read_rows(f"{source}/dev_labeled.csv", 3, "--data_dir", textfile.find_label_problem)
        labeled = [row.fields for row in rows]
        pairs = [(query, title) for query, title, label in labeled if float(label)]
        known = {text for query, title, _ in labeled for text in (query, title)}
        queries = [pair for pair in queries if not known.intersection(pair)]
    seen = [(text[:SEEN],) for text in textfile.TextFile(files["corpus"], "--data_dir")]
    for name, rows in (("texts", [(text,) for text in texts[: args.lines or None]]), ("pairs", pairs),
                       ("queries", queries), ("corpus_seen", seen),
                       ("queries_seen", [(query, target[:SEEN]) for query, target in queries])):
        with open(files[name], "w", encoding="utf-8") as file:
            file.writelines("\t".join(row) + "\n" for row in rows)
    return files


def commands(name: str) -> list[list[str]]:
    """A recipe's commands, script first."""
    parts = (command.split() for command in RECIPES[name][0])
    return [[script, *COMMON[script].split(), *flags] for script, *flags in parts]


def measure(args: argparse.Namespace, data_set: str, name: str, seed: int) -> dict[str, dict[str, float]]:
    """A recipe's figures on a data set, in percent, by what is added to its name."""
    threads = ["--cpu_threads", str(max(1, (os.cpu_count() or 1) // args.jobs))]
    with tempfile.TemporaryDirectory() as folder:
        files, made = prepare(args, data_set, folder), []
        for number, (script, *flags) in enumerate(commands(name)):
            new, trains = f"{folder}/{number}", COMMON[script] == TRAINING
            flags = [flag.format(*made, new=new, **files) for flag in flags]
            printed = run(script, [*flags, *(threads if "cpu" in flags else []),
                                   *(["--seed", str(seed)] if trains else [])], folder)
            if script == "predict.py":
                with open(new, "w", encoding="utf-8") as file:
                    file.write(printed)
            made.append(newest(new) if trains else new)
        figures = {}
        for suffix, flags in RECIPES[name][1].items():
            run("recall.py", ["--device", "cpu", "--params_path", made[-1], "--corpus_file", files["corpus"],
                              "--similar_text_pair", files["queries"], "--recall_num", "50", "--ann_engine", "exact",
                              *threads, *flags.format(**files).split()], folder)
            figures[suffix] = evaluate(files["queries_seen" if "{queries_seen}" in flags else "queries"], folder)
    return figures


def evaluate(queries: str, folder: str) -> dict[str, float]:
    """What evaluate.py says of the recall result in `folder`."""
    printed = run("evaluate.py", ["--similar_text_pair", queries, "--metrics", "recall,mrr"], folder)
    return {name: float(value) for name, value in (line.split("=") for line in printed.splitlines())}


def bm25(args: argparse.Namespace, data_set: str) -> dict[str, dict[str, float]]:
    """BM25 alone, over whole documents and over what an encoder sees of them."""
    from simcse.index.bm25 import Bm25

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(args, data_set, folder)
        os.makedirs(f"{folder}/recall_result_dir")
        queries = textfile.distinct(query for query, _ in textfile.read_text_pairs(files["queries"], "--data_dir"))
        for suffix, part in zip(("", *SHORT), ("", "_seen")):
            corpus = textfile.TextFile(files[f"corpus{part}"], "--data_dir")
            rows, scores = Bm25(corpus).search(queries, 50)
            with open(f"{folder}/recall_result_dir/recall_result.txt", "w", encoding="utf-8") as file:
                file.writelines(f"{query}\t{corpus[row]}\t{score}\n" for query, *best in zip(queries, rows, scores)
                                for row, score in zip(*best) if row >= 0)
            figures[suffix] = evaluate(files[f"queries{part}"], folder)
    return figures


def table(results: dict, args: argparse.Namespace, names: list[str]) -> str:
    """Markdown: the mean over the seeds and their standard deviation."""
    lines = []
    for data_set in args.data_sets:
        lines += ["", f"| {data_set} | {' | '.join(MEASURES)} | seeds |", "| --- " * (len(MEASURES) + 2) + "|"]
        for name in names:
            runs = [values for key, values in results.items() if key.startswith(f"{data_set}/{name}/")]
            for suffix in runs[0] if runs else ():
                figures = np.array([[run[suffix][measure] for measure in MEASURES] for run in runs])
                cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in
                         zip(figures.mean(axis=0), figures.std(axis=0, ddof=len(runs) > 1))]
                lines.append(f"| {name}{suffix} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    names = args.names or list(RECIPES)
    if args.show:
        for name in names:
            print(f"{name}:", *(f"    python {' '.join(command)}" for command in commands(name)),
                  *(" ".join(["    python recall.py ...", *flags.split()]) for flags in RECIPES[name][1].values()),
                  sep="\n")
        return
    results: dict[str, dict] = {}
    if os.path.exists(args.json):
        with open(args.json, encoding="utf-8") as file:
            results = json.load(file)
    todo = [(data_set, name, seed) for seed in args.seeds for name in names for data_set in args.data_sets
            if f"{data_set}/{name}/{seed}" not in results]
    with ThreadPoolExecutor(args.jobs) as workers:
        for each, values in zip(todo, workers.map(lambda each: measure(args, *each), todo)):
            results["/".join(map(str, each))] = values
            console.log(f"{each}: {values}")
            with files.new_file(args.json) as file:
                json.dump(results, file, ensure_ascii=False, indent=1)
    for data_set in args.data_sets:
        results.setdefault(f"{data_set}/BM25/", bm25(args, data_set))
    print(table(results, args, ["BM25", *names]))


if __name__ == "__main__":
    console.run(main)
