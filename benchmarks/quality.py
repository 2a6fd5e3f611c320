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

import numpy as np  # noqa: E402

import cli  # noqa: E402
import console  # noqa: E402
import data  # noqa: E402

MEASURES = [*(f"recall@{k}" for k in data.RECALL_KS), "mrr"]
TRAINING_FILES = {"csl": "train_unsupervised.csv", "lcqmc": "corpus.csv"}
START, PLAIN = "--model_name_or_path {encoder}", "--output_emb_size 256 --infer_with_fc_pooler"
WHITE = "--epochs 0 --pooling first_last_avg --whiten"
SIZES = {f" at {size}": f"--output_emb_size {size}" for size in (128, 64, 32)}
# Train.py's flags, a command each, {0} being the checkpoint of the first, {texts} and {pairs} files of the data set;
# and recall.py's flags, by what is added to the recipe's name.
RECIPES: dict[str, tuple[list[str], dict[str, str]]] = {
    "untrained": ([f"{START} {PLAIN} --epochs 0"], {"": ""}),
    "plain": ([f"{START} {PLAIN}"], {"": ""}),
    "plain, dup_rate 0.3": ([f"{START} {PLAIN} --dup_rate 0.3"], {"": ""}),
    "plain, crop_rate 0.5": ([f"{START} {PLAIN} --crop_rate 0.5"], {"": ""}),
    "plain, symmetric": ([f"{START} {PLAIN} --symmetric_loss"], {"": ""}),
    "plain, scale 10 to 40": ([f"{START} {PLAIN} --scale 10 --final_scale 40"], {"": ""}),
    "plain, whitened": ([f"{START} {PLAIN} --whiten"], {"": ""}),
    "plain, matryoshka": ([f"{START} {PLAIN} --matryoshka_dims 128,64,32"], {"": "", **SIZES}),
    "pooling cls": ([f"{START} --pooling cls"], {"": ""}),
    "pooling mean": ([f"{START} --pooling mean"], {"": ""}),
    "pooling first_last_avg": ([f"{START} --pooling first_last_avg"], {"": ""}),
    "pooling first_last_avg, whitened": ([f"{START} --pooling first_last_avg --whiten"], {"": ""}),
    "mean, whitened, no training": ([f"{START} --epochs 0 --pooling mean --whiten"], {"": "", **SIZES}),
    "first_last_avg, whitened, no training": ([f"{START} {WHITE}"], {"": "", **SIZES}),
    "whitened, then SimCSE": ([f"{START} {WHITE}", "--init_from_ckpt {0} --learning_rate 1e-5 --crop_rate 0.5"],
                              {"": ""}),
    "mlm, then whitened": ([f"{START} --objective mlm --learning_rate 1e-4 --warmup_proportion 0.1 --epochs 2",
                            "--model_name_or_path {0} " + WHITE], {"": ""}),
    "mlm, then plain": ([f"{START} --objective mlm --learning_rate 1e-4 --warmup_proportion 0.1 --epochs 2",
                         "--model_name_or_path {0} " + PLAIN], {"": ""}),
    "plain, then pairs": ([f"{START} {PLAIN}", "--init_from_ckpt {0} --infer_with_fc_pooler --train_set_file {pairs}"],
                          {"": ""}),
    "whitened, then pairs": ([f"{START} {WHITE}", "--init_from_ckpt {0} --train_set_file {pairs}"], {"": ""}),
}
COMMON = "--device cpu --batch_size 64 --save_steps 1000000 --eval_steps 1000000 --max_seq_length 64"


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="recipe", help=f"of {', '.join(RECIPES)}; none: all")
    parser.add_argument("--data_dir", type=cli.folder, required=True, help="folder of csl/recall and lcqmc/recall")
    parser.add_argument("--data_sets", nargs="+", choices=TRAINING_FILES, default=list(TRAINING_FILES),
                        help="which of them")
    parser.add_argument("--seeds", nargs="+", type=cli.natural_int, default=[1000, 1001, 1002], help="random seeds")
    parser.add_argument("--lines", type=cli.natural_int, default=0, help="training lines to take; 0: all")
    parser.add_argument("--jobs", type=cli.positive_int, default=1, help="runs side by side, a share of the cores each")
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
             **{name: f"{folder}/{name}.csv" for name in ("texts", "pairs", "queries")}}
    texts = data.read_texts(f"{source}/{TRAINING_FILES[data_set]}", "--data_dir")
    queries = data.read_text_pairs(f"{source}/dev.csv", "--data_dir")
    if data_set == "csl":
        pairs = data.read_text_pairs(f"{source}/train.csv", "--data_dir")
    else:
        labeled = data.read_labeled_pairs(f"{source}/dev_labeled.csv", "--data_dir")
        pairs = [(query, title) for query, title, label in labeled if label]
        known = {text for query, title, _ in labeled for text in (query, title)}
        queries = [pair for pair in queries if not known.intersection(pair)]
    for name, rows in (("texts", [(text,) for text in texts[: args.lines or None]]), ("pairs", pairs),
                       ("queries", queries)):
        with open(files[name], "w", encoding="utf-8") as file:
            file.writelines("\t".join(row) + "\n" for row in rows)
    return files


def training(name: str) -> list[list[str]]:
    """The flags of a recipe's train.py commands."""
    return [f"{COMMON} {'' if '--train_set_file' in flags else '--train_set_file {texts} '}{flags}".split()
            for flags in RECIPES[name][0]]


def measure(args: argparse.Namespace, data_set: str, name: str, seed: int) -> dict[str, dict[str, float]]:
    """A recipe's figures on a data set, in percent, by what is added to its name."""
    threads = ["--cpu_threads", str(max(1, (os.cpu_count() or 1) // args.jobs))]
    with tempfile.TemporaryDirectory() as folder:
        files, made = prepare(args, data_set, folder), []
        for number, flags in enumerate(training(name)):
            flags = [flag.format(*made, **files) for flag in flags]
            run("train.py", [*flags, "--seed", str(seed), "--save_dir", f"{folder}/{number}", *threads], folder)
            made.append(newest(f"{folder}/{number}"))
        figures = {}
        for suffix, flags in RECIPES[name][1].items():
            run("recall.py", ["--device", "cpu", "--params_path", made[-1], "--corpus_file", files["corpus"],
                              "--similar_text_pair", files["queries"], "--recall_num", "50", "--ann_engine", "exact",
                              *threads, *flags.format(**files).split()], folder)
            printed = run("evaluate.py", ["--similar_text_pair", files["queries"], "--metrics", "recall,mrr"], folder)
            figures[suffix] = {name: float(value) for name, value in (line.split("=") for line in printed.splitlines())}
    return figures


def table(results: dict, args: argparse.Namespace, names: list[str]) -> str:
    """Markdown: the mean over the seeds and their standard deviation."""
    lines = []
    for data_set in args.data_sets:
        lines += ["", f"| {data_set} | {' | '.join(MEASURES)} | seeds |", "| --- " * (len(MEASURES) + 2) + "|"]
        for name in names:
            runs = [values for key, values in results.items() if key.startswith(f"{data_set}/{name}/")]
            for suffix in RECIPES[name][1] if runs else ():
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
            print(f"{name}:", *(f"    python train.py {' '.join(flags)}" for flags in training(name)),
                  *(f"    python recall.py ... {flags}".rstrip() for flags in RECIPES[name][1].values()), sep="\n")
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
            with data.new_file(args.json) as file:
                json.dump(results, file, ensure_ascii=False, indent=1)
    print(table(results, args, names))


if __name__ == "__main__":
    console.run(main)
