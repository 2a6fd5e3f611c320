"""Train SimCSE: every text against itself under another dropout, or against its title, the others being negatives.

    # a CPU
    python train.py --device cpu --train_set_file recall/train_unsupervised.csv --test_set_file recall/dev.csv
    # 4 GPUs; on 2 machines, on each: --nnodes 2 --master <host of the first>:<port>
    python -u -m paddle.distributed.launch --gpus 0,1,2,3 train.py --train_set_file recall/train_unsupervised.csv
    # 2 processes on a CPU
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo train.py --device cpu --train_set_file ...
    # an untrained checkpoint, for comparison; another, whitened
    python train.py --epochs 0 --train_set_file recall/train_unsupervised.csv --test_set_file recall/dev.csv
    python train.py --epochs 0 --pooling first_last_avg --whiten --train_set_file recall/train_unsupervised.csv
    # pairs (query, title) or triples (and a hard negative) from there on
    python train.py --init_from_ckpt checkpoints/model_900 --train_set_file recall/train.csv

Saves `model_<step>/` in --save_dir every --save_steps and at the end; Ctrl-C saves too, and the same command with
--resume goes on. Evaluations go to stdout. scripts/pretrain.py trains an encoder by masked language modelling first.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import data
from ann_util import exact_search
from simcse import console, flags
from simcse.machine import RANK, RANKS
from simcse.measures import RECALL_KS, first_hits, per_query, percent
from simcse.weights import newest_resumable


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument("--train_set_file", type=flags.readable_file, required=True,
                       help="training texts, one a line: SimCSE; query and title, tab-separated: supervised, the "
                       "batch's other titles being negatives; query, title and a hard negative")
    group.add_argument("--test_set_file", type=flags.readable_file, default=None,
                       help="evaluation set: text, text, label on a line (Spearman's rho), or query, target (Recall@k "
                       "among all targets, exact search); None: no evaluation")
    flags.add_strict_argument(group)
    start = parser.add_argument_group("start")
    start.add_argument("--model_name_or_path", type=flags.model_name, default=None,
                       help=f"pretrained encoder, hub name or folder; None: that of --init_from_ckpt, else "
                       f"{flags.DEFAULT_MODEL}")
    start.add_argument("--init_from_ckpt", type=flags.checkpoint_file, default=None,
                       help="checkpoint to train on from: model_state.pdparams or the folder that holds it")
    start.add_argument("--output_emb_size", type=flags.natural_int, default=None,
                       help="size of the embedding; 0: the encoder's hidden size, without fc; None: that of "
                       "--init_from_ckpt, else 0")
    model = parser.add_argument_group("model")
    model.add_argument("--max_seq_length", type=flags.sequence_length, default=128,
                       help="tokens per text, [CLS] and [SEP] included; longer texts are cut")
    model.add_argument("--pooling", choices=flags.POOLINGS, default=None,
                       help="how tokens become a vector, here and in all later stages. pooler: the first one through a "
                       "layer and tanh; mean: of the text's tokens; first_last_avg: that, of the first layer's input "
                       "and the last's output; None: that of --init_from_ckpt, else pooler")
    model.add_argument("--infer_with_fc_pooler", action="store_true",
                       help="evaluation and the later stages go through pooler and fc; without it, the raw first token "
                       "goes through the fc. Any other --pooling is the same everywhere")
    model.add_argument("--output_dropout", type=flags.probability, default=0.1,
                       help="dropout rate of the output vector")
    model.add_argument("--margin", type=flags.natural_float, default=0.0,
                       help="how much more similar than a negative a positive has to be, in cosine")
    model.add_argument("--scale", type=flags.positive_float, default=20,
                       help="factor on the cosines before the softmax, the inverse of the temperature")
    optimization = parser.add_argument_group("optimization")
    flags.add_optimization_arguments(optimization)
    optimization.add_argument("--crop_rate", type=flags.probability, default=0.0,
                              help="each view of a text lacks up to this part of it, at its ends; 0: views are whole")
    optimization.add_argument("--cross_device_negatives", action="store_true",
                              help="the texts of all ranks' batches are each other's negatives, not those of one "
                              "rank's alone")
    optimization.add_argument("--keep_duplicate_negatives", action="store_true",
                              help="the same text twice in a batch is its own negative, as in the original; without "
                              "it, such pairs are left out of the loss")
    optimization.add_argument("--chunk_size", type=flags.positive_int, default=None,
                              help="encode a batch in chunks of so many texts and each chunk twice (GradCache): the "
                              "same gradients in the memory of one chunk, for batches of thousands; None: at once")
    output = parser.add_argument_group("output")
    flags.add_run_arguments(parser.add_argument_group("device"), output)
    output.add_argument("--eval_steps", type=flags.positive_int, default=10000, help="steps between evaluations")
    output.add_argument("--whiten", nargs="?", type=flags.natural_int, const=0, default=None, metavar="SIZE",
                        help="when training is over make embeddings of SIZE uncorrelated numbers of equal variance, in "
                        "a checkpoint model_<step>_whitened of its own; 0: as many as they have; None: do not")
    output.add_argument("--visualdl_embeddings", type=flags.natural_int, default=0,
                        help="training texts whose embeddings VisualDL shows when training is over; 0: none")
    args = parser.parse_args()
    flags.check_run_arguments(parser, args, (args.model_name_or_path, os.path.dirname(args.init_from_ckpt or "")))
    args.learns_by = flags.names_of(model, optimization)
    args.hyper_parameters = flags.names_of(start) + args.learns_by
    return args


def read_training_set(args: argparse.Namespace) -> data.TextFile:
    """The file of --train_set_file, of one, two or three columns, for which the flags have to make sense."""
    flag = "--train_set_file"
    columns = data.count_columns(args.train_set_file, flag, (1, 2, 3)) if os.path.isfile(args.train_set_file) else 1
    if columns > 1 and args.crop_rate:
        raise console.InputError(f"--crop_rate is for texts, one a line; {args.train_set_file} has {columns} columns")
    return data.TextFile(args.train_set_file, flag, args.strict_data, columns)


# -------------------------------------------------------------------------------------------------------- evaluation
def read_test_set(args: argparse.Namespace) -> Callable | None:
    """Read --test_set_file; returns `measure(embed) -> {measure: value}`, or None without a test set."""
    if not args.test_set_file:
        return None
    flag, strict = "--test_set_file", args.strict_data
    if data.count_columns(args.test_set_file, flag, (2, 3)) == 3:
        triples = data.read_labeled_pairs(args.test_set_file, flag, strict)
        return lambda embed: spearman(embed, triples)
    pairs = data.read_text_pairs(args.test_set_file, flag, strict)
    return lambda embed: recall(embed, pairs)


def spearman(embed: Callable, triples: list[tuple[str, str, float]]) -> dict[str, float]:
    """Spearman's rank correlation, in percent, of the cosines with the labels."""
    from scipy.stats import spearmanr

    first, second, labels = zip(*triples)
    cosines = (embed(first) * embed(second)).sum(axis=1)
    return {"spearman": round(100 * float(spearmanr(cosines, labels)[0]), 3)}


def recall(embed: Callable, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Recall@k, in percent, of each distinct query's targets among all distinct targets, by exact search."""
    queries, corpus = (data.distinct(side) for side in zip(*pairs))
    row_of = {text: row for row, text in enumerate(corpus)}
    targets: dict[str, set[int]] = {}
    for query, target in pairs:
        targets.setdefault(query, set()).add(row_of[target])
    rows, _ = exact_search(embed(queries), embed(corpus), max(RECALL_KS))
    ranks = first_hits(rows, [targets[query] for query in queries])
    return {name: percent(hits) for name, hits in per_query([[rank] for rank in ranks], ["recall"]).items()}


# ---------------------------------------------------------------------------------------------------------- training
def build_model(args: argparse.Namespace) -> tuple[Any, Any, dict]:
    """The network to train, its tokenizer and the record that goes beside its checkpoints."""
    from model import SimCSE, check_length, load_model, make_record
    from simcse.encoders import load_encoder, train_faster_on_cpu

    settings = {"dropout": args.output_dropout, "margin": args.margin, "scale": args.scale,
                "precision": args.precision, "infer_with_pooler": args.infer_with_fc_pooler,
                "cross_device_negatives": args.cross_device_negatives and RANKS > 1}
    if args.pooling:
        settings["pooling"] = args.pooling
    if args.resume:
        model, tokenizer, record = load_model(flags.checkpoint_file(args.resume), None, args.output_emb_size,
                                              "--resume", args.dropout, settings)
        name = record["model_name_or_path"]
    elif args.init_from_ckpt:
        model, tokenizer, record = load_model(args.init_from_ckpt, args.model_name_or_path, args.output_emb_size,
                                              "--init_from_ckpt", args.dropout, settings)
        name = record["model_name_or_path"]
    else:
        name = args.model_name_or_path or flags.DEFAULT_MODEL
        model = SimCSE(load_encoder(name, args.dropout), output_emb_size=args.output_emb_size, **settings)
        tokenizer = data.load_tokenizer(name)
    check_length(model, args.max_seq_length)
    if args.whiten and args.whiten > model.embedding_size:
        raise console.InputError(f"--whiten {args.whiten}: embeddings have {model.embedding_size} numbers")
    if args.device == "cpu":
        train_faster_on_cpu(model)
    return model, tokenizer, make_record(model, name, args.max_seq_length)


def encoder(args: argparse.Namespace, model, tokenizer, precision: str = "auto") -> Callable:
    """What gives texts' embeddings by the weights as they are now."""
    from model import encode
    from simcse.engine import make_engine

    engine = make_engine(model, precision if args.device == "cpu" else args.precision, args.cpu_threads)
    return lambda texts: encode(engine, tokenizer, texts, args.max_seq_length)


def train(args: argparse.Namespace, texts: data.TextFile, measure: Callable | None) -> int:
    """The training loop; returns the exit code: 0, 1 for a loss that is no number, or 128 + the signal that stopped it.
    """
    from model import save_checkpoint
    from simcse.gradients import backward
    from simcse.ranks import wait_for_ranks
    from simcse.run import Run, set_seed

    set_seed(args.seed)
    model, tokenizer, record = build_model(args)
    sampler = data.ShuffledBatches(len(texts), args.batch_size, RANK, RANKS)
    run = Run(args, model, texts, len(sampler),
              lambda folder, also: save_checkpoint(folder, model, tokenizer, record, also=also))

    @functools.cache  # once a step
    def evaluate(step: int, group: str = "eval") -> None:
        """On rank 0, while the others wait."""
        if measure and not RANK:
            run.reporter.log_measures(step, measure(encoder(args, model, tokenizer)), group)
        wait_for_ranks()

    batches = data.Batches(texts, tokenizer, args)
    for batch in run.batches(data.batches_after(run.step, args.epochs, sampler, batches.make)):
        loss = backward(run.network, model, batch, run.scale_loss)
        run.update(loss, batch)
        if not run.code and run.step % args.eval_steps == 0:
            evaluate(run.step)
    if run.code:
        return run.code
    evaluate(run.step)
    if args.whiten is not None:
        if not RANK:
            save_whitened(args, model, tokenizer, record, texts, run.step)
        evaluate(run.step, "whitened")
    sample = texts.sample(args.visualdl_embeddings) if args.visualdl_embeddings and not RANK else []
    run.reporter.finish(sample, encoder(args, model, tokenizer)(sample) if sample else None)
    wait_for_ranks()
    return 0


def save_whitened(args: argparse.Namespace, model, tokenizer, record: dict, texts: data.TextFile, step: int) -> None:
    """Whiten the network, and save it beside the checkpoint of `step`, which stays as it is."""
    from model import make_record, save_checkpoint
    from simcse.whitening import SAMPLE, whiten

    sample = texts.sample(SAMPLE)
    whiten(model, lambda: encoder(args, model, tokenizer, "fp32")(sample), args.whiten or model.embedding_size)
    folder = os.path.join(args.save_dir, f"model_{step}_whitened")
    save_checkpoint(folder, model, tokenizer, make_record(model, record["model_name_or_path"], args.max_seq_length))
    console.log(f"saved {folder}")


def main() -> None:
    args = parse_args()
    texts = read_training_set(args)
    measure = read_test_set(args)
    if args.resume == "auto":
        args.resume = newest_resumable(args.save_dir)
    noun = f"training {('text', 'pair', 'triple')[texts.columns - 1]}"
    flags.announce(args, args.resume or args.init_from_ckpt or args.model_name_or_path or flags.DEFAULT_MODEL,
                   flags.count(texts, noun), f"{args.epochs} epochs in batches of {args.batch_size}")

    from simcse.ranks import set_device

    set_device(args.device, args.cpu_threads)
    started = time.time()
    code = train(args, texts, measure)
    if not RANK:
        console.log(f"totally cost {time.time() - started:.1f} s")
    raise SystemExit(code)


if __name__ == "__main__":
    console.run(main)
