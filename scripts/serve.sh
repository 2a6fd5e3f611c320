#!/bin/sh
# The search service and its page. Further flags are passed on and win over those here; SIMCSE_TOKEN in the
# environment asks clients for a token.
#   DEVICE      gpu or cpu                                (gpu)
#   OUTPUT_DIR  what export_model.sh wrote                (./output)
#   INDEX_PATH  what recall.py --index_path kept          (my_index)
#   HOST PORT   where to listen                           (127.0.0.1 8000)
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
given --model_dir "$@" || set -- --model_dir "${OUTPUT_DIR:-./output}" "$@"
given "--index_path --milvus_uri" "$@" || set -- --index_path "${INDEX_PATH:-my_index}" "$@"
exec "$PYTHON" deploy/serving/server.py --device "$DEVICE" --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
