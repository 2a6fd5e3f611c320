"""Train SimCSE: positives are two dropout views of a text, or query and title; negatives are the batch's other texts.

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

It saves `model_<step>/` in --save_dir every --save_steps and at the end, and with --save_best `model_best/` after each
evaluation that is the best so far. Ctrl-C saves too, and the same command with --resume goes on from there.
Evaluations go to stdout. scripts/pretrain.py trains an encoder by masked language modelling first.
"""

import argparse
import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import data
from simcse import console, flags
from simcse.encoder.pooling import POOLINGS, describe_poolings
from simcse.encoder.sentence_transformers import Recipe, read_dense, read_recipe
from simcse.hub_layout import is_hugging_face
from simcse.index.exact import exact_search
from simcse.machine import RANK, RANKS
from simcse.measures import RECALL_KS, mean_percent, measure_queries, percent, rank_first_targets
from simcse.text import textfile, tokens, wordpiece
from simcse.text.prefixes import DOCUMENT, QUERY, Prefixes, check_prefixes, count_tokens

import numpy as np

COLUMN_NAMES = {1: ["texts"], 2: ["queries", "titles"]}  # of training files that bring no negatives of their own
AUTO = "auto"  # the --pooling that is recorded
MIN_EVAL_TOKENS = 8192  # of an evaluation batch on a GPU, which has room for so many whatever is trained


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_set_file", type=flags.readable_file, required=True,
        help="training texts: one text a line (SimCSE); or query and title, separated by a tab (supervised: the other "
        "titles of the batch are negatives); or query, title and a hard negative")
    add("--test_set_file", type=flags.readable_file, help="evaluation set: text, text, label on a line (Spearman's "
        "rho), or query, target (Recall@k among all targets, exact search) (default: no evaluation)")
    flags.add_data_arguments(group)
    add = parser.add_argument_group("start").add_argument
    add("--model_name_or_path", type=flags.model_name,
        help="pretrained encoder, hub name or folder (default: the encoder of --init_from_ckpt, or "
        f"{flags.DEFAULT_MODEL})")
    add("--init_from_ckpt", type=flags.checkpoint_file,
        help="checkpoint whose weights a new run starts from: model_state.pdparams or the folder that holds it")
    add("--output_emb_size", type=flags.non_negative_int,
        help="size of the embedding; 0: the encoder's hidden size, without fc (default: the size of --init_from_ckpt, "
        "or 0)")
    add = parser.add_argument_group("model").add_argument
    add("--pooling", choices=(*POOLINGS, AUTO), help="how token vectors are pooled into one; recorded in the "
        f"checkpoint. {describe_poolings()}; {AUTO}: the pooling of --init_from_ckpt, else the one that a folder of "
        f"sentence-transformers records, else pooler (default: {AUTO})")
    with_choice = " or ".join(name for name, pooling in POOLINGS.items() if pooling.pool_without_pooler)
    add("--infer_with_fc_pooler", action="store_true", help=f"for --pooling {with_choice}: evaluation and later stages "
        "use the pooler and the fc, as training does; without this flag they leave out the pooler, and pass the raw "
        "first token through the fc. The other poolings use no pooler and ignore this flag")
    add("--output_dropout", type=flags.fraction_below_one, default=0.1, help="dropout rate of the output vector")
    add("--margin", type=flags.non_negative_float, default=0.0,
        help="margin subtracted from the positive's cosine")
    add("--scale", type=flags.positive_float, default=20,
        help="factor on the cosines before the softmax, the inverse of the temperature")
    flags.add_prefix_arguments(parser.add_argument_group("prefixes"), "that of --init_from_ckpt, else the prompt that "
                               "a folder of sentence-transformers has, else none")
    optimization = parser.add_argument_group("optimization")
    flags.add_optimization_arguments(optimization)
    add = optimization.add_argument
    add("--crop_rate", type=flags.fraction_below_one, default=0.0,
        help="crop up to this fraction of the tokens from each view of a text (0: no cropping)")
    add("--cross_device_negatives", action="store_true",
        help="take negatives from the batches of all ranks, not only from the rank's own")
    add("--keep_duplicate_negatives", action="store_true",
        help="keep duplicates in a batch as negatives of each other, as in the original implementation; without it, "
        "such pairs are left out of the loss")
    add("--chunk_size", type=flags.positive_int,
        help="encode a batch in chunks of so many queries, with their titles and hard negatives, and each chunk twice "
        "(GradCache): the same gradients in the memory of one chunk, for batches of thousands (default: all at once)")
    output = parser.add_argument_group("output")
    flags.add_run_arguments(parser.add_argument_group("device"), output)
    add = output.add_argument
    add("--eval_steps", type=flags.positive_int, default=10000, help="steps between evaluations")
    add("--save_best", action="store_true", help="keep the weights of the best evaluation so far, by the first measure "
        "of --test_set_file (Recall@1, or Spearman's rho), in a checkpoint model_best, which cannot be resumed")
    add("--early_stopping", type=flags.positive_int, metavar="N", help="end the run after N evaluations in a row that "
        "are not better than the best so far (default: train for all --epochs)")
    add("--whiten", nargs="?", type=flags.non_negative_int, const=0, metavar="SIZE",
        help="whiten the embeddings after training, to SIZE dimensions (0 or no value: all), and save the network as "
        "model_<step>_whitened, without an fc that has not been trained (default: no whitening)")
    add("--visualdl_embeddings", type=flags.non_negative_int, default=0,
        help="training texts whose embeddings VisualDL shows after training; 0: none")
    args = flags.parse_training_arguments(parser)
    if args.pooling == AUTO:
        args.pooling = None
    if args.model_name_or_path and not flags.checkpoint_folder(args):
        read_recipe(args.model_name_or_path)  # what is not supported is refused before anything takes time
    for flag in ("save_best", "early_stopping"):
        if getattr(args, flag) and not args.test_set_file:
            parser.error(f"--{flag} compares evaluations; give --test_set_file")
    return args


def compares_evaluations(args: argparse.Namespace) -> bool:
    """Return whether the run has to know which evaluation is the best so far."""
    return args.save_best or args.early_stopping is not None


# ----------------------------------------------------------------------------------------------- what the files hold
def read_test_set(args: argparse.Namespace) -> list[textfile.Row]:
    """Return the rows of --test_set_file: text, text, label; or query, target. There are none without the flag, or
    where all labels are the same, since Spearman's rho is undefined then.

    Raises:
        InputError: all labels are the same, and --save_best or --early_stopping needs an evaluation.
    """
    path = args.test_set_file
    flag = "--test_set_file"
    if not path:
        return []
    columns = textfile.choose_columns(path, flag, (2, 3))
    if columns == 2:
        rows = list(textfile.read_rows(path, columns, flag))
        warn_near_duplicates(path, rows)
        return rows
    rows = list(textfile.read_rows(path, columns, flag, textfile.find_label_problem))
    labels = {float(row.fields[2]) for row in rows}
    if len(labels) == 1:
        problem = f"{flag} {path}: every label is {rows[0].fields[2]}, of which Spearman's rho is undefined"
        if compares_evaluations(args):
            raise console.InputError(f"{problem}; --save_best and --early_stopping need an evaluation")
        console.warn_data(f"{problem}; there is no evaluation")
        return []
    return rows


def warn_near_duplicates(path: str, rows: Sequence[textfile.Row]) -> None:
    """Warn of targets that look like an earlier one, but count as another document in the evaluation."""
    places = []
    first_target: dict[str, str] = {}
    for row in rows:
        target = row.fields[1]
        earlier = first_target.setdefault(textfile.normalize(target), target)
        if earlier != target:
            places.append(f"{path}:{row.line_number}")
    if places:
        targets_match = console.part(len(places), len(rows), "target", "match")
        console.warn_data(f"--test_set_file: {targets_match} an earlier one after Unicode and white-space "
                          f"normalization, and {console.verb(len(places), 'count')} as another document; write them "
                          f"alike: {', '.join(places[:3])}")


def column_of(texts: textfile.TextFile, column: int) -> Iterator[str]:
    """Yield one column of the training file: 0 for texts or queries, 1 for titles."""
    for row in texts:
        yield row if isinstance(row, str) else row[column]


def check_negatives(args: argparse.Namespace, texts: textfile.TextFile) -> None:
    """Refuse training texts among which there are no negatives, and warn of batches that have none.

    There are none where all texts, all queries or all titles are the same, or where a batch is a single text. Triples
    bring their own.
    """
    if texts.columns not in COLUMN_NAMES:
        return
    for column, name in enumerate(COLUMN_NAMES[texts.columns]):
        first = next(column_of(texts, column))
        if all(text == first for text in column_of(texts, column)):
            raise console.InputError(f"--train_set_file {args.train_set_file}: all {name} are the same; contrastive "
                                     "training needs at least two different ones")
    batch_size = min(args.batch_size, math.ceil(len(texts) / RANKS))
    if args.cross_device_negatives:
        batch_size *= RANKS
    if batch_size == 1:
        console.warn_data("batches of one text have no negatives, their loss is 0, and nothing is learned; raise "
                          "--batch_size, or give more texts than there are processes")


def check_texts_as_encoded(args: argparse.Namespace, texts: textfile.TextFile, test_set: Sequence[textfile.Row],
                           tokenizer: Any, prefixes: Prefixes) -> None:
    """Warn of texts of both files that the encoder reads only in part, or nothing of.

    Raises:
        InputError: all texts, all queries or all titles to train on are the same to the encoder, or all texts to
            whiten on.
    """
    from simcse.encoder.encoder import tokenize_rows, warn_unusable

    check_prefixes(tokenizer, prefixes, args.max_seq_length)
    training = tokenize_rows(texts.sample_rows(tokens.WINDOW), tokenizer, args.max_seq_length, prefixes)
    warn_unusable(training, args.max_seq_length)
    test_rows = [(f"{args.test_set_file}:{row.line_number}", row.fields[:2]) for row in test_set]
    warn_unusable(tokenize_rows(test_rows, tokenizer, args.max_seq_length, prefixes), args.max_seq_length)
    known_ids = training.known_ids()
    if args.epochs > 0 and texts.columns in COLUMN_NAMES:
        for column, name in enumerate(COLUMN_NAMES[texts.columns]):
            if not two_differ(known_ids[column :: texts.columns], args.max_seq_length):
                raise console.InputError(f"--train_set_file {texts.name}: all {name} are the same to the encoder; "
                                         "contrastive training needs at least two different ones")
    if args.whiten is not None and not two_differ(known_ids, args.max_seq_length):
        raise console.InputError(f"--train_set_file {texts.name}: all texts are the same to the encoder; --whiten "
                                 "needs at least two different ones")


def two_differ(all_ids: Sequence[tokens.Ids | None], max_seq_length: int) -> bool:
    """Return whether two texts differ, by their token ids; None: all [UNK]. Each truncated text counts as different.
    """
    truncated = 0
    different_ids = set()
    for ids in all_ids:
        if ids is None:
            continue
        if len(ids) == max_seq_length:
            truncated += 1
        else:
            different_ids.add(tuple(ids))
    return truncated + len(different_ids) >= 2


# -------------------------------------------------------------------------------------------------------- evaluation
def evaluate(encode: Callable, test_set: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the measures of a test set, by name, in percent: {} where they are undefined, and on other ranks than the
    first, which take part in the encoding only.

    Args:
        encode: texts, input_type -> their embeddings, float32 [texts, embedding_size].
        test_set: text, text, label; or query, target.
    """
    if len(test_set[0]) == 3:
        return measure_spearman(encode, test_set)
    return measure_recall(encode, test_set)


def measure_spearman(encode: Callable, test_set: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return Spearman's rank correlation of the cosines of two texts with their label."""
    from scipy.stats import spearmanr

    first, second, labels = zip(*test_set)
    cosines = (encode(first, input_type=QUERY) * encode(second, input_type=DOCUMENT)).sum(axis=1)
    if RANK:
        return {}
    if cosines.min() == cosines.max():
        console.warn(f"spearman is undefined: every cosine is {cosines[0]:g}")
        return {}
    correlation, _ = spearmanr(cosines, [float(label) for label in labels])
    return {"spearman": percent(correlation)}


def measure_recall(encode: Callable, test_set: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return Recall@k: whether one of a query's targets is among the k nearest of all targets, by exact search. The
    same text twice is one query, or one target."""
    corpus = textfile.distinct(target for _, target in test_set)
    row_of = {target: row for row, target in enumerate(corpus)}
    targets = defaultdict(set)  # rows of each query's targets
    for query, target in test_set:
        targets[query].add(row_of[target])
    query_embeddings = encode(list(targets), input_type=QUERY)
    target_embeddings = encode(corpus, input_type=DOCUMENT)
    if RANK:
        return {}
    found_rows, _ = exact_search(query_embeddings, target_embeddings, max(RECALL_KS))
    ranks = rank_first_targets(found_rows, list(targets.values()))
    return {name: mean_percent(hits) for name, hits in measure_queries(ranks[:, None], ["recall"]).items()}


def evaluation_tokens(args: argparse.Namespace) -> int:
    """Return the token budget of an evaluation batch on a GPU, padding included.

    It is what two sides of a training step take, since their memory is free between steps.
    """
    texts = min(args.batch_size, args.chunk_size or args.batch_size)
    return max(MIN_EVAL_TOKENS, 2 * texts * args.max_seq_length)


def make_encode(args: argparse.Namespace, model: Any, tokenizer: Any, prefixes: Prefixes,
                precision: str = "auto") -> Callable:
    """Return `Encoder.encode` with the current weights. `check_texts_as_encoded` has warned of the texts."""
    from simcse.encoder.encoder import Encoder
    from simcse.encoder.engine import make_engine

    engine = make_engine(model, precision, args.cpu_threads)
    encoder = Encoder(engine, tokenizer, args.max_seq_length, prefixes=prefixes)
    return functools.partial(encoder.encode, warn=False)


def evaluate_on_ranks(args: argparse.Namespace, model: Any, tokenizer: Any, prefixes: Prefixes,
                      test_set: Sequence[textfile.Row]) -> dict[str, float]:
    """Return what `evaluate` returns of the weights as they are now. All ranks call it, and encode a share each."""
    from simcse.ranks import encode_shares

    if not test_set:
        return {}
    encode_alone = make_encode(args, model, tokenizer, prefixes)

    def encode(texts: Sequence[str], input_type: str) -> np.ndarray:
        return encode_shares(functools.partial(encode_alone, input_type=input_type), texts)

    return evaluate(encode, [row.fields for row in test_set])


# ---------------------------------------------------------------------------------------------------------- training
def build_model(args: argparse.Namespace) -> Any:
    """Return the `model.LoadedModel` to train, with the record of its checkpoints."""
    from model import LoadedModel, LossSettings, load_model, make_record
    from simcse.encoder.encoder import check_length

    # Each field of LossSettings has a flag of its name, which flags.SHARED_FLAGS lists for --resume.
    loss_settings = LossSettings(**{field.name: getattr(args, field.name) for field in fields(LossSettings)})
    is_new = not (args.resume or args.init_from_ckpt)
    if not is_new:
        flag = "--resume" if args.resume else "--init_from_ckpt"
        params_path = flags.checkpoint_file(args.resume) if args.resume else args.init_from_ckpt
        encoder_name = None if args.resume else args.model_name_or_path  # None: the one of the checkpoint
        model, tokenizer, record = load_model(
            params_path, encoder_name, args.output_emb_size, flag=flag, encoder_dropout=args.dropout,
            output_dropout=args.output_dropout, pooling=args.pooling,
            with_pooler=args.infer_with_fc_pooler or flags.read_checkpoint_record(args).get("with_pooler", False),
            precision=args.precision, loss_settings=loss_settings)
        encoder_name = record["model_name_or_path"]
        recorded_prefixes = Prefixes.from_record(record)
    else:
        encoder_name = args.model_name_or_path or flags.DEFAULT_MODEL
        recipe = read_recipe(encoder_name)
        model = new_model(args, recipe, loss_settings)
        tokenizer = wordpiece.load_tokenizer(recipe.encoder)
        recorded_prefixes = recipe.prefixes
    prefixes = recorded_prefixes.replaced_by(args.query_prefix, args.document_prefix)
    if is_new and recipe.pooling and not RANK:
        log_recipe(args, model, prefixes)
    check_length(model, args.max_seq_length)
    if args.epochs:  # the run trains the fc
        model.fc_is_random = False
    if model.fc_is_random and args.whiten is None and not RANK:
        console.warn(f"--output_emb_size {model.output_emb_size}: the fc is random, since nothing is trained; leave "
                     f"the flag out, or give --whiten {model.output_emb_size} as well")
    if args.whiten is not None:
        check_whitened_size(args.whiten, model)
    model.batch_tokens = min(model.batch_tokens, evaluation_tokens(args))
    return LoadedModel(model, tokenizer, make_record(model, encoder_name, args.max_seq_length, prefixes))


def new_model(args: argparse.Namespace, recipe: Recipe, loss_settings: Any) -> Any:
    """Return the `model.SimCSE` of a new run, with the dense layers that the encoder's folder has.

    Raises:
        InputError: --pooling or --output_emb_size is another than these layers are for.
    """
    from model import SimCSE
    from simcse.encoder.pooling import find_pooling
    from simcse.encoder.pretrained import load_pretrained

    pooling = args.pooling or recipe.pooling or "pooler"
    if not (args.pooling or recipe.pooling or RANK) and is_hugging_face(recipe.encoder):
        console.warn(f"{args.model_name_or_path} does not say how its vectors are pooled; --pooling pooler is taken, "
                     "but bge and gte need cls, m3e and text2vec mean_all")
    if (recipe.pooler or recipe.fc) and pooling != recipe.pooling:
        raise console.InputError(f"--pooling {pooling}: {args.model_name_or_path} has dense layers for --pooling "
                                 f"{recipe.pooling}; leave the flag out, or name the folder of its encoder alone")
    uses_pooler = find_pooling(pooling).uses_pooler and not recipe.pooler
    encoder = load_pretrained(recipe.encoder, args.dropout, uses_pooler=uses_pooler)
    hidden_size = encoder.config.hidden_size
    fc = read_dense(recipe.fc, "--model_name_or_path", hidden_size) if recipe.fc else None
    if fc and args.output_emb_size not in (None, len(fc.bias)):
        raise console.InputError(f"--output_emb_size {args.output_emb_size}: {args.model_name_or_path} has "
                                 f"{len(fc.bias)}")
    with_pooler = args.infer_with_fc_pooler or recipe.pooler is not None
    model = SimCSE(encoder, dropout=args.output_dropout, output_emb_size=args.output_emb_size, pooling=pooling,
                   with_pooler=with_pooler, precision=args.precision, loss_settings=loss_settings)
    if recipe.pooler:
        model.replace_pooler(*read_dense(recipe.pooler, "--model_name_or_path", hidden_size))
    if fc:
        model.replace_fc(*fc)
    return model


def log_recipe(args: argparse.Namespace, model: Any, prefixes: Prefixes) -> None:
    """Log with which settings a new run takes the encoder of a folder of sentence-transformers."""
    settings = [f"--pooling {model.pooling}", f"--max_seq_length {args.max_seq_length}"]
    if model.output_emb_size:
        settings.append(f"--output_emb_size {model.output_emb_size}")
    for name, prefix in prefixes.as_record().items():
        settings.append(f"--{name} {prefix!r}")
    console.log(f"{args.model_name_or_path}: a folder of sentence-transformers, {', '.join(settings)}")


def check_whitened_size(size: int, model: Any) -> None:
    """Raise InputError where whitening cannot make embeddings of a size.

    Args:
        size: the value of --whiten; 0: the size that embeddings have.
        model: the network to whiten.
    """
    if size > model.embedding_size:
        raise console.InputError(f"--whiten {size}: embeddings have {model.embedding_size} dimensions")
    hidden_size = model.ptm.config.hidden_size
    if model.fc_is_random and (size or model.embedding_size) > hidden_size:
        raise console.InputError(f"--output_emb_size {model.output_emb_size}: --whiten leaves out an fc that has not "
                                 f"been trained, and vectors before it have {hidden_size} dimensions; give at most "
                                 f"{hidden_size}")


def train(args: argparse.Namespace, texts: textfile.TextFile, test_set: Sequence[textfile.Row]) -> None:
    """Train a network, and do what comes after that: evaluate, whiten, show embeddings.

    Raises:
        Diverged: the loss, or weights, contain NaN or Inf.
        Stopped: a signal has stopped the run, which has saved a checkpoint.
    """
    from model import write_checkpoint
    from simcse.files import file_digest
    from simcse.training.trainer import Trainer

    model, tokenizer, record = build_model(args)
    prefixes = Prefixes.from_record(record)
    check_texts_as_encoded(args, texts, test_set, tokenizer, prefixes)
    sampler = data.ShuffledBatches(len(texts), args.batch_size, RANK, RANKS)
    write_model = functools.partial(write_checkpoint, model=model, tokenizer=tokenizer, record=record)
    test_set_digest = file_digest(args.test_set_file) if compares_evaluations(args) else None
    trainer = Trainer(args, model, texts, steps_per_epoch=len(sampler), write_model=write_model,
                      test_set_digest=test_set_digest)
    if args.save_best and args.resume:
        trainer.restore_best()
    if not args.save_best:
        warn_of_older_best(args.save_dir)
    make_batch = functools.partial(data.make_batch, texts, tokenizer, args, prefixes=prefixes)
    batches = data.batches_after(trainer.step, args.epochs, sampler, make_batch)
    evaluate_model = functools.partial(evaluate_on_ranks, args, model, tokenizer, prefixes, test_set)

    run_steps(args, trainer, batches, evaluate_model)
    if trainer.evaluated_step != trainer.step:  # equal where --early_stopping has ended the run
        evaluate_step(args, trainer, evaluate_model)
    if args.whiten is not None and not RANK:
        whiten_model(args, model, tokenizer, prefixes, texts)
        save_whitened(args, trainer, tokenizer, record["model_name_or_path"], prefixes)
        if test_set:  # by this rank alone, since the other ranks' networks are not whitened
            encode = make_encode(args, model, tokenizer, prefixes)
            trainer.log_measures("whitened", evaluate(encode, [row.fields for row in test_set]))
    if args.visualdl_embeddings and not RANK:
        sample = texts.sample_texts(args.visualdl_embeddings)
        encode = make_encode(args, model, tokenizer, prefixes)
        trainer.log.add_embeddings(sample, encode(sample))
    trainer.finish(flags.hyper_parameters(args))


def run_steps(args: argparse.Namespace, trainer: Any, batches: Iterable[data.Batch],
              evaluate_model: Callable[[], dict[str, float]]) -> None:
    """Take all steps that are left: each computes the gradients of a batch, then updates the weights.

    The gradients are those of `gradients.backward`. Checkpoints are saved here: every --save_steps, and at the end of
    the run, by --epochs, by --early_stopping or by a signal. Three others are decided elsewhere: where the loss is NaN
    or Inf `Trainer.update` saves before it raises Diverged, `evaluate_step` saves model_best, and `train` saves the
    whitened network beside the last one.

    Args:
        args: the flags.
        trainer: the run.
        batches: one for each step.
        evaluate_model: returns the measures of the weights as they are now.

    Raises:
        Diverged: the loss, or weights, contain NaN or Inf. If only the loss does, the weights are saved.
        Stopped: a signal has stopped the run, after a checkpoint.
    """
    from simcse.training.gradients import backward
    from simcse.training.trainer import LOG_STEPS

    model = trainer.model
    with console.progress("training", trainer.total_steps, "steps", lines=False, done=trainer.step) as advance:
        for step, batch in enumerate(batches, start=trainer.step + 1):
            if trainer.stops_early():  # asked before a step, since the run that is resumed may have stopped early
                break
            is_save_step = step % args.save_steps == 0
            is_eval_step = step % args.eval_steps == 0 and step < trainer.total_steps  # the last one follows the loop

            trainer.start_step()
            batch_loss = backward(trainer.network, model, batch, trainer.scale_loss, args.chunk_size)
            trainer.update(batch_loss.value, batch, check_loss=is_save_step or is_eval_step)  # may save and raise
            advance()
            if step % LOG_STEPS == 0 or step == trainer.total_steps:
                trainer.log_step(batch_loss.value, batch_loss)
            if is_eval_step:
                trainer.check_weights("not evaluated")
                evaluate_step(args, trainer, evaluate_model)
            if is_save_step:
                trainer.save()
            if trainer.stop_requested():
                break
    trainer.save()  # the last step; with --epochs 0 the untrained network; nothing where it is saved already
    trainer.finish_signal_handling()


def evaluate_step(args: argparse.Namespace, trainer: Any, evaluate_model: Callable[[], dict[str, float]]) -> None:
    """Evaluate the weights as they are now, and with --save_best save them if they are the best so far.

    All ranks call it together. The arguments are those of `run_steps`.
    """
    measures = evaluate_model()
    trainer.log_measures("eval", measures)
    trainer.evaluated_step = trainer.step
    if compares_evaluations(args):
        is_best = trainer.update_best(measures)
        if is_best and args.save_best:
            trainer.save_best()


def warn_of_older_best(save_dir: str) -> None:
    """Warn where a run without --save_best writes to a folder that has a model_best, which it does not replace."""
    from simcse.training.checkpoints import best_path

    folder = best_path(save_dir)
    if not RANK and os.path.isdir(folder):
        console.warn(f"{folder}: not updated without --save_best, but the shell scripts use it before newer "
                     "checkpoints; remove it, or set PARAMS_PATH")


def whiten_model(args: argparse.Namespace, model: Any, tokenizer: Any, prefixes: Prefixes,
                 texts: textfile.TextFile) -> None:
    """Whiten the network's embeddings, by a sample of the training texts, as documents; remove an fc of random numbers
    first."""
    from simcse.encoder.whitening import SAMPLE, cut_spans, unnormalized, whiten_network

    size = args.whiten or model.embedding_size
    if model.fc_is_random:
        model.remove_fc()
        console.log(f"--whiten: leaving out the fc, which has not been trained; whitening keeps {size} of the "
                    f"{model.embedding_size} dimensions before it")
    sample = texts.sample_texts(SAMPLE)
    sample += cut_spans(sample, tokenizer, args.max_seq_length - count_tokens(tokenizer, prefixes.document))
    unknown = set(wordpiece.find_unknown(tokenizer, tokenizer(sample, args.max_seq_length)))
    known = [text for row, text in enumerate(sample) if row not in unknown]  # embeddings of the others are zeros
    with unnormalized(model):  # the fc that whitens comes before the norm
        embeddings = make_encode(args, model, tokenizer, prefixes, "fp32")(known)
    whiten_network(model, embeddings, size, args.max_seq_length)


def save_whitened(args: argparse.Namespace, trainer: Any, tokenizer: Any, encoder_name: str,
                  prefixes: Prefixes) -> None:
    """Write the whitened network beside the checkpoint of its step, which stays as it is."""
    from model import make_record, save_checkpoint
    from simcse.files import name_output

    folder = os.path.join(args.save_dir, f"model_{trainer.step}_whitened")
    record = make_record(trainer.model, encoder_name, args.max_seq_length, prefixes)
    with name_output(folder, "--save_dir"):
        save_checkpoint(folder, trainer.model, tokenizer, record)
    console.log(f"saved {folder}")


def main() -> None:
    args = parse_args()
    texts = textfile.TextFile(args.train_set_file, "--train_set_file", (1, 2, 3))
    test_set = read_test_set(args)
    if texts.columns > 1 and args.crop_rate:
        raise console.InputError(f"--crop_rate is for texts, one a line; {args.train_set_file} has {texts.columns} "
                                 "columns")
    if args.epochs > 0:
        check_negatives(args, texts)

    args = flags.resolve_training(args)
    kind = {1: "training text", 2: "training pair", 3: "training triple"}[texts.columns]
    start = args.init_from_ckpt or args.model_name_or_path or flags.DEFAULT_MODEL
    flags.announce_training(args, start, console.count(len(texts), kind))

    from simcse.training.trainer import run_training

    run_training(args, lambda: train(args, texts, test_set))


if __name__ == "__main__":
    console.run(main)
