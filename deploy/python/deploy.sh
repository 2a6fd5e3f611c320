#!/bin/sh
# Embeddings and pair scores from the exported model, by Paddle Inference. Further flags are passed on.
#   OUTPUT_DIR  exported folder  (./output)
#   DEVICE      gpu or cpu       (gpu)
cd "$(dirname "$0")/../.." || exit 1
. scripts/common.sh
exec "$PYTHON" deploy/python/predict.py --model_dir="${OUTPUT_DIR:-./output}" --device "$DEVICE" "$@"
