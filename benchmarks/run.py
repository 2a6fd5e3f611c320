"""Measure this project against the original's way of doing the same, both in one run.

    python benchmarks/run.py                                        # all of it, under half an hour on 2 cores
    python benchmarks/run.py encode index --json benchmarks.json    # some of it
    python benchmarks/run.py encode int8 train --peer_python other/bin/python       # and sentence-transformers, torch
    python benchmarks/run.py index --peer_python other/bin/python --vectors 1000000 # and usearch, faiss

Each side runs in processes of its own, pass by pass in turn, and medians are compared. A ratio above 1 is in this
project's favour. The encoder has ERNIE-base's dimensions and random weights, except where `ernie_mini_zh` is named.

To add a measurement, write a function of a Bench and put it into MEASUREMENTS.
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

from bench import BASE, FILES, MINI, ROOT, Bench, Values, start_milvus  # first: it makes the project importable
from simcse import console, files, flags
from simcse.index.settings import HNSW_EF, HNSW_M
from simcse.machine import CPU_HAS_BF16

import graphs
from serving import serving, serving_milvus

# DISKANN is missing in the server of the pip package.
MILVUS_TYPES = ("HNSW", "FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "SCANN")

Pass = Callable[[], Values]  # runs a pass of one side


# ----------------------------------------------------------------------------------------------------------- encoding
def tokenize(bench: Bench) -> None:
    """Tokenizing alone."""
    cases = {"titles": bench.texts("titles", 1000), "corpus": bench.texts("corpus", 1000)}
    ours = partial(bench.run_side, "ours", "tokenize", encoder=MINI, cases=cases)
    original = partial(bench.run_side, "original", "tokenize", encoder=MINI, cases=cases)
    bench.measure_in_turn("tokenize", "texts/s", 3, ours, {"the original": original})


def encoding_cases(bench: Bench) -> dict[str, list[str]]:
    return {"corpus": bench.texts("corpus", 256), "titles": bench.texts("titles", 512)}


def our_passes(bench: Bench, function: str = "encode", **arguments) -> Pass:
    """Start passes over `encoding_cases` by a function of ours.py."""
    return bench.passes("ours", function, checkpoint=bench.checkpoint, cases=encoding_cases(bench), **arguments)


def peer_passes(bench: Bench, kind: str) -> Pass:
    """Start passes over `encoding_cases` by sentence-transformers, "torch" or "openvino"."""
    return bench.passes("peer", "encode", python=bench.args.peer_python, vocab=f"{MINI}/vocab.txt", sizes=BASE,
                        cases=encoding_cases(bench), kind=kind)


def original_passes(bench: Bench, **env: str) -> Pass:
    """Start passes over every eighth text of `encoding_cases` by the original's way, which is slow."""
    cases = {name: texts[::8] for name, texts in encoding_cases(bench).items()}
    return bench.passes("original", "encode", env=env, encoder=bench.encoder, cases=cases)


def encode(bench: Bench) -> None:
    """From texts to embeddings."""
    bench.make_base()
    references = {"the original": original_passes(bench)}
    setting = mkl_setting()
    if setting:
        references[f"the original with MKL_DEBUG_CPU_TYPE={setting}"] = original_passes(
            bench, MKL_DEBUG_CPU_TYPE=setting)
    if bench.args.peer_python:
        references["sentence-transformers, torch bf16"] = peer_passes(bench, kind="torch")
    references["OpenVINO by hand"] = our_passes(bench, "encode_openvino", int8=False)
    references["Paddle Inference"] = our_passes(bench, precision="auto", paddle_inference=True)
    references["this project in fp32"] = our_passes(bench, precision="fp32")
    bench.measure_in_turn("encode", "texts/s", 5, our_passes(bench, precision="auto"), references)


def int8(bench: Bench) -> None:
    """From texts to embeddings in int8."""
    bench.make_base()
    references = {"this project in bf16 or fp32": our_passes(bench, precision="auto"),
                  "the same, Paddle Inference": our_passes(bench, precision="auto", paddle_inference=True),
                  "OpenVINO int8 by hand": our_passes(bench, "encode_openvino", int8=True)}
    if bench.args.peer_python:
        references["sentence-transformers, OpenVINO int8"] = peer_passes(bench, kind="openvino")
    bench.measure_in_turn("int8", "texts/s", 5, our_passes(bench, precision="int8"), references)


def mkl_setting() -> str | None:
    """Return what simcse sets for paddle's MKL on this processor; None where it sets nothing."""
    show = "import simcse, os; print(os.environ.get('MKL_DEBUG_CPU_TYPE', ''))"
    printed = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True).stdout
    return printed.strip() or None


def shapes(bench: Bench) -> None:
    """Encoding by batch and length, without tokenizing; chart.py draws it."""
    bench.make_base()
    side = partial(bench.run_side, "ours", "shapes", checkpoint=bench.checkpoint, batches=[1, 4, 16, 64],
                   lengths=[16, 32, 64, 128])
    bench.measure_in_turn("shapes", "texts/s", 1, partial(side, precision="auto"),
                          {"fp32": partial(side, precision="fp32")})


def static(bench: Bench) -> None:
    """Pooling first_avg, which needs no layers, by whole processes from a file to kept vectors.

    The reference is the same encoder with its layers, over a tenth of the lines. And recall.py from a million lines to
    a kept index.
    """
    cases = {"titles": (64, 200_000), "corpus": (512, 20_000)}  # tokens per text, lines

    def side(pooling: str, fraction: float) -> Values:
        checkpoint = bench.make_mini(pooling)
        speeds = {}
        for kind, (length, most) in cases.items():
            count = int(most * fraction)
            texts = bench.texts(kind, 10_000)
            path = bench.write(kind, (texts[number % len(texts)] for number in range(count)))
            stage = bench.run_stage("inference.py", "--params_path", checkpoint, "--input_file", path,
                                    "--max_seq_length", length, "--output_file", f"{bench.scratch}/vectors.npy")
            speeds[f"{kind}, {length} tokens, to kept vectors"] = count / stage.seconds
        return speeds

    bench.measure_in_turn("static", "texts/s", 3, partial(side, "first_avg", 1),
                          {"its layers, first_last_avg": partial(side, "first_last_avg", 0.1)})
    stage = bench.run_stage("recall.py", "--params_path", bench.make_mini("first_avg"), "--corpus_file",
                            write_short_lines(bench, 1_000_000), "--query", flags.README_TEXT, "--index_path",
                            f"{bench.scratch}/index")
    bench.add("static", "1,000,000 short lines to a kept index, against two minutes", stage.seconds, 120, "s")


# ----------------------------------------------------------------------------------------------------------- training
def train(bench: Bench) -> None:
    """train.py itself, by the speed that it logs of its second ten steps."""
    bench.make_base()
    for kind, batch, length in (("corpus", 32, 32), ("training", 64, 64)):  # texts that fill 32 tokens; sentences
        texts = bench.texts(kind, 20 * batch)
        path = bench.write("texts", texts)
        case = f"batch {batch}, {length} tokens"
        references = {}
        if bench.args.peer_python:
            for precision in ("fp32", "bf16") if CPU_HAS_BF16 else ("fp32",):
                references[f"torch {precision}"] = bench.passes(
                    "peer", "train", python=bench.args.peer_python, vocab=f"{MINI}/vocab.txt", sizes=BASE, texts=texts,
                    batch=batch, length=length, bf16=precision == "bf16")
        if batch == 32:  # a step of the other case takes the original minutes
            references["the original"] = partial(bench.run_side, "original", "train", encoder=bench.encoder,
                                                 texts=texts, batch=batch, length=length, steps=1)
        ours = partial(measure_training, bench, path, batch, length, case)
        bench.measure_in_turn("train", "samples/s", 3, ours, references)


def measure_training(bench: Bench, path: str, batch: int, length: int, case: str) -> Values:
    """Return the samples/s that train.py logs."""
    from visualdl import LogReader

    log = tempfile.mkdtemp(dir=bench.scratch)
    bench.run_stage("train.py", "--model_name_or_path", bench.encoder, "--train_set_file", path, "--max_seq_length",
                    length, "--batch_size", batch, "--output_emb_size", 256, "--save_dir", f"{bench.scratch}/trained",
                    "--visualdl_dir", log)
    name, = os.listdir(log)
    steps_per_second = LogReader(file_path=f"{log}/{name}").get_data("scalar", "train/speed")[1].value
    return {case: batch * steps_per_second}


def pairs(bench: Bench) -> None:
    """Pairs from documents: making them, against splitting the documents into words; and training on them."""
    texts = bench.texts("corpus", 10_000)
    documents = [f"{texts[number % len(texts)]}{number}" for number in range(50_000)]  # all different
    corpus = bench.write("documents", documents)
    made = partial(bench.run_side, "ours", "make_pairs", corpus=corpus, output=f"{bench.scratch}/pairs")
    bench.measure_in_turn("pairs", "docs/s", 3, made, {
        "jieba alone on all cores": partial(bench.run_side, "ours", "split_words_alone", corpus=corpus)})

    def trained(sparse: bool) -> Pass:
        return bench.passes("ours", "train_table", encoder=MINI, texts=documents[:1024], sparse=sparse)

    bench.measure_in_turn("pairs", "pairs/s", 3, trained(sparse=True), {
        "the embeddings of all tokens": trained(sparse=False)})


def lines(bench: Bench) -> None:
    """Opening a training file of 8 million lines, the size of the original's."""
    count = 8_000_000
    texts = bench.texts("training", 100_000)
    path = f"{bench.scratch}/lines"
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, len(texts)):
            file.writelines(text + "\n" for text in texts[: count - start])
    ours = bench.run_side("ours", "lines", path=path)
    original = bench.run_side("original", "lines", path=path)
    os.remove(path)
    for unit in ("s", "MB"):
        bench.add("lines", f"{count:,} training texts to the first batch, against the original", ours[unit],
                  original[unit], unit)


# --------------------------------------------------------------------------------------------------- index and recall
def index(bench: Bench) -> None:
    """Approximate indexes of vectors of texts, and of clustered vectors."""
    corpus = bench.texts("corpus", 10000)
    count = bench.args.vectors
    measure_index(bench, f"{len(corpus)} documents, ernie_mini_zh", repeats=3, count=0, checkpoint=bench.make_mini(),
                  texts=corpus, queries=bench.texts("titles", 1000))
    measure_index(bench, f"{count:,} clustered vectors of 256", repeats=1, count=count, checkpoint=None, texts=[],
                  queries=[])


def measure_index(bench: Bench, case: str, repeats: int, **vectors) -> None:
    """Measure one case of `index`; `vectors` are the arguments of ours.vectors."""
    folder = tempfile.mkdtemp(dir=bench.scratch)
    bench.run_side("ours", "vectors", folder=folder, **vectors)

    def side(module: str, function: str, m: int = HNSW_M.default, python: str = sys.executable, **more) -> Values:
        values = bench.run_side(module, function, python=python, folder=folder, m=m, ef=HNSW_EF.default, **more)
        return {f"{name}, {case}": value for name, value in values.items()}

    references = {"hnswlib alone": partial(side, "ours", "index_alone"),
                  "the original's M=100, ef=100": partial(side, "ours", "index_alone", m=100)}
    peer = bench.args.peer_python
    if peer:
        references["usearch"] = partial(side, "peer", "index_usearch", python=peer)
        references["faiss HNSW"] = partial(side, "peer", "index_faiss", python=peer, kind="HNSW")
        references["faiss IVF"] = partial(side, "peer", "index_faiss", python=peer, kind="IVF")
    units = {f"{name}, {case}": unit for name, unit in graphs.UNITS.items()}
    bench.measure_in_turn("index", units, repeats, partial(side, "ours", "index"), references)
    shutil.rmtree(folder)


def milvus(bench: Bench) -> None:
    """The index types of a Milvus server against the index of a folder, and that against hnswlib alone.

    Inserting is compared with pymilvus alone. Each type has a server of its own, of the pip package `milvus`, on the
    same machine, which takes part of it.
    """
    folder = tempfile.mkdtemp(dir=bench.scratch)
    bench.run_side("ours", "vectors", folder=folder, count=bench.args.vectors, checkpoint=None, texts=[], queries=[])
    settings = {"folder": folder, "m": HNSW_M.default, "ef": HNSW_EF.default}
    of_folder = bench.run_side("ours", "index", **settings)
    alone = bench.run_side("ours", "index_alone", **settings)
    for case, value in of_folder.items():
        bench.add("milvus", f"folder: {case}, against hnswlib alone", value, alone[case], graphs.UNITS[case])
    with start_milvus(bench.scratch) as server:
        inserted = bench.run_side("ours", "insert_alone", folder=folder, uri=server.uri)
    for index_type in MILVUS_TYPES:
        with start_milvus(bench.scratch) as server:
            memory = server.memory_mb()
            values = bench.run_side("ours", "index_milvus", uri=server.uri, index_type=index_type, **settings)
            memory = server.memory_mb() - memory
            disk = graphs.size_of(server.folder) / 2**20
        inserting = values.pop("inserting")
        bench.add("milvus", f"{index_type}: inserting, against pymilvus alone", inserting, inserted["inserting"], "s")
        values["build"] = inserting + values.pop("indexing")
        for case, value in values.items():
            bench.add("milvus", f"{index_type}: {case}, against the folder", value, of_folder[case], graphs.UNITS[case])
        bench.add("milvus", f"{index_type}: memory, against the folder's size", memory, of_folder["size"], "MB")
        bench.add("milvus", f"{index_type}: disk, against the folder's size", disk, of_folder["size"], "MB")


def reading(bench: Bench) -> None:
    """Reading all vectors of a graph, to measure its recall or for the index of a changed corpus."""
    seconds = bench.run_side("ours", "reading", count=200_000)
    bench.add("reading", "200,000 vectors of 256, against hnswlib's get_items", seconds["ours"], seconds["get_items"],
              "s")


def write_short_lines(bench: Bench, count: int) -> str:
    """Write a file of lines of four characters and a number, and return its path."""
    texts = bench.texts("titles", 1000)
    return bench.write("lines", (f"{texts[number % len(texts)][:4]}{number}" for number in range(count)))


def memory(bench: Bench) -> None:
    """Peak memory of inference.py; the reference is what its vectors take plus 1 GB."""
    checkpoint = bench.make_mini()
    for count in (10_000, 100_000, 1_000_000):
        stage = bench.run_stage("inference.py", "--params_path", checkpoint, "--input_file",
                                write_short_lines(bench, count), "--output_file", f"{bench.scratch}/vectors.npy")
        vectors_mb = count * 256 * 4 / 2**20
        bench.add("memory", f"{count:,} short lines, ernie_mini_zh, against vectors + 1 GB", stage.peak_mb,
                  vectors_mb + 1024, "MB")


def growth(bench: Bench) -> None:
    """recall.py as a whole, by the size of the corpus; the reference grows in proportion to it, from the smallest."""
    checkpoint = bench.make_mini()
    smallest = None
    for count in (10_000, 100_000, 1_000_000):
        stage = bench.run_stage(
            "recall.py", "--params_path", checkpoint, "--corpus_file", write_short_lines(bench, count),
            "--similar_text_pair", os.path.join(bench.args.data_dir, FILES["titles"]), "--recall_result_dir",
            bench.scratch)
        if smallest is None:
            smallest = stage
        case = f"recall.py, {count:,} short documents, against in proportion to 10,000"
        bench.add("growth", case, stage.seconds, smallest.seconds * count / 10_000, "s")
        bench.add("growth", case, stage.peak_mb, smallest.peak_mb * count / 10_000, "MB")


# ---------------------------------------------------------------------------------------------------- start and export
def latency(bench: Bench) -> None:
    """One text, and 32, in deploy/python: the graph for Paddle Inference, and OpenVINO's in int8."""
    bench.make_base()
    texts = bench.write("calibration", bench.texts("corpus", 256))
    export_flags = {"": [], ", int8": ["--format", "openvino", "--precision", "int8", "--calibration_file", texts]}
    for kind, more in export_flags.items():
        export(bench.checkpoint, f"{bench.scratch}/graph{kind}", *more)

    def ours() -> Values:
        values = {}
        logs = f"{bench.scratch}/latency"
        for kind in export_flags:
            bench.run_stage("deploy/python/predict.py", "--model_dir", f"{bench.scratch}/graph{kind}", "--benchmark",
                            "true", "--save_log_path", logs)
            newest = max((os.path.join(logs, name) for name in os.listdir(logs)), key=os.path.getmtime)
            with open(newest, encoding="utf-8") as file:
                for row in json.load(file)["results"]:
                    values[f"batch {row['batch_size']}{kind}"] = row["p50_ms"]
        return values

    def original() -> Values:
        values = bench.run_side("original", "latency", encoder=bench.encoder, text=flags.README_TEXT,
                                folder=f"{bench.scratch}/original", runs=20)
        return {f"batch 1{kind}": values["batch 1"] for kind in export_flags}

    os.makedirs(f"{bench.scratch}/original", exist_ok=True)
    bench.measure_in_turn("latency", "ms", 3, ours, {"the original's defaults": original})


def export(checkpoint: str, folder: str, *more: str) -> None:
    subprocess.run([sys.executable, f"{ROOT}/export_model.py", "--params_path", checkpoint, "--output_path", folder,
                    *more], check=True, stderr=subprocess.DEVNULL)


def time_call(function: Callable, *arguments, **named) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments, **named)
    return time.perf_counter() - started


def start(bench: Bench) -> None:
    """From the start of a stage to its first result, with little to do, the first time for a checkpoint and again."""
    def run(*command: str, code: int = 0) -> None:
        result = subprocess.run([sys.executable, *command], capture_output=True, cwd=bench.scratch)
        if result.returncode != code:
            raise console.InputError(f"{command} failed:\n{result.stderr.decode()[-2000:]}")

    def ours() -> Values:
        return {"recall.py --help": time_call(run, f"{ROOT}/recall.py", "--help"),
                "train.py, a typo": time_call(run, f"{ROOT}/train.py", "--epoch", code=2)}

    def importing() -> Values:
        seconds = time_call(run, "-c", "import paddle, paddlenlp")
        return {"recall.py --help": seconds, "train.py, a typo": seconds}

    bench.measure_in_turn("start", "s", 3, ours, {"importing paddle and paddlenlp": importing})
    bench.make_base()
    start_stages(bench, "ernie_mini_zh", MINI, bench.make_mini())
    start_stages(bench, "ERNIE-base's size", bench.encoder, bench.checkpoint)


def start_stages(bench: Bench, name: str, encoder: str, checkpoint: str) -> None:
    """Measure the start of every stage with a checkpoint, against the original's way of getting as far."""
    folder = tempfile.mkdtemp(dir=bench.scratch)
    with open(f"{folder}/texts", "w", encoding="utf-8") as file:
        file.write(f"{flags.README_TEXT}\n")
    with open(f"{folder}/pairs", "w", encoding="utf-8") as file:
        file.write(f"{flags.README_TEXT}\t语义检索\n")
    os.makedirs(f"{folder}/original")
    model = ["--params_path", checkpoint]
    index = ["--index_path", f"{folder}/index"]
    bench.run_stage("recall.py", *model, *index, "--corpus_file", f"{folder}/texts", "--query", "语义检索")
    commands = {
        "inference.py, a checkpoint's first time": ["inference.py", *model, "--text", flags.README_TEXT],
        "inference.py": ["inference.py", *model, "--text", flags.README_TEXT],
        "predict.py": ["predict.py", *model, "--text_pair_file", f"{folder}/pairs"],
        "recall.py --query, a kept index": ["recall.py", *model, *index, "--query", "语义检索"],
        "deploy/python/predict.py": ["deploy/python/predict.py", "--model_dir", f"{folder}/exported", "--precision",
                                     "auto", "--text", flags.README_TEXT],
        "train.py --epochs 0": ["train.py", "--model_name_or_path", encoder, "--train_set_file", f"{folder}/texts",
                                "--epochs", 0, "--save_dir", f"{folder}/trained", "--visualdl_dir", f"{folder}/log"]}

    def ours() -> Values:
        shutil.rmtree(f"{checkpoint}/model_state.graph", ignore_errors=True)
        seconds = {f"export_model.py, {name}": time_call(export, checkpoint, f"{folder}/exported")}
        for stage, command in commands.items():
            seconds[f"{stage}, {name}"] = bench.run_stage(*command).seconds
        return seconds

    def original() -> Values:
        side = partial(time_call, bench.run_side, "original", encoder=encoder)
        exported = side("export", folder=f"{folder}/original")
        deployed = side("deployed", text=flags.README_TEXT, folder=f"{folder}/original")
        before_training = side("before_training")
        one_text = side("first_result", texts=[flags.README_TEXT])
        two_texts = side("first_result", texts=[flags.README_TEXT, "语义检索"])
        seconds = {"export_model.py": exported, "inference.py, a checkpoint's first time": one_text,
                   "inference.py": one_text, "predict.py": two_texts, "recall.py --query, a kept index": one_text,
                   "deploy/python/predict.py": deployed, "train.py --epochs 0": before_training}
        return {f"{stage}, {name}": value for stage, value in seconds.items()}

    bench.measure_in_turn("start", "s", 3, ours, {"the original's way": original})


# --------------------------------------------------------------------------------------------------------------- main
MEASUREMENTS = {measure.__name__: measure for measure in (
    tokenize, encode, int8, latency, train, pairs, index, milvus, memory, static, reading, growth, lines, start, shapes,
    serving, serving_milvus)}


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name",
                        help=f"what to measure, of {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--json", help="write the rows to this file, with the machine's description")
    parser.add_argument("--data_dir", type=flags.folder,
                        help="folder of train_unsupervised.csv, corpus.csv and dev.csv (default: sample data is made)")
    parser.add_argument("--peer_python", type=flags.readable_file,
                        help="a Python with the libraries to compare with: torch, datasets and "
                        "sentence-transformers[openvino] for encode, int8 and train, usearch and faiss-cpu for index "
                        "(default: they are not measured)")
    parser.add_argument("--vectors", type=flags.positive_int, default=300_000,
                        help="how many clustered vectors `index` and `milvus` have")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"no such measurement: {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    if args.data_dir:
        for name in FILES.values():
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
        for name in args.names or MEASUREMENTS:
            started = time.perf_counter()
            with bench.processes:
                MEASUREMENTS[name](bench)
            console.log(f"{name}: {time.perf_counter() - started:.0f} s")
    if args.json:
        with files.new_file(args.json) as file:
            json.dump(bench.rows, file, indent=1)


if __name__ == "__main__":
    console.run(main)
