#!/bin/bash
# Creates the Python environment that the lock file describes, or brings it up to date.
#
#   deploy/environment.sh FOLDER
#
# Everything is installed by hash. The project itself is installed in place, without an
# isolated build, so that nothing but the lock file decides what is fetched.
set -euo pipefail

folder="$1"

fail() {
    echo "$1" >&2
    exit 1
}

# A name on the path may be a shim that cannot run: ask each what it is.
find_python() {
    local name
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "Tenfold needs Python 3.11 or newer: install it, or name it with 'make PYTHON=/path/to/python3'."
}

# Says which of how many packages is being fetched; pip's own lines would fill pages.
show_progress() {
    awk -v total="$1" -v terminal="$([ -t 1 ] && echo 1 || echo 0)" '
        /^Collecting / {
            count++
            if (terminal) printf "\r\033[K  %d of %d: %s", count, total, $2
            else if (count % 20 == 0) printf "  %d of %d\n", count, total
            fflush()
        }
        /^Installing collected/ {
            printf "%s  installing\n", terminal ? "\r\033[K" : ""
            fflush()
        }'
}

if ! "$folder/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$(find_python)"
    echo "Creating $folder with $("$python" --version)"
    "$python" -m venv --clear "$folder" ||
        fail "'$python -m venv' failed: on Debian and Ubuntu, 'apt install python3-venv' brings it."
fi

# Unbuffered, or the progress would come all at the end. A warning of pip's would be about the
# reader's own set-up; what goes wrong is an ERROR line.
quietly() {
    PYTHONUNBUFFERED=1 "$folder/bin/python" -m pip --disable-pip-version-check --no-input "$@" \
        2> >(grep -v '^WARNING' >&2)
}

total="$(grep -c '^[a-z].*==' requirements.lock)"
echo "Installing the $total packages of requirements.lock; the first time takes about a minute"
quietly install --progress-bar off --require-hashes -r requirements.lock | show_progress "$total"
quietly install --quiet --no-deps --no-build-isolation -e .
