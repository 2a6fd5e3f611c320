#!/bin/sh
# Recall@1/5/10/20/50 of what run_build_index.sh recalled. Further flags are passed on and win over those here.
#   DATA_DIR    folder of dev.csv              (./recall)
#   RESULT_DIR  folder of recall_result.txt    (recall_result_dir)
#   RECALL_NUM  documents looked at a query    (50)
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
given "--similar_text_pair --qrels" "$@" || set -- --similar_text_pair "$DATA_DIR/dev.csv" "$@"
given --recall_result_file "$@" ||
    set -- --recall_result_file "${RESULT_DIR:-recall_result_dir}/recall_result.txt" "$@"
exec "$PYTHON" -u evaluate.py --recall_num "${RECALL_NUM:-50}" "$@"
