# Read by the other scripts, from the project's folder, under dash and bash.
# Settings come from the environment:
#   DEVICE    gpu or cpu                      (gpu)
#   GPUS      GPUs by their numbers, of those in CUDA_VISIBLE_DEVICES where it is set: see the script that reads it
#   PYTHON    the Python to run               (that of an activated environment, else .venv/bin/python, else python)
#   DATA_DIR  folder of train_unsupervised.csv, dev.csv, corpus.csv and test.csv  (./recall)
#   SAVE_DIR  folder of the checkpoints       (./checkpoints)
DEVICE=${DEVICE:-gpu}
DATA_DIR=${DATA_DIR:-./recall}
SAVE_DIR=${SAVE_DIR:-./checkpoints}
if [ -z "${PYTHON:-}" ]; then
    conda=${CONDA_PREFIX:-}
    if [ "${CONDA_DEFAULT_ENV:-}" = base ]; then
        conda= # every shell has that one, whether somebody chose it or not
    fi
    for folder in "${VIRTUAL_ENV:-}" "$conda" .venv; do
        if [ -n "$folder" ] && [ -x "$folder/bin/python" ]; then
            PYTHON=$folder/bin/python
            break
        fi
    done
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    command -v python >/dev/null 2>&1 || PYTHON=python3
fi

# launch GPUS LOG_DIR SCRIPT FLAGS...: on the GPUs of scripts/launch.py's --gpus, or on a CPU.
launch() {
    gpus=$1
    log_dir=$2
    shift 2
    if [ "$DEVICE" = gpu ] && ! given "--help -h" "$@"; then
        exec "$PYTHON" -u scripts/launch.py --gpus "$gpus" --log_dir "$log_dir" "$@"
    fi
    exec "$PYTHON" -u "$@"
}

# given FLAGS "$@": whether one of the FLAGS, with blanks between them, is among the words. A script names its own file
# only where it is not: argparse checks every file that is named, also one that a later flag replaces.
given() {
    flags=$1
    shift
    for word in "$@"; do
        case " $flags " in *" ${word%%=*} "*) return 0 ;; esac
    done
    return 1
}

# The checkpoint of PARAMS_PATH; without it model_best in SAVE_DIR, which train.py --save_best keeps, else the newest.
params_path() {
    if [ -n "${PARAMS_PATH:-}" ]; then
        echo "$PARAMS_PATH"
        return
    fi
    for weights in "$SAVE_DIR"/model_best/model_state.pdparams "$SAVE_DIR"/model_best/model_state.safetensors; do
        if [ -f "$weights" ]; then
            echo "using $SAVE_DIR/model_best, the checkpoint of the best evaluation; set PARAMS_PATH to use another" >&2
            echo "$weights"
            return
        fi
    done
    # By the weights' own age: older folders lose their training state, and are younger for it, when a new one is saved.
    newest=$(ls -t "$SAVE_DIR"/model_*/model_state.* 2>/dev/null | head -n 1)
    echo "${newest:-$SAVE_DIR/model_20000/model_state.pdparams}"
}
