# Read by quickstart.sh and run_tests.sh: make a virtual environment and install requirements
# files into it, those that it does not have yet as they are now.
#   PYTHON  the Python to make it with  (python3.11 where there is one, else python3)
make_venv() { # make_venv FOLDER REQUIREMENTS...
    local venv=$1 options='' file base
    shift
    for file in "$@"; do
        grep -qxF "$file $(cksum <"$file")" "$venv/installed" 2>/dev/null || options="$options -r $file"
    done
    if [ -z "$options" ]; then
        return
    fi
    base=${PYTHON:-$(command -v python3.11 || command -v python3)}
    "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || {
        echo "Python 3.10 to 3.12 is needed (3.11 is what is tested); set PYTHON. Found: $("$base" --version 2>&1)" >&2
        return 2
    }
    command -v g++ >/dev/null 2>&1 || {
        echo "g++ is needed to build hnswlib; install it (Debian, Ubuntu: apt-get install g++)" >&2
        return 2
    }
    echo "installing $* into $venv; the first time takes minutes" >&2
    "$base" -m venv "$venv"
    # shellcheck disable=SC2086  # one word an option on purpose
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $options || return
    for file in "$@"; do
        echo "$file $(cksum <"$file")"
    done >"$venv/installed.tmp"
    mv "$venv/installed.tmp" "$venv/installed"
}
