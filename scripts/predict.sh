#!/bin/sh
# Cosine of text pairs. Further flags are passed on and win over those here.
#   GPUS         GPU to run on                          (the first)
#   DEVICE       gpu or cpu                             (gpu)
#   PARAMS_PATH  checkpoint                             (model_best in SAVE_DIR, else the newest there)
#   DATA_DIR     folder of test.csv                     (./recall)
#   MODEL        encoder, for a checkpoint that has no simcse_config.json
#   BATCH_SIZE MAX_SEQ_LENGTH
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
case ${1:--} in
-*) given "--text_pair_file -" "$@" || set -- --text_pair_file "$DATA_DIR/test.csv" "$@" ;;
*) set -- --text_pair_file "$@" ;; # a file without its flag
esac
given --params_path "$@" || set -- --params_path "$(params_path)" "$@"
if [ "$DEVICE" = gpu ]; then
    case ${GPUS:-} in *,*)
        echo "predict.sh: error: GPUS=$GPUS: pairs are scored on one GPU" >&2
        exit 2
        ;;
    esac
fi
launch "${GPUS:-first}" "${LOG_DIR:-predict_log}" predict.py \
    --device "$DEVICE" \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    ${MAX_SEQ_LENGTH:+--max_seq_length "$MAX_SEQ_LENGTH"} \
    ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} "$@"
