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
    # before SimCSE: the encoder itself on the same texts; its checkpoints are what --model_name_or_path takes
    python train.py --objective mlm --train_set_file recall/train_unsupervised.csv --save_dir encoder

Saves `model_<step>/` in --save_dir every --save_steps and at the end; Ctrl-C saves too, and the same command with
--resume goes on. Evaluations go to stdout.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable
from typing import Any

import batches
import cli
import console
import data
import tokenizing
from reporting import Reporter, read_test_set


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument("--train_set_file", type=cli.readable_file, required=True,
                       help="training texts, one a line: SimCSE; query and title, tab-separated: supervised, the "
                       "batch's other titles being negatives; query, title and a hard negative")
    group.add_argument("--test_set_file", type=cli.readable_file, default=None,
                       help="evaluation set: text, text, label on a line (Spearman's rho), or query, target (Recall@k "
                       "among all targets, exact search); None: no evaluation")
    group.add_argument("--max_seq_length", type=cli.sequence_length, default=128,
                       help="tokens per text, [CLS] and [SEP] included; longer texts are cut")
    cli.add_strict_argument(group)
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", type=cli.model_name, default=None,
                       help=f"pretrained encoder, hub name or folder; None: that of --init_from_ckpt, else "
                       f"{data.DEFAULT_MODEL}")
    group.add_argument("--init_from_ckpt", type=cli.checkpoint_file, default=None,
                       help="checkpoint to train on from: model_state.pdparams or the folder that holds it")
    group.add_argument("--output_emb_size", type=cli.natural_int, default=None,
                       help="size of the embedding; 0: the encoder's hidden size, without fc; None: that of "
                       "--init_from_ckpt, else 0")
    group.add_argument("--pooling", choices=data.POOLINGS, default=None,
                       help="how tokens become a vector, here and in all later stages. pooler: the first one through a "
                       "layer and tanh; cls: the first one; mean: of the text's tokens; first_last_avg: that, of the "
                       "first layer's input and the last's output; None: that of --init_from_ckpt, else pooler")
    group.add_argument("--dropout", type=cli.probability, default=0.1, help="hidden and attention dropout rate")
    group.add_argument("--output_dropout", type=cli.probability, default=0.1, help="dropout rate of the output vector")
    group.add_argument("--margin", type=cli.natural_float, default=0.0,
                       help="how much more similar than a negative a positive has to be, in cosine")
    group.add_argument("--scale", type=cli.positive_float, default=20,
                       help="factor on the cosines before the softmax, the inverse of the temperature")
    group.add_argument("--infer_with_fc_pooler", action="store_true",
                       help="evaluation and the later stages go through pooler and fc; without it, the raw first token "
                       "goes through the fc. Any other --pooling is the same everywhere")
    group = parser.add_argument_group("objective")
    group.add_argument("--objective", choices=("contrastive", "mlm"), default="contrastive",
                       help="mlm: masked language modelling, which makes an encoder for --model_name_or_path")
    group.add_argument("--mlm_probability", type=cli.proportion, default=None,
                       help="part of the tokens that --objective mlm predicts, whole words at a time; None: 0.15")
    group.add_argument("--crop_rate", type=cli.probability, default=0.0,
                       help="each view of a text lacks up to this part of it, at its ends; 0: views are whole")
    group.add_argument("--dup_rate", type=cli.probability, default=0.0,
                       help="each view says up to this part of its tokens twice (ESimCSE); 0: none")
    group.add_argument("--matryoshka_dims", type=cli.dims, default=None,
                       help="sizes up to --output_emb_size, such as 256,128,64, for which the first numbers of an "
                       "embedding are trained too; later stages take any of them as --output_emb_size")
    group.add_argument("--distill_from", type=cli.readable_file, default=None,
                       help="another encoder's embeddings of the training texts, .npy, as inference.py writes them, "
                       "whose similarities are learnt as well")
    group.add_argument("--distill_weight", type=cli.positive_float, default=None,
                       help="weight of the loss of --distill_from; None: 1")
    group.add_argument("--whiten", nargs="?", type=cli.natural_int, const=0, default=None, metavar="SIZE",
                       help="when training is over make embeddings of SIZE uncorrelated numbers of equal variance, in "
                       "a checkpoint model_<step>_whitened of its own; 0: as many as they have; None: do not")
    group = parser.add_argument_group("optimization")
    group.add_argument("--batch_size", type=cli.positive_int, default=32, help="texts per batch and device")
    group.add_argument("--learning_rate", type=cli.positive_float, default=5e-5, help="highest learning rate of AdamW")
    group.add_argument("--weight_decay", type=cli.natural_float, default=0.0,
                       help="weight decay of AdamW, not on biases and norms")
    group.add_argument("--epochs", type=cli.natural_int, default=1,
                       help="passes over the training texts; 0: save and evaluate the untrained network")
    group.add_argument("--warmup_proportion", type=cli.proportion, default=0.0,
                       help="part of the steps over which the learning rate rises, before it falls linearly to 0")
    group.add_argument("--warmup_proption", dest="warmup_proportion", type=cli.proportion, help=argparse.SUPPRESS)
    group.add_argument("--max_grad_norm", type=cli.positive_float, default=None,
                       help="scale gradients down to this norm; None: leave them as they are")
    group.add_argument("--gradient_accumulation_steps", type=cli.positive_int, default=1,
                       help="batches whose gradients are averaged for one step; each batch has its own negatives")
    group.add_argument("--cross_device_negatives", action="store_true",
                       help="the texts of all ranks' batches are each other's negatives, not those of one rank's alone")
    group.add_argument("--keep_duplicate_negatives", action="store_true",
                       help="the same text twice in a batch is its own negative, as in the original; without it, such "
                       "pairs are left out of the loss")
    group.add_argument("--gradient_cache", action="store_true",
                       help="encode a batch in chunks and each chunk twice (GradCache): the same gradients in the "
                       "memory of one chunk, for batches of thousands")
    group.add_argument("--chunk_size", type=cli.positive_int, default=None,
                       help="texts per chunk of --gradient_cache; None: 32")
    group.add_argument("--seed", type=cli.natural_int, default=1000, help="random seed")
    group = parser.add_argument_group("device")
    cli.add_device_argument(group)
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                       help="number format of the matrix products; bf16 and fp16, with loss scaling, need --device gpu")
    group.add_argument("--use_recompute", action="store_true",
                       help="keep the encoder layers' inputs only and compute each layer again for its gradients: less "
                       "memory, a third more time")
    group.add_argument("--cpu_threads", type=cli.natural_int, default=0,
                       help="math threads on a CPU; 0: all cores")
    group = parser.add_argument_group("output")
    group.add_argument("--resume", nargs="?", const="auto", default=None,
                       help="go on from a checkpoint folder, with its optimizer, schedule and place in the data, as if "
                       "there had been no break; auto: from the newest in --save_dir, or from the start where there is "
                       "none")
    group.add_argument("--keep_checkpoints", type=cli.natural_int, default=0,
                       help="how many of the newest checkpoints to keep; 0: all. Only the newest can be gone on from")
    group.add_argument("--save_format", choices=("pdparams", "safetensors"), default="pdparams",
                       help="format of the weights")
    group.add_argument("--save_dir", default="./checkpoints", help="folder of the checkpoints")
    group.add_argument("--save_steps", type=cli.positive_int, default=10000, help="steps between checkpoints")
    group.add_argument("--eval_steps", type=cli.positive_int, default=10000, help="steps between evaluations")
    group.add_argument("--visualdl_dir", default="./log", help="folder of the VisualDL log")
    group.add_argument("--visualdl_embeddings", type=cli.natural_int, default=0,
                       help="training texts whose embeddings VisualDL shows when training is over; 0: none")
    args = parser.parse_args()
    check_objective(parser, args)
    if args.precision != "fp32" and args.device != "gpu":
        parser.error(f"--precision {args.precision} needs --device gpu: paddle has no such training on a CPU")
    cli.check_device_arguments(parser, args)
    cli.check_positions(parser, args.max_seq_length, (
        args.model_name_or_path, os.path.dirname(args.init_from_ckpt or ""), args.resume))
    if args.chunk_size and not args.gradient_cache:
        parser.error("--chunk_size needs --gradient_cache")
    if args.resume not in (None, "auto") and not os.path.isfile(os.path.join(args.resume, "training_state.json")):
        parser.error(f"argument --resume: {args.resume}: no checkpoint folder that training can go on from (it has no "
                     "training_state.json); --init_from_ckpt starts anew from a checkpoint's weights")
    return args


# Flags of the contrastive objective, which --objective mlm does not have.
CONTRASTIVE = ("test_set_file", "init_from_ckpt", "output_emb_size", "output_dropout", "margin", "scale", "pooling",
               "infer_with_fc_pooler", "crop_rate", "dup_rate", "matryoshka_dims", "distill_from", "whiten",
               "cross_device_negatives", "keep_duplicate_negatives", "gradient_cache", "use_recompute", "save_format",
               "visualdl_embeddings")


def check_objective(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags of another objective than --objective."""
    if args.objective == "mlm":
        if other := [name for name in CONTRASTIVE if getattr(args, name) != parser.get_default(name)]:
            parser.error(f"--{other[0]} is not for --objective mlm")
        args.mlm_probability = 0.15 if args.mlm_probability is None else args.mlm_probability
    elif args.mlm_probability is not None:
        parser.error("--mlm_probability needs --objective mlm")
    if args.distill_weight and not args.distill_from:
        parser.error("--distill_weight needs --distill_from")


def read_training_set(args: argparse.Namespace) -> data.TextFile:
    """The file of --train_set_file, of one, two or three columns, for which the flags have to make sense."""
    flag = "--train_set_file"
    columns = data.count_columns(args.train_set_file, flag, (1, 2, 3)) if os.path.isfile(args.train_set_file) else 1
    one_column = {"--objective mlm": args.objective == "mlm", "--crop_rate": args.crop_rate,
                  "--dup_rate": args.dup_rate, "--distill_from": args.distill_from}
    if columns > 1 and (asked := [name for name, given in one_column.items() if given]):
        raise console.InputError(f"{asked[0]} is for texts, one a line; {args.train_set_file} has {columns} columns")
    return data.TextFile(args.train_set_file, flag, args.strict_data, columns)


def set_seed(seed: int) -> None:
    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def build_model(args: argparse.Namespace) -> tuple[Any, Any, dict]:
    """The network to train, its tokenizer and the record that goes beside its checkpoints."""
    from backward import train_faster_on_cpu
    from model import check_length

    model, tokenizer, record = build_masked(args) if args.objective == "mlm" else build_contrastive(args)
    check_length(model, args.max_seq_length)
    if args.device == "cpu":
        train_faster_on_cpu(model)
    return model, tokenizer, record


def build_masked(args: argparse.Namespace) -> tuple[Any, Any, dict]:
    """`build_model` for --objective mlm, whose checkpoints are encoders and have no record."""
    from mlm import MaskedLM

    name = args.resume or args.model_name_or_path or data.DEFAULT_MODEL
    return MaskedLM(name, args.dropout), tokenizing.load_tokenizer(name), {}


def build_contrastive(args: argparse.Namespace) -> tuple[Any, Any, dict]:
    """`build_model` for --objective contrastive."""
    import paddle

    from loading import load_encoder, load_model, make_record
    from model import SimCSE

    settings = {"dropout": args.output_dropout, "margin": args.margin, "scale": args.scale,
                **({"pooling": args.pooling} if args.pooling else {})}
    if args.resume or args.init_from_ckpt:
        path, flag = ((cli.checkpoint_file(args.resume), "--resume") if args.resume else
                      (args.init_from_ckpt, "--init_from_ckpt"))
        model, tokenizer, record = load_model(path, None if args.resume else args.model_name_or_path,
                                              args.output_emb_size, flag, args.dropout, settings)
        name = record["model_name_or_path"]
    else:
        name = args.model_name_or_path or data.DEFAULT_MODEL
        model = SimCSE(load_encoder(name, args.dropout), output_emb_size=args.output_emb_size, **settings)
        tokenizer = tokenizing.load_tokenizer(name)
    model.infer_with_pooler = args.infer_with_fc_pooler or model.pooling != "pooler"
    model.precision, model.distill_weight = args.precision, args.distill_weight or 1.0
    model.cross_device_negatives = args.cross_device_negatives and paddle.distributed.get_world_size() > 1
    set_dims(args, model)
    if args.use_recompute:
        model.use_recompute()
    return model, tokenizer, make_record(model, name, args.max_seq_length)


def set_dims(args: argparse.Namespace, model) -> None:
    """Have the network train embeddings of --matryoshka_dims as well; refuse sizes that it cannot have."""
    size, dims = model.embedding_size, args.matryoshka_dims or []
    if dims and (not model.output_emb_size or max(dims) > size):
        raise console.InputError(f"--matryoshka_dims {','.join(map(str, dims))}: no more than --output_emb_size is "
                                 f"possible, which is {model.output_emb_size}")
    if args.whiten and args.whiten > size:
        raise console.InputError(f"--whiten {args.whiten}: embeddings have {size} numbers")
    model.matryoshka_dims = [size, *(dim for dim in dims if dim < size)]


def build_batches(args: argparse.Namespace, texts: data.TextFile, tokenizer):
    """What makes the batches of the objective."""
    if args.objective == "mlm":
        return batches.MaskedBatches(texts, tokenizer, args)
    teacher = data.load_embeddings(args.distill_from, "--distill_from", len(texts)) if args.distill_from else None
    return batches.Batches(texts, tokenizer, args, teacher)


def build_optimizer(args: argparse.Namespace, model, steps: int):
    """AdamW and its learning-rate schedule over `steps` steps."""
    import paddle
    from paddlenlp.transformers import LinearDecayWithWarmup

    schedule = LinearDecayWithWarmup(args.learning_rate, steps, args.warmup_proportion)
    decayed = {parameter.name for name, parameter in model.named_parameters()
               if not any(part in name for part in ("bias", "norm"))}
    clip = paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm else None
    optimizer = paddle.optimizer.AdamW(learning_rate=schedule, parameters=model.parameters(), grad_clip=clip,
                                       weight_decay=args.weight_decay, apply_decay_param_fun=decayed.__contains__)
    return optimizer, schedule


def diverged(step: int, loss, group: list[batches.Batch], texts: data.TextFile, reporter: Reporter) -> bool:
    """Whether the loss is no number; if so, says what can be said and saves, where the weights still are numbers."""
    import paddle

    if math.isfinite(float(loss)):
        return False
    if all(bool(paddle.isfinite(parameter).all()) for parameter in reporter.model.parameters()):
        reporter.save(step)
    lines = sorted(texts.line_number(row) for batch in group for row in batch.rows)
    console.log(f"train.py: error: the loss of step {step + 1} is {float(loss)}; its batch is lines "
                f"{', '.join(map(str, lines[:100]))} of --train_set_file. A lower --learning_rate, "
                "--max_grad_norm 1 or --warmup_proportion 0.1 may help")
    return True


def train(args: argparse.Namespace, texts: data.TextFile, evaluate: Callable | None) -> int:
    """The training loop; returns the exit code: 0, 1 for a loss that is no number, or 128 + the signal that stopped it.
    """
    import paddle

    from backward import backward
    from checkpoint import prepare_save_dir, resumed_step, run_of, write_training_state
    from model import is_first_rank, join_ranks, wait_for_ranks
    from stopping import Stop

    set_seed(args.seed)
    model, tokenizer, record = build_model(args)
    network, (rank, ranks) = model, join_ranks()
    if is_first_rank():  # weights, and two moments of each
        prepare_save_dir(args.save_dir, 12 * sum(parameter.size for parameter in model.parameters()))
    wait_for_ranks()
    if ranks > 1:
        network = paddle.DataParallel(model)  # gives all ranks the weights of rank 0
    makes = build_batches(args, texts, tokenizer)
    sampler = tokenizing.ShuffledBatches(len(texts), args.batch_size, rank, ranks)
    epoch_steps = -(-len(sampler) // args.gradient_accumulation_steps)
    optimizer, schedule = build_optimizer(args, model, epoch_steps * args.epochs)
    scaler = paddle.amp.GradScaler(enable=args.precision == "fp16", init_loss_scaling=2.0**15)
    run = run_of(args, texts, ranks)
    step = resumed_step(args, run, model, optimizer, scaler)
    reporter = Reporter(args, model, tokenizer, record, evaluate, texts, epoch_steps * args.epochs, step,
                        lambda folder, step: write_training_state(folder, model, optimizer, {
                            "step": step, "run": run, "scaler": numbers(scaler.state_dict())}))
    stop = Stop()
    with console.progress("training", reporter.steps, "steps", lines=False, done=step) as advance:
        for epoch, number, group in batches.groups_after(step, epoch_steps, args, sampler, makes):
            model.train()
            # Dropout is a function of seed, rank and step, so that a resumed run has what an unbroken one has.
            paddle.seed(((args.seed + rank) * 1_000_003 + step) % 2**31)
            for batch in group:
                loss = backward(network, model, batch, lambda loss: scaler.scale(loss / len(group)),  # noqa: B023
                                last=batch is group[-1])
            if (args.device == "cpu" or step % 10 == 9) and diverged(step, loss, group, texts, reporter):
                return 1
            learning_rate = optimizer.get_lr()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.clear_grad()
            step += 1
            advance()
            if step % 10 == 0:
                reporter.log_step(step, epoch, number, loss, learning_rate)
            if step % args.eval_steps == 0:
                reporter.evaluate(step)
            if step % args.save_steps == 0:
                reporter.save(step)
            if stop.requested(step):
                reporter.save(step)
                return 128 + stop.signal
    reporter.save(step)
    reporter.evaluate(step)
    if args.whiten is not None:
        reporter.whiten(step, args.whiten or model.embedding_size)
    reporter.finish()
    return 0


def numbers(state: dict) -> dict:
    """A state of tensors of one element as plain numbers, for JSON."""
    return {name: value if isinstance(value, (bool, int)) else float(value) for name, value in state.items()}


def main() -> None:
    args = parse_args()
    texts = read_training_set(args)
    evaluate = read_test_set(args)
    if args.resume == "auto":
        from checkpoint import newest_resumable

        args.resume = newest_resumable(args.save_dir)
    model = args.resume or args.init_from_ckpt or args.model_name_or_path or data.DEFAULT_MODEL
    noun = f"training {('text', 'pair', 'triple')[texts.columns - 1]}"
    cli.announce(args, model, cli.count(texts, noun), f"{args.epochs} epochs in batches of {args.batch_size}")

    from model import is_first_rank, set_device

    set_device(args.device, args.cpu_threads)
    started = time.time()
    code = train(args, texts, evaluate)
    if is_first_rank():
        console.log(f"totally cost {time.time() - started:.1f} s")
    raise SystemExit(code)


if __name__ == "__main__":
    console.run(main)
