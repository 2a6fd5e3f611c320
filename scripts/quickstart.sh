#!/usr/bin/env bash
# The whole application in one command, without a download of models: makes .venv and installs, then
#   bash scripts/quickstart.sh                        shows everything on a CPU, on sample data
#   bash scripts/quickstart.sh FILE [QUERY ...]       searches your own documents; no labels are needed
#   bash scripts/quickstart.sh --help                 prints this
# With a file (a document a line, or an id, a tab and a document):
#   whiten an encoder on the documents; make pairs from them; train on the pairs; build an index with BM25; answer the
#   queries, or three clauses of the file
# Without a file, everything in quickstart/:
#   make sample data; recall and evaluate untrained, after SimCSE, whitened, after training on pairs, and with BM25;
#   predict; embed; export; deploy
# Settings from the environment:
#   PYTHON  the Python to make .venv with
# with a file (FILE and OUT are relative to the folder from which you call):
#   OUT     folder to write to  (quickstart/files/<name of the file>, in the project)
#   DEVICE  gpu or cpu  (gpu where .venv has paddlepaddle-gpu and there is a GPU)
# without a file:
#   EPOCHS  passes of SimCSE over the sample texts  (1)
#   PAPERS  documents of the sample  (1500)
set -euo pipefail
trap 'exit 130' INT # even if the interrupted program exits with another code
caller=$PWD
cd "$(dirname "$0")/.."
. scripts/venv.sh
. scripts/own_texts.sh

# print_usage: the comment at the top of this file.
print_usage() { sed -n '2,/^set/s/^# \{0,1\}//p' scripts/quickstart.sh; }

# from_caller PATH: a path that the user gave, relative to the folder in which the user called.
from_caller() {
    case $1 in
    /*) printf '%s' "$1" ;;
    *) if [ "$caller" = "$PWD" ]; then printf '%s' "$1"; else printf '%s' "$caller/$1"; fi ;;
    esac
}

case ${1:-} in
-h | --help)
    print_usage
    exit
    ;;
-*) refuse "$1: no such flag; usage: bash scripts/quickstart.sh [FILE [QUERY ...]]" ;;
esac
if [ $# -gt 0 ]; then
    corpus=$(from_caller "$1")
    shift
    if [ -n "${OUT:-}" ]; then
        folder=$(from_caller "$OUT")
    else
        folder=$(default_folder "$corpus")
    fi
    run_on_file "$folder" "$corpus" "$@"
    exit
fi

out=quickstart
results="untrained simcse recipe paired hybrid output index"
for name in '' recall $results; do
    if [ -e "$out/$name/$OWN_MARK" ]; then
        refuse "$out/$name: holds the results of a run with a file, and the sample run writes to it; move it elsewhere"
    fi
done
DEVICE=cpu
install_for_device
export PYTHON=$PWD/.venv/bin/python DEVICE DATA_DIR=quickstart/recall OUTPUT_DIR=quickstart/output MODEL=''
unset PARAMS_PATH
. scripts/common.sh
choose_settings $((SHORT_LENGTH + 1)) # abstracts are long texts
for name in $results; do
    rm -rf "${out:?}/$name"
done
mkdir -p "$out"
started=$SECONDS
figures=()

# row FOLDER NAME SINCE CHECKPOINT FLAGS...: recall, evaluate, and add a row to the table, with the seconds since SINCE.
row() {
    local folder=$out/$1 name=$2 since=$3 checkpoint=$4 values
    shift 4
    RESULT_DIR=$folder PARAMS_PATH=$checkpoint sh scripts/run_build_index.sh "$@"
    RESULT_DIR=$folder sh scripts/evaluate.sh >"$folder/recall.txt"
    mapfile -t values < <(cut -d= -f2 "$folder/recall.txt")
    figures+=("$(printf '%-36s %6.1f %6.1f %6.1f %6.1f %6.1f %6d s' "$name" "${values[@]}" $((SECONDS - since)))")
}

say "sample data, all made up by scripts/make_sample_data.py: they show that everything works, not how well"
papers=${PAPERS:-1500}
"$PYTHON" scripts/make_sample_data.py "$DATA_DIR" --papers "$papers" >&2

say "an encoder that was not trained for this: recall, evaluate"
from=$SECONDS
SAVE_DIR=$out/untrained MODEL=$ENCODER EPOCHS=0 bash scripts/train.sh --visualdl_dir "$out/log_untrained" >&2
row untrained "untrained" "$from" "$out/untrained/model_0"

say "SimCSE: train, recall, evaluate"
from=$SECONDS
SAVE_DIR=$out/simcse MODEL=$ENCODER EPOCHS=${EPOCHS:-1} DROPOUT=0.1 bash scripts/train.sh --warmup_proportion 0.1 \
    --visualdl_dir "$out/log" >&2
row simcse "SimCSE, epochs: ${EPOCHS:-1}" "$from" "$(SAVE_DIR=$out/simcse params_path)"

say "the recipe of docs/zh/better-recall.md: whiten, recall, evaluate"
from=$SECONDS
"$PYTHON" train.py --device cpu --epochs 0 --model_name_or_path "$ENCODER" --pooling first_last_avg --whiten \
    --max_seq_length 64 --train_set_file "$DATA_DIR/train_unsupervised.csv" --save_dir "$out/recipe" \
    --visualdl_dir "$out/log_recipe"
export PARAMS_PATH=$out/recipe/model_0_whitened
row recipe "first_last_avg, whitened" "$from" "$PARAMS_PATH" --index_path "$out/index"

say "documents without labels: whiten $POOLING, train on pairs made from documents; recall, evaluate"
from=$SECONDS
whiten_encoder "$out/paired/whitened" "$DATA_DIR/corpus.csv"
make_document_pairs "$DATA_DIR/corpus.csv" "$papers" "$out/paired/pairs.csv"
train_on_pairs "$out/paired/trained" "$out/paired/pairs.csv" "$out/paired/whitened/model_0_whitened"
row paired "$POOLING, trained on pairs" "$from" "$(trained_checkpoint "$out/paired/trained")"

say "first_last_avg, fused with BM25"
row hybrid "first_last_avg, with BM25" "$SECONDS" "$PARAMS_PATH" --index_path "$out/index" --hybrid_bm25

say "scores of pairs, embeddings, the static graph, Paddle Inference"
sh scripts/predict.sh >"$out/scores.txt"
"$PYTHON" inference.py --device cpu --params_path "$PARAMS_PATH" --input_file "$DATA_DIR/corpus.csv" \
    --output_file "$out/corpus.npy"
sh scripts/export_model.sh
sh deploy/python/deploy.sh >"$out/deploy.txt"
query=$(head -n 1 "$DATA_DIR/dev.csv" | cut -f 1)
"$PYTHON" recall.py --quiet --device cpu --params_path "$PARAMS_PATH" --index_path "$out/index" --hybrid_bm25 \
    --query "$query" --top_k 5 >"$out/query.txt"

printf '\nRecall@k of made-up sample data, in percent, and what it took (%d s in all; files in %s/):\n\n' \
    $((SECONDS - started)) "$out"
printf '%-36s %6s %6s %6s %6s %6s %8s\n' "" @1 @5 @10 @20 @50 took
printf '%s\n' "${figures[@]}"
printf '\nThe deployed model (deploy.txt): an embedding, of which the first numbers, and cosines of two pairs:\n\n'
printf '%s ...\n%s\n' "$(sed -n 1,2p "$out/deploy.txt")" "$(tail -n 1 "$out/deploy.txt")"
printf '\nFive documents for a query. '
explain_scores
"$PYTHON" scripts/print_answers.py <"$out/query.txt"
printf '\nThe search page of these documents, at http://127.0.0.1:8000; run this in %s:\n\n' "$PWD"
printf '  .venv/bin/pip install -r requirements-serving.txt\n'
printf '  PYTHON=.venv/bin/python DEVICE=cpu OUTPUT_DIR=%s INDEX_PATH=%s/index sh scripts/serve.sh\n' "$OUTPUT_DIR" "$out"
