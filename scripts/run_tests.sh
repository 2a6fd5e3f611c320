#!/usr/bin/env bash
# Make a virtual environment, install, check the style and run the tests, two at a time. Further arguments go to pytest:
# a file, -k WORD, -n 0 for one at a time, --slow for what takes minutes.
#   STACK   paddle3.3 (default): everything; paddle2.6: the tests of the pipeline and of the original's figures, without
#           those that are marked default_stack
#   PYTHON  the Python to make the environment with
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
case "${STACK:-paddle3.3}" in
paddle3.3)
    venv=.venv
    make_venv "$venv" requirements.txt requirements-milvus.txt requirements-onnx.txt requirements-openvino.txt requirements-serving.txt \
        requirements-test.txt requirements-dev.txt
    # The tests of pages need a browser; without one they are skipped, and say so.
    if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium and a Chinese font for the tests of pages" >&2
        { apt-get update -qq && apt-get install -y -qq chromium chromium-driver fonts-wqy-zenhei; } >/dev/null 2>&1 || true
    fi
    "$venv/bin/ruff" check .
    tests=tests
    marked=
    ;;
paddle2.6)
    # The GPU stack with the CPU build of the same paddle, and without CUDA's libraries.
    venv=.venv-paddle2.6
    mkdir -p "$venv"
    sed 's/^paddlepaddle-gpu/paddlepaddle/; /^nvidia-/d' requirements-gpu.txt >"$venv.requirements.tmp"
    make_venv "$venv" "$venv.requirements.tmp" requirements-serving.txt requirements-test.txt
    marked='not default_stack'
    tests=
    for name in compat lengths train gradients recall pipeline pipes engine precision losses objectives whitening \
        pooling prefixes recipe hugging_face in_batch_negative pretrain mining deploy device gpu \
        resume best stopping checkpoint distributed serving; do
        tests="$tests tests/test_$name.py"
    done
    ;;
*)
    echo "STACK=$STACK: there are paddle3.3 and paddle2.6" >&2
    exit 2
    ;;
esac
files=0
for word in "$@"; do # files that are named are run instead of all
    case $word in tests/*) tests='' files=$((files + 1)) ;; esac
done
# After a crash xdist's replacement waits for ever with --dist loadgroup; this ends the run with the test's name.
workers="-n 2 --dist loadgroup --no-loadscope-reorder --max-worker-restart=0"
[ "$files" = 1 ] && workers="-n 0" # the tests of a file are one worker's
# Each test that has passed takes its files along: the tests write 11 GB, and pytest would keep those of three runs.
# shellcheck disable=SC2086  # a word a file on purpose
exec "$venv/bin/python" -m pytest $tests -ra -p no:schemathesis -o tmp_path_retention_policy=failed -m "$marked" $workers "$@"
