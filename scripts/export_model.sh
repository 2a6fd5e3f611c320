#!/bin/sh
# Export a checkpoint as a static graph. Further flags are passed on and win over those here.
#   PARAMS_PATH  checkpoint       (the newest in SAVE_DIR)
#   OUTPUT_DIR   folder to write  (./output)
#   MODEL        encoder, for a checkpoint that has no simcse_config.json
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
exec "$PYTHON" export_model.py --params_path "$(params_path)" ${MODEL:+--model_name_or_path "$MODEL"} \
    --output_path="${OUTPUT_DIR:-./output}" "$@"
