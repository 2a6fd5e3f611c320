#!/bin/sh
# Show the log of training runs, at http://localhost:8040. Further flags are passed on and win over those here.
#   VISUALDL_DIR  folder of the log, train.py's --visualdl_dir  (./log)
# The page is in Chinese where the shell's language is, else in English: without --language VisualDL 2.5.3 takes the
# browser's, and answers 500 where that is another.
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in zh*) language=zh ;; *) language=en ;; esac
case $PYTHON in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
if ! given --logdir "$@"; then
    log=${VISUALDL_DIR:-./log}
    if [ ! -d "$log" ]; then
        echo "visualdl.sh: $log: no such folder; train.py writes its log to --visualdl_dir, VISUALDL_DIR here" >&2
        exit 2
    fi
    cd "$(dirname "$log")" || exit 1 # VisualDL 2.5.3 opens no projector of an absolute path
    set -- --logdir "$(basename "$log")" "$@"
fi
exec "$PYTHON" -m visualdl.server.app --language "$language" "$@"
