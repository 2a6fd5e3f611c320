#!/bin/sh
# Train SimCSE. Further flags are passed on and win over those here.
#   GPUS        GPUs to train on, as in 0,1,2,3         (all)
#   DEVICE      gpu or cpu                              (gpu)
#   MODEL       encoder, hub name or folder             (rocketqa-zh-base-query-encoder)
#   DATA_DIR    folder of train_unsupervised.csv, dev.csv  (./recall)
#   SAVE_DIR    folder of the checkpoints               (./checkpoints)
#   EPOCHS BATCH_SIZE LEARNING_RATE MAX_SEQ_LENGTH DROPOUT OUTPUT_EMB_SIZE SAVE_STEPS EVAL_STEPS
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
given --train_set_file "$@" || set -- --train_set_file "$DATA_DIR/train_unsupervised.csv" "$@"
given --test_set_file "$@" || set -- --test_set_file "$DATA_DIR/dev.csv" "$@"
given "--model_name_or_path --init_from_ckpt" "$@" || set -- --model_name_or_path "${MODEL:-rocketqa-zh-base-query-encoder}" "$@"
launch "${GPUS:-all}" "${LOG_DIR:-./train_log}" train.py \
    --eval_steps "${EVAL_STEPS:-100}" \
    --infer_with_fc_pooler \
    --output_emb_size "${OUTPUT_EMB_SIZE:-256}" \
    --device "$DEVICE" \
    --save_dir "$SAVE_DIR" \
    --batch_size "${BATCH_SIZE:-64}" \
    --learning_rate "${LEARNING_RATE:-5E-5}" \
    --epochs "${EPOCHS:-3}" \
    --save_steps "${SAVE_STEPS:-2000}" \
    --max_seq_length "${MAX_SEQ_LENGTH:-64}" \
    --dropout "${DROPOUT:-0.2}" "$@"
