#!/bin/sh
# Export a checkpoint as a static graph. Further flags are passed on and win over those here.
#   PARAMS_PATH  checkpoint       (model_best in SAVE_DIR, else the newest there)
#   OUTPUT_DIR   folder to write  (./output)
#   MODEL        encoder, for a checkpoint that has no simcse_config.json
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
given --params_path "$@" || set -- --params_path "$(params_path)" "$@"
exec "$PYTHON" export_model.py ${MODEL:+--model_name_or_path "$MODEL"} --output_path="${OUTPUT_DIR:-./output}" "$@"
