"""Measure this project against the original's way of doing the same, both in one run.

    python benchmarks/run.py                                        # all of it, under half an hour on 2 cores
    python benchmarks/run.py encode index --json benchmarks.json    # some of it
    python benchmarks/run.py encode int8 train --peer_python other/bin/python       # and sentence-transformers, torch
    python benchmarks/run.py index --peer_python other/bin/python --vectors 1000000 # and usearch, faiss

Each side runs in processes of its own, pass by pass in turn, and medians are compared. A ratio above 1 is in this
project's favour. The encoder has ERNIE-base's dimensions and random weights, except where `ernie_mini_zh` is named.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from bench import BASE, FILES, MINI, ROOT, Bench  # first: it makes the project importable

from ann_util import SHARDS  # isort: skip
from simcse import console, files, flags
from simcse.index.settings import HNSW_EF, HNSW_M
from simcse.machine import CPU_HAS_BF16

import graphs
from serving import serving


def tokenize(bench: Bench) -> None:
    cases = {"titles": bench.texts("titles", 1000), "corpus": bench.texts("corpus", 1000)}
    bench.in_turn("tokenize", "texts/s", 3, lambda: bench.side("ours", "tokenize", encoder=MINI, cases=cases),
                  {"the original": lambda: bench.side("original", "tokenize", encoder=MINI, cases=cases)})


def encoding_cases(bench: Bench) -> dict[str, list[str]]:
    return {"corpus": bench.texts("corpus", 256), "titles": bench.texts("titles", 512)}


def encoding(bench: Bench, module: str = "ours", function: str = "encode", **arguments) -> Callable:
    """Passes over `encoding_cases` by a function of ours.py, or of peer.py."""
    of_side = {"ours": {"checkpoint": bench.checkpoint}, "peer": {
        "python": bench.args.peer_python, "vocab": f"{MINI}/vocab.txt", "sizes": BASE}}[module]
    return bench.passes(module, function, cases=encoding_cases(bench), **of_side, **arguments)


def encode(bench: Bench) -> None:
    bench.base()

    def original(**env: str) -> Callable[[], dict[str, float]]:  # of every eighth text, being slow
        return bench.passes("original", "encode", env=env, encoder=bench.encoder,
                            cases={name: texts[::8] for name, texts in encoding_cases(bench).items()})

    references = {"the original": original()}
    if told := mkl_setting():
        references[f"the original with MKL_DEBUG_CPU_TYPE={told}"] = original(MKL_DEBUG_CPU_TYPE=told)
    if bench.args.peer_python:
        references["sentence-transformers, torch bf16"] = encoding(bench, "peer", kind="torch")
    references["OpenVINO by hand"] = encoding(bench, function="encode_openvino", int8=False)
    references["Paddle Inference"] = encoding(bench, precision="auto", paddle_inference=True)
    references["this project in fp32"] = encoding(bench, precision="fp32")
    bench.in_turn("encode", "texts/s", 5, encoding(bench, precision="auto"), references)


def int8(bench: Bench) -> None:
    bench.base()
    references = {"this project in bf16 or fp32": encoding(bench, precision="auto"),
                  "the same, Paddle Inference": encoding(bench, precision="auto", paddle_inference=True),
                  "OpenVINO int8 by hand": encoding(bench, function="encode_openvino", int8=True)}
    if bench.args.peer_python:
        references["sentence-transformers, OpenVINO int8"] = encoding(bench, "peer", kind="openvino")
    bench.in_turn("int8", "texts/s", 5, encoding(bench, precision="int8"), references)


def mkl_setting() -> str | None:
    """What model.py sets for paddle's MKL on this processor; None where it sets nothing."""
    show = "import model, os; print(os.environ.get('MKL_DEBUG_CPU_TYPE', ''))"
    return subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


def latency(bench: Bench) -> None:
    """Of one text, and of 32, in deploy/python: the graph for Paddle Inference, and that in int8."""
    bench.base()
    texts = bench.write("calibration", bench.texts("corpus", 256))
    graphs_of = {"": [], ", int8": ["--format", "openvino", "--precision", "int8", "--calibration_file", texts]}

    def ours() -> dict[str, float]:
        found, logs = {}, f"{bench.scratch}/latency"
        for kind, more in graphs_of.items():
            folder = f"{bench.scratch}/graph{kind}"
            if not os.path.isdir(folder):
                seconds_of_export(bench.checkpoint, folder, *more)
            bench.stage("deploy/python/predict.py", "--model_dir", folder, "--benchmark", "true", "--save_log_path",
                        logs)
            newest = max((os.path.join(logs, name) for name in os.listdir(logs)), key=os.path.getmtime)
            with open(newest, encoding="utf-8") as file:
                found.update({f"batch {row['batch_size']}{kind}": row["p50_ms"] for row in json.load(file)["results"]})
        return found

    def original() -> dict[str, float]:
        found, = bench.side("original", "latency", encoder=bench.encoder, text=flags.README_TEXT,
                            folder=f"{bench.scratch}/original", runs=20).values()
        return {f"batch 1{kind}": found for kind in graphs_of}

    os.makedirs(f"{bench.scratch}/original", exist_ok=True)
    bench.in_turn("latency", "ms", 3, ours, {"the original's defaults": original})


def train(bench: Bench) -> None:
    """Ours is train.py itself, by the speed that it logs of its second ten steps."""
    from visualdl import LogReader

    bench.base()
    for kind, batch, length in (("corpus", 32, 32), ("training", 64, 64)):  # texts that fill 32 tokens; sentences
        texts = bench.texts(kind, 20 * batch)
        path, case = bench.write("texts", texts), f"batch {batch}, {length} tokens"

        def ours(path=path, batch=batch, length=length, case=case) -> dict[str, float]:
            log = tempfile.mkdtemp(dir=bench.scratch)
            bench.stage("train.py", "--model_name_or_path", bench.encoder, "--train_set_file", path,
                        "--max_seq_length", length, "--batch_size", batch, "--output_emb_size", 256,
                        "--save_dir", f"{bench.scratch}/trained", "--visualdl_dir", log)
            name, = os.listdir(log)
            return {case: batch * LogReader(file_path=f"{log}/{name}").get_data("scalar", "train/speed")[1].value}

        references = {}
        if peer := bench.args.peer_python:
            references = {f"torch {precision}": bench.passes(
                "peer", "train", python=peer, vocab=f"{MINI}/vocab.txt", sizes=BASE, texts=texts, batch=batch,
                length=length, bf16=precision == "bf16") for precision in ("fp32", "bf16")[: 1 + CPU_HAS_BF16]}
        if batch == 32:  # the other takes it minutes a step
            references["the original"] = partial(bench.side, "original", "train", encoder=bench.encoder, texts=texts,
                                                 batch=batch, length=length, steps=1)
        bench.in_turn("train", "samples/s", 3, ours, references)


def index(bench: Bench) -> None:
    corpus, queries = bench.texts("corpus", 10000), bench.texts("titles", 1000)
    of_texts = {"count": 0, "checkpoint": bench.mini(), "texts": corpus, "queries": queries}
    count = bench.args.vectors
    of_count = {"count": count, "checkpoint": None, "texts": [], "queries": []}
    for case, repeats, made_of in ((f"{len(corpus)} documents, ernie_mini_zh", 3, of_texts),
                                   (f"{count:,} clustered vectors of 256", 1, of_count)):
        folder = tempfile.mkdtemp(dir=bench.scratch)
        bench.side("ours", "vectors", folder=folder, **made_of)

        def side(module: str, function: str, m: int = HNSW_M.default, python: str = sys.executable,
                 **more) -> dict[str, float]:
            found = bench.side(module, function, python=python, folder=folder, m=m,  # noqa: B023
                               ef=HNSW_EF.default, **more)
            return {f"{what}, {case}": value for what, value in found.items()}  # noqa: B023

        references = {"hnswlib alone": partial(side, "ours", "index_alone"),
                      "the original's M=100, ef=100": partial(side, "ours", "index_alone", m=100)}
        if peer := bench.args.peer_python:
            references["usearch"] = partial(side, "peer", "index_usearch", python=peer)
            for kind in ("HNSW", "IVF"):
                references[f"faiss {kind}"] = partial(side, "peer", "index_faiss", python=peer, kind=kind)
        bench.in_turn("index", {f"{what}, {case}": unit for what, unit in graphs.UNITS.items()}, repeats,
                      partial(side, "ours", "index", shards=SHARDS), references)
        shutil.rmtree(folder)


def short_lines(bench: Bench, count: int) -> str:
    """A file of so many lines of four characters."""
    words = bench.texts("titles", 1000)
    return bench.write("lines", (f"{words[n % len(words)][:4]}{n}" for n in range(count)))


def memory(bench: Bench) -> None:
    """Peak memory of inference.py; the reference is what its vectors take plus 1 GB."""
    checkpoint = bench.mini()
    for lines in (10_000, 100_000, 1_000_000):
        _, peak, _ = bench.stage("inference.py", "--params_path", checkpoint, "--input_file", short_lines(bench, lines),
                                 "--output_file", f"{bench.scratch}/vectors.npy")
        bench.add("memory", f"{lines:,} short lines, ernie_mini_zh, against vectors + 1 GB", peak,
                  lines * 256 * 4 / 2**20 + 1024, "MB")


def static(bench: Bench) -> None:
    """Without layers, pooling first_avg, whole processes: inference.py from a file to kept vectors, against the same
    encoder with its layers, of a tenth of the lines; and recall.py from a million lines to a kept index."""
    cases = {"titles": (64, 200_000), "corpus": (512, 20_000)}

    def side(pooling: str, part: int) -> dict[str, float]:
        speeds, checkpoint = {}, bench.mini(pooling)
        for kind, (length, most) in cases.items():
            texts, count = bench.texts(kind, 10_000), most // part
            path = bench.write(kind, (texts[n % len(texts)] for n in range(count)))
            seconds, _, _ = bench.stage("inference.py", "--params_path", checkpoint, "--input_file", path,
                                        "--max_seq_length", length, "--output_file", f"{bench.scratch}/vectors.npy")
            speeds[f"{kind}, {length} tokens, to kept vectors"] = count / seconds
        return speeds

    bench.in_turn("static", "texts/s", 3, lambda: side("first_avg", 1),
                  {"its layers, first_last_avg": lambda: side("first_last_avg", 10)})
    seconds, _, _ = bench.stage("recall.py", "--params_path", bench.mini("first_avg"), "--corpus_file", short_lines(
        bench, 1_000_000), "--query", flags.README_TEXT, "--index_path", f"{bench.scratch}/index")
    bench.add("static", "1,000,000 short lines to a kept index, against two minutes", seconds, 120, "s")


def growth(bench: Bench) -> None:
    """recall.py as a whole, by the size of the corpus; the reference grows in proportion to it, from the smallest."""
    checkpoint, first = bench.mini(), None
    for lines in (10_000, 100_000, 1_000_000):
        seconds, peak, _ = bench.stage(
            "recall.py", "--params_path", checkpoint, "--corpus_file", short_lines(bench, lines), "--similar_text_pair",
            os.path.join(bench.args.data_dir, FILES["titles"]), "--recall_result_dir", bench.scratch)
        first = first or (seconds, peak)
        case = f"{lines:,} short documents, against in proportion to 10,000"
        bench.add("growth", f"recall.py, {case}", seconds, first[0] * lines / 10_000, "s")
        bench.add("growth", f"recall.py, {case}", peak, first[1] * lines / 10_000, "MB")


def lines(bench: Bench) -> None:
    """Opening a training file of 8 million lines, the size of the original's."""
    texts, count, path = bench.texts("training", 100_000), 8_000_000, f"{bench.scratch}/lines"
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, len(texts)):
            file.writelines(text + "\n" for text in texts[: count - start])
    ours, reference = (bench.side(side, "lines", path=path) for side in ("ours", "original"))
    os.remove(path)
    for unit in ("s", "MB"):
        bench.add("lines", f"{count:,} training texts to the first batch, against the original", ours[unit],
                  reference[unit], unit)


def timed_side(bench: Bench, function: str, **arguments) -> float:
    """Seconds that a function of original.py takes as a process."""
    started = time.perf_counter()
    bench.side("original", function, **arguments)
    return time.perf_counter() - started


def start(bench: Bench) -> None:
    """What a stage takes from its start to its first result, with little to do: the first time for a checkpoint, and
    again; against the original's way of getting as far."""
    def seconds(*command: str, codes: tuple[int, ...] = (0,)) -> float:
        started = time.perf_counter()
        result = subprocess.run([sys.executable, *command], capture_output=True, cwd=bench.scratch)
        if result.returncode not in codes:
            raise console.InputError(f"{command} failed:\n{result.stderr.decode()[-2000:]}")
        return time.perf_counter() - started

    bench.in_turn("start", "s", 3, lambda: {"recall.py --help": seconds(f"{ROOT}/recall.py", "--help"),
                                            "train.py, a typo": seconds(f"{ROOT}/train.py", "--epoch", codes=(2,))},
                  {"importing paddle and paddlenlp": lambda: dict.fromkeys(
                      ("recall.py --help", "train.py, a typo"), seconds("-c", "import paddle, paddlenlp"))})
    bench.base()
    for name, encoder, checkpoint in (("ernie_mini_zh", MINI, bench.mini()),
                                      ("ERNIE-base's size", bench.encoder, bench.checkpoint)):
        start_of_stages(bench, name, encoder, checkpoint)


def start_of_stages(bench: Bench, name: str, encoder: str, checkpoint: str) -> None:
    folder = tempfile.mkdtemp(dir=bench.scratch)
    for file, lines in (("texts", [flags.README_TEXT]), ("pairs", [f"{flags.README_TEXT}\t语义检索"])):
        with open(f"{folder}/{file}", "w", encoding="utf-8") as written:
            written.writelines(line + "\n" for line in lines)
    model, index = ["--params_path", checkpoint], ["--index_path", f"{folder}/index"]
    bench.stage("recall.py", *model, *index, "--corpus_file", f"{folder}/texts", "--query", "语义检索")
    training = ["--model_name_or_path", encoder, "--train_set_file", f"{folder}/texts", "--epochs", 0, "--save_dir",
                f"{folder}/trained", "--visualdl_dir", f"{folder}/log"]

    def ours() -> dict[str, float]:
        shutil.rmtree(f"{checkpoint}/model_state.graph", ignore_errors=True)
        stages = {"inference.py, a checkpoint's first time": ["inference.py", *model, "--text", flags.README_TEXT],
                  "inference.py": ["inference.py", *model, "--text", flags.README_TEXT],
                  "predict.py": ["predict.py", *model, "--text_pair_file", f"{folder}/pairs"],
                  "recall.py --query, a kept index": ["recall.py", *model, *index, "--query", "语义检索"],
                  "deploy/python/predict.py": ["deploy/python/predict.py", "--model_dir", f"{folder}/exported",
                                               "--precision", "auto", "--text", flags.README_TEXT],
                  "train.py --epochs 0": ["train.py", *training]}
        export = seconds_of_export(checkpoint, f"{folder}/exported")
        return {f"export_model.py, {name}": export,
                **{f"{stage}, {name}": bench.stage(*words)[0] for stage, words in stages.items()}}

    def original() -> dict[str, float]:
        os.makedirs(f"{folder}/original", exist_ok=True)
        export = timed_side(bench, "export", encoder=encoder, folder=f"{folder}/original")
        deployed = timed_side(bench, "deployed", encoder=encoder, text=flags.README_TEXT, folder=f"{folder}/original")
        training = timed_side(bench, "before_training", encoder=encoder)
        one, two = (timed_side(bench, "first_result", encoder=encoder, texts=texts)
                    for texts in ([flags.README_TEXT], [flags.README_TEXT, "语义检索"]))
        stages = {"export_model.py": export, "inference.py, a checkpoint's first time": one, "inference.py": one,
                  "predict.py": two, "recall.py --query, a kept index": one, "deploy/python/predict.py": deployed,
                  "train.py --epochs 0": training}
        return {f"{stage}, {name}": seconds for stage, seconds in stages.items()}

    bench.in_turn("start", "s", 3, ours, {"the original's way": original})


def seconds_of_export(checkpoint: str, folder: str, *more: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, f"{ROOT}/export_model.py", "--params_path", checkpoint, "--output_path", folder,
                    *more], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def shapes(bench: Bench) -> None:
    bench.base()
    arguments = {"checkpoint": bench.checkpoint, "batches": [1, 4, 16, 64], "lengths": [16, 32, 64, 128]}
    bench.in_turn("shapes", "texts/s", 1, lambda: bench.side("ours", "shapes", precision="auto", **arguments), {
        "fp32": lambda: bench.side("ours", "shapes", precision="fp32", **arguments)})


ALL = {each.__name__: each for each in (tokenize, encode, int8, latency, train, index, memory, static, growth, lines,
                                        start, shapes, serving)}


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"what to measure, of {', '.join(ALL)}; none: all")
    parser.add_argument("--json", default=None, help="write the rows there, with the machine's description")
    parser.add_argument("--data_dir", type=flags.folder, default=None,
                        help="folder of train_unsupervised.csv, corpus.csv and dev.csv; None: generated sample data")
    parser.add_argument("--peer_python", type=flags.readable_file, default=None,
                        help="a Python with what is measured beside this project: torch, datasets and "
                        "sentence-transformers[openvino] for `encode`, `int8` and `train`, usearch and faiss-cpu for "
                        "`index`; None: they are not measured")
    parser.add_argument("--vectors", type=flags.positive_int, default=300_000, help="clustered ones, for `index`")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in ALL]:
        parser.error(f"no such measurement: {', '.join(unknown)}; there are {', '.join(ALL)}")
    for name in FILES.values() if args.data_dir else ():
        if not os.path.isfile(os.path.join(args.data_dir, name)):
            parser.error(f"argument --data_dir: {args.data_dir} has no {name}")
    return args


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if not args.data_dir:
            args.data_dir = f"{scratch}/sample"
            subprocess.run([sys.executable, f"{ROOT}/scripts/make_sample_data.py", args.data_dir], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        bench = Bench(args, scratch)
        print(f"{bench.machine}\n{'name':9} {'case':66} {'ours':>10} {'reference':>10} {'unit':10} {'ratio':>7}")
        for name in args.names or ALL:
            started = time.perf_counter()
            with bench.processes:
                ALL[name](bench)
            console.log(f"{name}: {time.perf_counter() - started:.0f} s")
    if args.json:
        with files.new_file(args.json) as file:
            json.dump(bench.rows, file, indent=1)


if __name__ == "__main__":
    console.run(main)
