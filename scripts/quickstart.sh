#!/usr/bin/env bash
# The whole application on a CPU, without a download of models or data: makes .venv, installs, generates sample data,
# recalls and evaluates without training, after SimCSE, and by the recipe of docs/ without and with BM25, predicts,
# exports and deploys. Everything goes to quickstart/.
#   EPOCHS  passes of SimCSE over the sample texts  (1)
#   PAPERS  documents of the sample  (1500)
#   PYTHON  the Python to make .venv with
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
make_venv .venv requirements.txt
export PYTHON=$PWD/.venv/bin/python DEVICE=cpu DATA_DIR=quickstart/recall OUTPUT_DIR=quickstart/output MODEL=''
unset PARAMS_PATH
. scripts/common.sh
out=quickstart
encoder=pretrained/ernie_mini_zh
rm -rf "$out/untrained" "$out/simcse" "$out/recipe" "$out/hybrid" "$out/output" "$out/index"
mkdir -p "$out"
started=$SECONDS
figures=()

say() { printf '== %s\n' "$*" >&2; }
row() { # row FOLDER NAME SINCE CHECKPOINT FLAGS...: recall and evaluate; what it took, since then, is part of the table
    local folder=$out/$1 name=$2 from=$3 checkpoint=$4 values
    shift 4
    RESULT_DIR=$folder PARAMS_PATH=$checkpoint sh scripts/run_build_index.sh "$@"
    RESULT_DIR=$folder sh scripts/evaluate.sh >"$folder/recall.txt"
    mapfile -t values < <(cut -d= -f2 "$folder/recall.txt")
    figures+=("$(printf '%-36s %6.1f %6.1f %6.1f %6.1f %6.1f %6d s' "$name" "${values[@]}" $((SECONDS - from)))")
}

say "sample data, all made up by scripts/make_sample_data.py: they show that everything works, not how well"
"$PYTHON" scripts/make_sample_data.py "$DATA_DIR" --papers "${PAPERS:-1500}" >&2

say "an encoder that was not trained for this: recall, evaluate"
from=$SECONDS
SAVE_DIR=$out/untrained MODEL=$encoder EPOCHS=0 bash scripts/train.sh --visualdl_dir "$out/log_untrained" >&2
row untrained "untrained" "$from" "$out/untrained/model_0"

say "SimCSE: train, recall, evaluate"
from=$SECONDS
SAVE_DIR=$out/simcse MODEL=$encoder EPOCHS=${EPOCHS:-1} DROPOUT=0.1 bash scripts/train.sh --warmup_proportion 0.1 \
    --visualdl_dir "$out/log" >&2
row simcse "SimCSE, epochs: ${EPOCHS:-1}" "$from" "$(SAVE_DIR=$out/simcse params_path)"

say "the recipe of docs/zh/better-recall.md: whiten, recall, evaluate"
from=$SECONDS
"$PYTHON" train.py --device cpu --epochs 0 --model_name_or_path "$encoder" --pooling first_last_avg --whiten \
    --max_seq_length 64 --train_set_file "$DATA_DIR/train_unsupervised.csv" --save_dir "$out/recipe" \
    --visualdl_dir "$out/log_recipe"
export PARAMS_PATH=$out/recipe/model_0_whitened
row recipe "first_last_avg, whitened" "$from" "$PARAMS_PATH" --index_path "$out/index"

say "the same, fused with BM25"
row hybrid "the same, with BM25" "$SECONDS" "$PARAMS_PATH" --index_path "$out/index" --hybrid_bm25

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
printf '\nFive documents for the query %s, and their fused scores:\n\n' "$query"
cut -f 2- "$out/query.txt"
printf '\nThe search page of these documents, at http://127.0.0.1:8000:\n\n'
printf '  .venv/bin/pip install -r requirements-serving.txt\n'
printf '  DEVICE=cpu OUTPUT_DIR=%s INDEX_PATH=%s/index sh scripts/serve.sh\n' "$OUTPUT_DIR" "$out"
