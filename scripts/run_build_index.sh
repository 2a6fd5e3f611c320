#!/bin/sh
# Encode the corpus, build the index, recall. Further flags are passed on and win over those here.
#   GPUS         GPUs to encode on, as in 0,1,2,3       (the first)
#   DEVICE       gpu or cpu                             (gpu)
#   PARAMS_PATH  checkpoint                             (model_best in SAVE_DIR, else the newest there)
#   DATA_DIR     folder of corpus.csv and dev.csv       (./recall)
#   MODEL        encoder, for a checkpoint that has no simcse_config.json
#   RESULT_DIR   folder of recall_result.txt            (recall_result_dir)
#   BATCH_SIZE MAX_SEQ_LENGTH RECALL_NUM HNSW_M HNSW_EF
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
given --params_path "$@" || set -- --params_path "$(params_path)" "$@"
if ! given --corpus_file "$@" && ! { given "--query --query_file" "$@" && given "--index_path --milvus_uri" "$@"; }; then
    set -- --corpus_file "$DATA_DIR/corpus.csv" "$@" # an index that is there needs none to be asked
fi
given "--similar_text_pair --similar_text_pair_file --query --query_file" "$@" ||
    set -- --similar_text_pair "$DATA_DIR/dev.csv" "$@"
launch "${GPUS:-first}" "${LOG_DIR:-recall_log/}" recall.py \
    --device "$DEVICE" \
    --recall_result_dir "${RESULT_DIR:-recall_result_dir}" \
    --recall_result_file "recall_result.txt" \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    ${HNSW_M:+--hnsw_m "$HNSW_M"} \
    ${HNSW_EF:+--hnsw_ef "$HNSW_EF"} \
    ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} \
    ${MAX_SEQ_LENGTH:+--max_seq_length "$MAX_SEQ_LENGTH"} \
    --recall_num "${RECALL_NUM:-50}" "$@"
