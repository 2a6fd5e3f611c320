#!/usr/bin/env bash
# The whole application on a CPU, without a download of models or data: makes .venv, installs, generates sample data,
# then trains, recalls and evaluates before and after, predicts, exports and deploys. Everything goes to quickstart/.
#   EPOCHS  passes over the sample texts  (1)
#   PYTHON  the Python to make .venv with
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
make_venv .venv requirements.txt
export PYTHON=$PWD/.venv/bin/python DEVICE=cpu DATA_DIR=quickstart/recall SAVE_DIR=quickstart/checkpoints
export MODEL=pretrained/ernie_mini_zh OUTPUT_DIR=quickstart/output
unset PARAMS_PATH
. scripts/common.sh
out=quickstart
rm -rf "$out/checkpoints" "$out/before" "$out/after" "$out/output" "$out/index"
mkdir -p "$out"
started=$SECONDS
rows=()

step() { # step NAME RESULT COMMAND...: run, time, remember for the table
    local name=$1 result=$2 from=$SECONDS
    shift 2
    echo "== $name" >&2
    "$@"
    rows+=("$(printf '%-46s %5d s   %s' "$name" $((SECONDS - from)) "$result")")
}
into() { # into FILE COMMAND...: show what the command prints, and keep it in FILE
    local file=$1
    shift
    "$@" | tee "$file"
}
recall_and_evaluate() { # recall_and_evaluate NAME CHECKPOINT FLAGS...
    local name=$1 checkpoint=$2
    shift 2
    RESULT_DIR=$out/$name PARAMS_PATH=$checkpoint MODEL='' sh scripts/run_build_index.sh "$@"
    RESULT_DIR=$out/$name into "$out/$name/recall.txt" sh scripts/evaluate.sh
}

step "generate sample data" "$DATA_DIR" "$PYTHON" scripts/make_sample_data.py "$DATA_DIR"
untrained() { EPOCHS=0 bash scripts/train.sh --visualdl_dir "$out/log_untrained"; }
step "untrained network" "$SAVE_DIR/model_0" untrained
step "recall, evaluate before training" "$out/before" recall_and_evaluate before "$SAVE_DIR/model_0"
trained() { EPOCHS=${EPOCHS:-1} DROPOUT=0.1 bash scripts/train.sh --warmup_proportion 0.1 --visualdl_dir "$out/log"; }
step "train" "$SAVE_DIR" trained
export PARAMS_PATH
PARAMS_PATH=$(params_path)
step "recall, evaluate after training" "$out/after" recall_and_evaluate after "$PARAMS_PATH" \
    --index_path "$out/index"
compared() { # with figures, and as a picture
    "$PYTHON" evaluate.py --similar_text_pair "$DATA_DIR/dev.csv" --compare --plot "$out/recall.png" \
        --recall_result_file "$out/before/recall_result.txt" "$out/after/recall_result.txt"
}
step "compare both" "$out/recall.png" into "$out/compare.txt" compared
export MODEL=
step "predict pair scores" "$out/scores.txt" into "$out/scores.txt" sh scripts/predict.sh >/dev/null
step "extract embeddings" "$out/corpus.npy" "$PYTHON" inference.py --device cpu --params_path "$PARAMS_PATH" \
    --input_file "$DATA_DIR/corpus.csv" --output_file "$out/corpus.npy"
step "export the static graph" "$OUTPUT_DIR" sh scripts/export_model.sh
step "deploy: Paddle Inference" "$out/deploy.txt" into "$out/deploy.txt" sh deploy/python/deploy.sh

echo
echo "What was done, how long it took, where the files are:"
printf '  %s\n' "${rows[@]}"
printf '  %-46s %5d s\n\n' "in all" $((SECONDS - started))
printf '  %-10s' "" && cut -d= -f1 "$out/before/recall.txt" | tr '\n' '\t' && echo
for when in before after; do
    printf '  %-10s' "$when" && cut -d= -f2 "$out/$when/recall.txt" | tr '\n' '\t\t' && echo
done
echo
echo "The search page of these documents, at http://127.0.0.1:8000:"
echo "  .venv/bin/pip install -r requirements-serving.txt"
echo "  DEVICE=cpu OUTPUT_DIR=$OUTPUT_DIR INDEX_PATH=$out/index sh scripts/serve.sh"
