"""Measure what each way of training is worth: Recall@1/5/10/20/50 and MRR on real text, over several seeds.

    python benchmarks/quality.py --data_dir ../shared/data --json quality.json       # all recipes: hours, on 2 cores
    python benchmarks/quality.py plain whitened --data_dir ../shared/data --seeds 1000    # some of them, once

--data_dir holds csl/recall/ and lcqmc/recall/. Each recipe is commands of this project, run as a user runs them from
`pretrained/ernie_mini_zh` on (--show prints them), then recall.py with exact search over the whole corpus and
evaluate.py. Runs that are in --json are not run again, unless their commands have changed; after a change of the code
name another file. Prints a table: the mean over the seeds, and their standard deviation. benchmarks/quality.json holds
the runs of which the documentation has the figures.

To add a recipe, put its commands into RECIPES.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from simcse import console, files, flags, measures  # noqa: E402
from simcse.text import textfile  # noqa: E402

import numpy as np  # noqa: E402

METRICS = [*(f"recall@{k}" for k in measures.RECALL_KS), "mrr"]
TRAINING_FILES = {"csl": "train_unsupervised.csv", "lcqmc": "corpus.csv"}
PLAIN = "--output_emb_size 256 --infer_with_fc_pooler"
ENCODER = "--model_name_or_path {encoder}"
WHITE = "--epochs 0 --pooling first_last_avg --whiten"
MLM = f"scripts/pretrain.py {ENCODER} --learning_rate 1e-4 --warmup_proportion 0.1 --epochs 2"
FROM = "train.py --init_from_ckpt {0} --infer_with_fc_pooler"
PAIRS = [FROM + " --train_set_file {pairs}"]
TRIPLES = ["recall.py --params_path {0} --corpus_file {corpus} --similar_text_pair {pairs} --recall_num 50",
           "predict.py --params_path {0} --text_pair_file {pairs}",
           "scripts/mine_negatives.py --similar_text_pair {pairs} --positive_scores {2} --output_file {new} "
           "--recall_result_file recall_result_dir/recall_result.txt", FROM + " --train_set_file {3}"]
MAKE_FEWER_PAIRS = "scripts/make_pairs.py --corpus_file {corpus} --output_file {new}"
MAKE_PAIRS = f"{MAKE_FEWER_PAIRS} --pairs_per_document 20"
WHITE_TOKENS = (f"train.py {ENCODER} --epochs 0 --pooling first_avg --whiten --max_seq_length 512 "
                "--train_set_file {corpus}")
TRAIN_TOKENS = ("train.py --init_from_ckpt {0} --train_set_file {1} --max_seq_length 512 --batch_size 4096 --dropout 0 "
                "--output_dropout 0 --epochs {epochs} --learning_rate {rate}")
WHITE_LAYERS = (f"train.py {ENCODER} --epochs 0 --pooling first_last_avg --whiten --max_seq_length 128 "
                "--train_set_file {corpus}")
TRAIN_LAYERS = ("train.py --init_from_ckpt {0} --train_set_file {1} --max_seq_length 128 --batch_size 128 --epochs 1 "
                "--dropout 0 --output_dropout 0 --learning_rate {layers_rate}")
# For pairs of long documents and of short ones: those of scripts/own_texts.sh, which however reads short documents up
# to 64 tokens, and makes 20 pairs of a document with layers, too.
SCHEDULES = {"csl": {"epochs": 4, "rate": "4e-3", "layers_rate": "2e-4"},
             "lcqmc": {"epochs": 2, "rate": "2e-4", "layers_rate": "1e-4"}}
TRAIN_POOLER = (f"train.py {ENCODER} {PLAIN} --train_set_file {{0}} --max_seq_length 64 --epochs 1 "
                "--learning_rate 3e-4 --dropout 0 --output_dropout 0")
SEEN = 62  # characters of a document that an encoder of 64 tokens sees, roughly
SHORT = {f", first {SEEN} characters": "--corpus_file {corpus_seen} --similar_text_pair {queries_seen}"}
HYBRID = {f"{suffix} + BM25": f"{options} --hybrid_bm25" for suffix, options in {"": "", **SHORT}.items()}


LONG = "--max_seq_length 512"
PASSAGES = "--max_seq_length 64 --passages"
RECALLS_LONG = {"": LONG, ", passages": PASSAGES, " + BM25": f"{LONG} --hybrid_bm25",
                ", passages + BM25": f"{PASSAGES} --hybrid_bm25"}
RECALLS_SHORT = {"": "", ", 512 tokens": LONG, ", passages": "--passages", " + BM25": "--hybrid_bm25",
                 ", passages + BM25": "--passages --hybrid_bm25"}
PRECISIONS = {f", {name}": f"--precision {name}" for name in ("fp32", "bf16", "int8")}  # int8 needs openvino


class Recipe(NamedTuple):
    """What is run to train a checkpoint, and to recall with it.

    Attributes:
        commands: {0}, {1} and so on stand for what the commands before made, {new} for what this one makes, and
            {encoder}, {texts}, {pairs} and {corpus} for files, {epochs}, {rate} and {layers_rate} for the data set's
            SCHEDULES.
        recalls: by a suffix of the recipe's name, flags of recall.py. {corpus_seen} and {queries_seen} are files that
            have only as much of every document as an encoder sees.
    """

    commands: list[str]
    recalls: dict[str, str] = {"": ""}


RECIPES: dict[str, Recipe] = {
    "untrained": Recipe([f"train.py {ENCODER} {PLAIN} --epochs 0"]),
    "plain": Recipe([f"train.py {ENCODER} {PLAIN}"], {"": "", ", passages": "--passages"}),
    "plain, precisions": Recipe([f"train.py {ENCODER} {PLAIN}"], PRECISIONS),
    "plain, 4 epochs": Recipe([f"train.py {ENCODER} {PLAIN} --epochs 4"]),
    "mean": Recipe([f"train.py {ENCODER} --pooling mean"]),
    "first_last_avg": Recipe([f"train.py {ENCODER} --pooling first_last_avg"]),
    "crop": Recipe([f"train.py {ENCODER} {PLAIN} --crop_rate 0.5"]),
    "pairs": Recipe([f"train.py {ENCODER} {PLAIN}", *PAIRS]),
    "triples": Recipe([f"train.py {ENCODER} {PLAIN}", *TRIPLES]),
    "first_last_avg, pairs": Recipe([f"train.py {ENCODER} --pooling first_last_avg", *PAIRS]),
    "first_last_avg, triples": Recipe([f"train.py {ENCODER} --pooling first_last_avg", *TRIPLES]),
    "mlm": Recipe([MLM, f"train.py {PLAIN} --model_name_or_path {{0}}"]),
    "mean, whitened": Recipe([f"train.py {ENCODER} {WHITE} --pooling mean"]),
    "whitened": Recipe([f"train.py {ENCODER} {WHITE}"], {**RECALLS_SHORT, **SHORT, **HYBRID}),
    "whitened, 128 numbers": Recipe([f"train.py {ENCODER} {WHITE} --whiten 128"]),
    "whitened, 64 numbers": Recipe([f"train.py {ENCODER} {WHITE} --whiten 64"]),
    "whitened, 32 numbers": Recipe([f"train.py {ENCODER} {WHITE} --whiten 32"]),
    "whitened, precisions": Recipe([f"train.py {ENCODER} {WHITE}"], PRECISIONS),
    "first_avg, whitened": Recipe([f"train.py {ENCODER} {WHITE} --pooling first_avg"], RECALLS_SHORT),
    "first_avg, whitened at 512": Recipe(
        [f"train.py {ENCODER} {WHITE} --pooling first_avg --max_seq_length 512"],
        {"": LONG, " + BM25": f"{LONG} --hybrid_bm25"}),
    "first_avg, whitened on corpus.csv": Recipe([WHITE_TOKENS], {"": LONG, " + BM25": f"{LONG} --hybrid_bm25"}),
    "first_avg, pairs of documents": Recipe([WHITE_TOKENS, MAKE_PAIRS, TRAIN_TOKENS], RECALLS_LONG),
    "first_avg, pairs of documents, whitened again": Recipe(
        [WHITE_TOKENS, MAKE_PAIRS, f"{TRAIN_TOKENS} --whiten"], RECALLS_LONG),
    "first_last_avg, whitened on corpus.csv": Recipe(
        [WHITE_LAYERS], {"": "--max_seq_length 128", " + BM25": "--max_seq_length 128 --hybrid_bm25"}),
    "first_last_avg, pairs of documents": Recipe(
        [WHITE_LAYERS, MAKE_FEWER_PAIRS, TRAIN_LAYERS],
        {"": "--max_seq_length 128", " + BM25": "--max_seq_length 128 --hybrid_bm25"}),
    "pooler, pairs of documents": Recipe([MAKE_PAIRS, TRAIN_POOLER]),
    "pooler, pairs of documents, whitened": Recipe([MAKE_PAIRS, f"{TRAIN_POOLER} --whiten"]),
    "whitened, pairs": Recipe([f"train.py {ENCODER} {WHITE}", *PAIRS]),
    "whitened, triples": Recipe([f"train.py {ENCODER} {WHITE}", *TRIPLES]),
    "whitened, SimCSE": Recipe([f"train.py {ENCODER} {WHITE}", FROM + " --learning_rate 1e-5 --crop_rate 0.5"]),
    "mlm, whitened": Recipe([MLM, f"train.py {WHITE} --model_name_or_path {{0}}"]),
}
# fp32: what --precision auto is depends on the processor.
RECALL = "--device cpu --precision fp32 --ann_engine exact"
# Flags of all commands of a script; those of a recipe come after them and win.
TRAINING = ("--device cpu --batch_size 64 --max_seq_length 64 --save_steps 1000000 --save_dir {new} "
            "--train_set_file {texts}")
COMMON = {"train.py": TRAINING, "scripts/pretrain.py": TRAINING,
          "recall.py": f"{RECALL} --max_seq_length 64",
          "predict.py": "--device cpu --max_seq_length 64", "scripts/mine_negatives.py": "",
          "scripts/make_pairs.py": ""}
# Scripts that have --seed.
SEEDED = ("train.py", "scripts/pretrain.py", "scripts/make_pairs.py")


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="recipe",
                        help=f"what to train, of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--data_dir", type=flags.folder, required=True, help="folder of csl/recall and lcqmc/recall")
    parser.add_argument("--data_sets", nargs="+", choices=TRAINING_FILES, default=list(TRAINING_FILES),
                        help="which of them")
    parser.add_argument("--seeds", nargs="+", type=flags.non_negative_int, default=[1000, 1001, 1002],
                        help="random seeds")
    parser.add_argument("--lines", type=flags.non_negative_int, default=0, help="training lines to take; 0: all")
    parser.add_argument("--json", default="quality.json", help="results, read and added to")
    parser.add_argument("--show", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in RECIPES]
    if unknown:
        parser.error(f"no such recipe: {unknown[0]}; there are {', '.join(RECIPES)}")
    return args


def run(script: str, words: list[str], folder: str) -> str:
    """Run a script of the project in `folder`, and return its stdout."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *words], cwd=folder, text=True,
                          capture_output=True)
    if done.returncode:
        raise console.InputError(f"{script} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def newest_checkpoint(folder: str) -> str:
    """Return the last checkpoint that a training run left, the whitened one if there is one."""
    names = sorted(os.listdir(folder), key=lambda name: (name.endswith("_whitened"), int(name.split("_")[1])))
    return os.path.join(folder, names[-1])


def write_files(args: argparse.Namespace, data_set: str, folder: str) -> dict[str, Any]:
    """Write training texts, training pairs, and queries that are not among these, to `folder`.

    CSL's train.csv has other titles than dev.csv. LCQMC's dev_labeled.csv is a part of dev.csv, which is left out of
    the queries.

    Returns:
        The paths of all files of the data set and its SCHEDULES, by the names that RECIPES has for them.
    """
    source = os.path.abspath(os.path.join(args.data_dir, data_set, "recall"))
    texts = list(textfile.TextFile(f"{source}/{TRAINING_FILES[data_set]}", "--data_dir"))
    corpus = textfile.TextFile(f"{source}/corpus.csv", "--data_dir")
    queries = textfile.read_text_pairs(f"{source}/dev.csv", "--data_dir")
    if data_set == "csl":
        pairs = textfile.read_text_pairs(f"{source}/train.csv", "--data_dir")
    else:
        rows = textfile.read_rows(f"{source}/dev_labeled.csv", 3, "--data_dir", textfile.find_label_problem)
        labeled = [row.fields for row in rows]
        pairs = [(query, title) for query, title, label in labeled if float(label)]
        known = {text for query, title, _ in labeled for text in (query, title)}
        queries = [pair for pair in queries if not known.intersection(pair)]
    contents = {"texts": [(text,) for text in texts[: args.lines or None]], "pairs": pairs, "queries": queries,
                "corpus_seen": [(text[:SEEN],) for text in corpus],
                "queries_seen": [(query, target[:SEEN]) for query, target in queries]}
    for name, rows in contents.items():
        write_rows(f"{folder}/{name}.csv", rows)
    return {"encoder": os.path.join(ROOT, "pretrained", "ernie_mini_zh"), "corpus": f"{source}/corpus.csv",
            **SCHEDULES[data_set], **{name: f"{folder}/{name}.csv" for name in contents}}


def write_rows(path: str, rows: Iterable[Iterable[str]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write("\t".join(row) + "\n")


def split_commands(name: str) -> list[list[str]]:
    """Return a recipe's commands as lists of words, the script first."""
    commands = []
    for command in RECIPES[name].commands:
        script, *words = command.split()
        commands.append([script, *COMMON[script].split(), *words])
    return commands


def train(name: str, seed: int, paths: dict[str, Any], folder: str) -> str:
    """Run a recipe's commands, and return the checkpoint or the file that the last of them made."""
    made: list[str] = []
    for number, (script, *templates) in enumerate(split_commands(name)):
        new = f"{folder}/{number}"
        words = [template.format(*made, new=new, **paths) for template in templates]
        trains = COMMON[script] == TRAINING
        if script in SEEDED:
            words += ["--seed", str(seed)]
        printed = run(script, words, folder)
        if script == "predict.py":  # mine_negatives.py reads what it prints
            with open(new, "w", encoding="utf-8") as file:
                file.write(printed)
        made.append(newest_checkpoint(new) if trains else new)
    return made[-1]


def measure(args: argparse.Namespace, data_set: str, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Train and recall by a recipe, and return the metrics in percent, by the suffixes of its name."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(args, data_set, folder)
        checkpoint = train(name, seed, paths, folder)
        for suffix, template in RECIPES[name].recalls.items():
            run("recall.py", [*RECALL.split(), "--params_path", checkpoint, "--corpus_file", paths["corpus"],
                              "--similar_text_pair", paths["queries"], "--recall_num", "50",
                              *template.format(**paths).split()], folder)
            queries = "queries_seen" if "{queries_seen}" in template else "queries"
            results[suffix] = evaluate(paths[queries], folder)
    return results


def evaluate(queries: str, folder: str) -> dict[str, float]:
    """Return what evaluate.py prints about the recall result in `folder`."""
    printed = run("evaluate.py", ["--similar_text_pair", queries, "--metrics", "recall,mrr"], folder)
    values = {}
    for line in printed.splitlines():
        name, value = line.split("=")
        values[name] = float(value)
    return values


def measure_bm25(args: argparse.Namespace, data_set: str) -> dict[str, dict[str, float]]:
    """Recall by BM25 alone, over whole documents and over as much of them as an encoder sees."""
    from simcse.index.bm25 import Bm25

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(args, data_set, folder)
        os.makedirs(f"{folder}/recall_result_dir")
        queries = textfile.distinct(query for query, _ in textfile.read_text_pairs(paths["queries"], "--data_dir"))
        for suffix, part in zip(("", *SHORT), ("", "_seen")):
            corpus = textfile.TextFile(paths[f"corpus{part}"], "--data_dir")
            lines = []
            for query, rows, scores in zip(queries, *Bm25(corpus).search(queries, 50)):
                for row, score in zip(rows, scores):
                    if row >= 0:
                        lines.append((query, corpus[row], str(score)))
            write_rows(f"{folder}/recall_result_dir/recall_result.txt", lines)
            results[suffix] = evaluate(paths[f"queries{part}"], folder)
    return results


def run_key(args: argparse.Namespace, data_set: str, name: str, seed: int) -> str:
    """Return the name of a run in --json, which differs if its commands, training lines or --data_dir differ."""
    settings = {field: value for field, value in SCHEDULES[data_set].items()
                if any(f"{{{field}}}" in command for command in RECIPES[name].commands)}
    commands = json.dumps([split_commands(name), RECIPES[name].recalls, settings, args.lines,
                           os.path.abspath(args.data_dir)])
    digest = hashlib.sha256(commands.encode()).hexdigest()[:8]
    return f"{data_set}/{name}/{seed}/{digest}"


def save_results(results: dict, path: str) -> None:
    with files.new_file(path) as file:
        json.dump(results, file, ensure_ascii=False, indent=1)


def format_table(results: dict, args: argparse.Namespace, names: list[str]) -> str:
    """Return a table in Markdown: the mean over the seeds, and their standard deviation."""
    lines = []
    for data_set in args.data_sets:
        lines += ["", f"| {data_set} | {' | '.join(METRICS)} | seeds |", "| --- " * (len(METRICS) + 2) + "|"]
        for name in names:
            if name == "BM25":
                keys = [f"{data_set}/BM25"]
            else:
                keys = [run_key(args, data_set, name, seed) for seed in args.seeds]
            runs = [results[key] for key in keys]
            for suffix in runs[0]:
                values = np.array([[run[suffix][metric] for metric in METRICS] for run in runs])
                means = values.mean(axis=0)
                spreads = values.std(axis=0, ddof=1 if len(runs) > 1 else 0)
                cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means, spreads)]
                lines.append(f"| {name}{suffix} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def show_commands(names: list[str]) -> None:
    """Print the commands of recipes."""
    for name in names:
        print(f"{name}:")
        for command in split_commands(name):
            print(f"    python {' '.join(command)}")
        for template in RECIPES[name].recalls.values():
            print(" ".join(["    python recall.py ...", *template.split()]))


def main() -> None:
    args = parse_args()
    names = args.names or list(RECIPES)
    if args.show:
        show_commands(names)
        return
    results: dict[str, dict] = {}
    if os.path.exists(args.json):
        with open(args.json, encoding="utf-8") as file:
            results = json.load(file)
    for seed in args.seeds:
        for name in names:
            for data_set in args.data_sets:
                key = run_key(args, data_set, name, seed)
                if key in results:
                    continue
                results[key] = measure(args, data_set, name, seed)
                console.log(f"{key}: {results[key]}")
                save_results(results, args.json)
    for data_set in args.data_sets:
        results[f"{data_set}/BM25"] = measure_bm25(args, data_set)
    save_results(results, args.json)
    print(format_table(results, args, ["BM25", *names]))


if __name__ == "__main__":
    console.run(main)
