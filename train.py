"""Train SimCSE: every text against itself under another dropout, or against its title, the others being negatives.

    # a CPU
    python train.py --device cpu --train_set_file recall/train_unsupervised.csv --test_set_file recall/dev.csv
    # 4 GPUs; on 2 machines, on each: --nnodes 2 --master <host of the first>:<port>
    python -u -m paddle.distributed.launch --gpus 0,1,2,3 train.py --train_set_file recall/train_unsupervised.csv
    # 2 processes on a CPU
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo train.py --device cpu --train_set_file ...
    # an untrained checkpoint, whitened
    python train.py --epochs 0 --pooling first_last_avg --whiten --train_set_file recall/train_unsupervised.csv
    # pairs (query, title) or triples (and a hard negative) from there on
    python train.py --init_from_ckpt checkpoints/model_900 --train_set_file recall/train.csv

Saves `model_<step>/` in --save_dir every --save_steps and at the end; Ctrl-C saves too, and the same command with
--resume goes on. Evaluations go to stdout. scripts/pretrain.py trains an encoder by masked language modelling first.
"""

import argparse
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import data
from simcse import console, flags
from simcse.encoder.pooling import POOLINGS, describe_poolings
from simcse.index.exact import exact_search
from simcse.machine import RANK, RANKS
from simcse.measures import RECALL_KS, first_hits, per_query, percent
from simcse.text import textfile, tokens, wordpiece

FEW_TOKENS = 8192


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_set_file", type=flags.readable_file, required=True,
        help="training texts, one a line: SimCSE; query and title, tab-separated: supervised, the batch's other titles "
        "being negatives; query, title and a hard negative")
    add("--test_set_file", type=flags.readable_file, help="evaluation set: text, text, label on a line (Spearman's "
        "rho), or query, target (Recall@k among all targets, exact search); None: no evaluation")
    flags.add_data_arguments(group)
    start = parser.add_argument_group("start")
    add = start.add_argument
    add("--model_name_or_path", type=flags.model_name,
        help=f"pretrained encoder, hub name or folder; None: that of --init_from_ckpt, else {flags.DEFAULT_MODEL}")
    add("--init_from_ckpt", type=flags.checkpoint_file,
        help="checkpoint to train on from: model_state.pdparams or the folder that holds it")
    add("--output_emb_size", type=flags.natural_int,
        help="size of the embedding; 0: the encoder's hidden size, without fc; None: that of --init_from_ckpt, else 0")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--pooling", choices=tuple(POOLINGS), help="how tokens become a vector, here and in all later stages. "
        f"{describe_poolings()}; None: that of --init_from_ckpt, else pooler")
    add("--infer_with_fc_pooler", action="store_true", help="evaluation and the later stages go through pooler and fc; "
        "without it, the raw first token goes through the fc. Any other --pooling is the same everywhere")
    add("--output_dropout", type=flags.probability, default=0.1, help="dropout rate of the output vector")
    add("--margin", type=flags.natural_float, default=0.0,
        help="how much more similar than a negative a positive has to be, in cosine")
    add("--scale", type=flags.positive_float, default=20,
        help="factor on the cosines before the softmax, the inverse of the temperature")
    optimization = parser.add_argument_group("optimization")
    flags.add_optimization_arguments(optimization)
    add = optimization.add_argument
    add("--crop_rate", type=flags.probability, default=0.0,
        help="each view of a text lacks up to this part of it, at its ends; 0: views are whole")
    add("--cross_device_negatives", action="store_true",
        help="the texts of all ranks' batches are each other's negatives, not those of one rank's alone")
    add("--keep_duplicate_negatives", action="store_true", help="the same text twice in a batch is its own negative, "
        "as in the original; without it, such pairs are left out of the loss")
    add("--chunk_size", type=flags.positive_int, help="encode a batch in chunks of so many texts and each chunk twice "
        "(GradCache): the same gradients in the memory of one chunk, for batches of thousands; None: at once")
    output = parser.add_argument_group("output")
    flags.add_run_arguments(parser.add_argument_group("device"), output)
    add = output.add_argument
    add("--eval_steps", type=flags.positive_int, default=10000, help="steps between evaluations")
    add("--whiten", nargs="?", type=flags.natural_int, const=0, metavar="SIZE",
        help="when training is over make embeddings of SIZE uncorrelated numbers of equal variance, in a checkpoint "
        "model_<step>_whitened of its own; 0: as many as they have; None: do not")
    add("--visualdl_embeddings", type=flags.natural_int, default=0,
        help="training texts whose embeddings VisualDL shows when training is over; 0: none")
    return flags.check_run_arguments(parser, parser.parse_args(), start, model, optimization)


def read_test_set(args: argparse.Namespace) -> list[textfile.Row]:
    """The rows of --test_set_file: text, text, label; or query, target. There are none without a test set, or where it
    measures nothing."""
    path, flag = args.test_set_file, "--test_set_file"
    if not path:
        return []
    columns = textfile.count_columns(path, flag, (2, 3))
    check = textfile.find_label_problem if columns == 3 else None
    rows, looks = list(textfile.read_rows(path, columns, flag, check)), {}
    if columns == 3:
        if len({float(row.fields[2]) for row in rows}) > 1:
            return rows
        console.warn_data(f"{flag} {path}: all {len(rows)} labels are {rows[0].fields[2]}, of which Spearman's rho is "
                         "undefined; there is no evaluation")
        return []
    if twins := [f"{path}:{row.line_number}" for row in rows
                 if looks.setdefault(textfile.normalize(row.fields[1]), row.fields[1]) != row.fields[1]]:
        console.warn_data(f"{flag}: {len(twins)} of {len(rows)} targets are an earlier one but for white space, width "
                         "or invisible characters, and count as another document; write them alike: "
                         f"{', '.join(twins[:3])}")
    return rows


def evaluate(embed: Callable, test_set: Sequence[Sequence[str]]) -> dict[str, float]:
    """Spearman's rank correlation of the cosines with the labels, none where all cosines are the same, or Recall@k of
    each distinct query's targets among all distinct targets, by exact search; in percent. Other ranks than the first
    measure nothing, but `embed` may need them."""
    first, second, *labels = zip(*test_set)
    if labels:
        from scipy.stats import spearmanr

        cosines = (embed(first) * embed(second)).sum(axis=1)
        if RANK:
            return {}
        if cosines.min() == cosines.max():
            console.warn(f"spearman is undefined: all {len(cosines)} cosines are {cosines[0]:g}")
            return {}
        return {"spearman": percent(spearmanr(cosines, [*map(float, labels[0])])[0])}
    corpus = {text: row for row, text in enumerate(textfile.distinct(second))}
    targets = defaultdict(set)
    for query, target in test_set:
        targets[query].add(corpus[target])
    embeddings = embed(list(targets)), embed(list(corpus))
    if RANK:
        return {}
    rows, _ = exact_search(*embeddings, max(RECALL_KS))
    ranks = first_hits(rows, list(targets.values()))
    return {name: percent(hits) for name, hits in per_query(ranks[:, None], ["recall"]).items()}


def evaluation_tokens(args: argparse.Namespace) -> int:
    """The tokens of a batch, padding included, that has room on a GPU beside training: those of both views of what a
    step encodes at once, whose memory is free between steps, or a few."""
    return max(FEW_TOKENS, 2 * min(args.batch_size, args.chunk_size or args.batch_size) * args.max_seq_length)


def check_learnable(args: argparse.Namespace, texts: textfile.TextFile) -> None:
    """Refuse texts, or pairs, that have no negatives, since all are the same; triples bring theirs."""
    path, sides = args.train_set_file, {1: ["texts"], 2: ["queries", "titles"]}.get(texts.columns, [])
    for side, noun in enumerate(sides):
        field = [texts[0]] if texts.columns == 1 else texts[0]
        if all((row if texts.columns == 1 else row[side]) == field[side] for row in texts):
            lines = console.count(len(texts), "line")
            raise console.InputError(f"--train_set_file {path}: {lines} without two different "
                                     f"{noun}; SimCSE learns by telling them apart")
    if sides and min(args.batch_size, -(-len(texts) // RANKS)) == 1 and not (args.cross_device_negatives and RANKS > 1):
        console.warn_data("batches of one text have no negatives, their loss is 0, and nothing is learned: raise "
                         "--batch_size, or give more texts than there are processes")


def look(args: argparse.Namespace, texts: textfile.TextFile, test_set: list[textfile.Row], tokenizer: Any) -> None:
    """Warn of what the encoder does not see of the texts; InputError where it sees no two that differ, those that are
    cut being different ones."""
    from simcse.encoder.encoder import check_texts

    ids = check_texts(texts.spread(tokens.WINDOW), tokenizer, args.max_seq_length)
    test_texts = [(f"{args.test_set_file}:{row.line_number}", row.fields[:2]) for row in test_set]
    check_texts(test_texts, tokenizer, args.max_seq_length)
    if args.epochs or args.whiten is not None:
        for side in range(texts.columns if texts.columns < 3 else 0):
            seen = {tuple(each) if len(each) < args.max_seq_length else row
                    for row, each in enumerate(ids[side :: texts.columns]) if each}
            if len(seen) < 2:
                raise console.InputError(f"--train_set_file {texts.name}: there are no two different texts as the "
                                         "encoder sees them; SimCSE learns by telling them apart")


def build_model(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The network to train, its tokenizer and the name of its encoder."""
    from model import LossSettings, SimCSE, load_model
    from simcse.encoder.encoder import check_length
    from simcse.encoder.pretrained import load_pretrained

    loss_settings = LossSettings(**{field.name: getattr(args, field.name) for field in fields(LossSettings)})
    settings = {"dropout": args.output_dropout, "loss_settings": loss_settings, "precision": args.precision,
                "infer_with_pooler": args.infer_with_fc_pooler,
                **({"pooling": args.pooling} if args.pooling else {})}
    if checkpoint := args.resume or args.init_from_ckpt:
        model, tokenizer, record = load_model(
            flags.checkpoint_file(checkpoint), None if args.resume else args.model_name_or_path, args.output_emb_size,
            "--resume" if args.resume else "--init_from_ckpt", args.dropout, settings)
        name = record["model_name_or_path"]
    else:
        name = args.model_name_or_path or flags.DEFAULT_MODEL
        model = SimCSE(load_pretrained(name, args.dropout), output_emb_size=args.output_emb_size, **settings)
        tokenizer = wordpiece.load_tokenizer(name)
    check_length(model, args.max_seq_length)
    if args.whiten and args.whiten > model.embedding_size:
        raise console.InputError(f"--whiten {args.whiten}: embeddings have {model.embedding_size} numbers")
    return model, tokenizer, name


def train(args: argparse.Namespace, texts: textfile.TextFile, test_set: list[textfile.Row]) -> Any:
    """The training loop, and what comes after it; returns the `Run`."""
    from model import make_record, save_checkpoint
    from simcse.encoder.encoder import Encoder
    from simcse.encoder.engine import make_engine
    from simcse.encoder.whitening import SAMPLE, runs, whiten
    from simcse.ranks import encode_shares
    from simcse.training.gradients import backward
    from simcse.training.trainer import Run

    def save(folder: str, also: Callable | None = None) -> None:
        save_checkpoint(folder, model, tokenizer, make_record(model, name, args.max_seq_length), also=also)

    def encoder(precision: str = "auto") -> Callable:
        """What gives texts' embeddings by the weights as they are now; `check_texts` has said what is cut."""
        engine = make_engine(model, precision, args.cpu_threads)
        return functools.partial(Encoder(engine, tokenizer, args.max_seq_length).encode, warn=False)

    def measure(group: str, share: bool = True) -> None:
        """The texts being shared out among the ranks, or this one's alone."""
        if not test_set:
            return
        embed = encoder()
        if measures := evaluate(functools.partial(encode_shares, embed) if share else embed,
                                [row.fields for row in test_set]):
            run.log_measures(measures, group)

    model, tokenizer, name = build_model(args)
    model.batch_tokens = min(model.batch_tokens, evaluation_tokens(args))
    look(args, texts, test_set, tokenizer)
    sampler = data.ShuffledBatches(len(texts), args.batch_size, RANK, RANKS)
    make = functools.partial(data.make_batch, texts, tokenizer, args)
    run = Run(args, model, texts, len(sampler), save)
    for batch in run.batches(data.batches_after(run.step, args.epochs, sampler, make)):
        loss = backward(run.network, model, batch, run.scaler.scale, args.chunk_size)
        run.update(loss, batch)
        if not run.code and run.step % args.eval_steps == 0 and run.step < run.steps:
            measure("eval")
    if run.code:
        return run
    measure("eval")
    if args.whiten is not None and not RANK:
        sample = texts.sample(SAMPLE)
        sample += runs(sample, tokenizer, args.max_seq_length)
        unknown = set(wordpiece.find_unknown(tokenizer, tokenizer(sample, args.max_seq_length)))
        sample = [text for row, text in enumerate(sample) if row not in unknown]  # their embeddings are zeros
        whiten(model, lambda: encoder("fp32")(sample), args.whiten or model.embedding_size, args.max_seq_length)
        folder = os.path.join(args.save_dir, f"model_{run.step}_whitened")
        save(folder)  # beside the checkpoint of the step, which stays as it is
        console.log(f"saved {folder}")
        measure("whitened", share=False)  # the other ranks' network is not whitened
    if args.visualdl_embeddings and not RANK:
        sample = texts.sample(args.visualdl_embeddings)
        run.writer.add_embeddings("texts", mat=encoder()(sample).tolist(), metadata=sample)
    return run


def main() -> None:
    args = parse_args()
    path, flag = args.train_set_file, "--train_set_file"
    texts, test_set = textfile.TextFile(path, flag, (1, 2, 3)), read_test_set(args)
    if texts.columns > 1 and args.crop_rate:
        raise console.InputError(f"--crop_rate is for texts, one a line; {path} has {texts.columns} columns")
    if args.epochs or args.whiten is not None:
        check_learnable(args, texts)

    flags.announce_training(args, args.init_from_ckpt or args.model_name_or_path or flags.DEFAULT_MODEL,
                            console.count(len(texts), f"training {('text', 'pair', 'triple')[texts.columns - 1]}"))

    from simcse.training.trainer import run_training

    run_training(args, lambda: train(args, texts, test_set))


if __name__ == "__main__":
    console.run(main)
