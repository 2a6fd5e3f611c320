#!/bin/sh
# Embeddings and pair scores from the exported model. Further flags are passed on. On a server this folder is enough.
#   OUTPUT_DIR  exported folder  (./output)
#   DEVICE      gpu or cpu       (gpu)
#   PYTHON      the Python to run
here=$(cd "$(dirname "$0")" && pwd)
if [ -f "$here/../../scripts/common.sh" ]; then # in the project, from whose folder ./output is
    cd "$here/../.." || exit 1
    . scripts/common.sh
fi
case " $*" in # a folder that a flag names takes the place of this one, which need not be there
*" --model_dir"*) ;;
*) set -- --model_dir="${OUTPUT_DIR:-./output}" "$@" ;;
esac
exec "${PYTHON:-python3}" "$here/predict.py" --device "${DEVICE:-gpu}" "$@"
