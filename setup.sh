#!/bin/sh
# Makes the virtual environment .venv and installs what the tutorial needs; with the argument
# `extras` or `tests`, also what those need.
set -e
cd "$(dirname "$0")"
if ! python3 -c 'import ensurepip' 2>/dev/null; then
    install='apt-get update && apt-get install -y python3-venv'
    if [ "$(id -u)" != 0 ]; then
        echo "setup.sh: Python's module ensurepip is missing. On Debian and Ubuntu, install it with" \
             "this command, then run setup.sh again: sudo sh -c '$install'" >&2
        exit 1
    fi
    sh -c "$install"
fi
python3 -m venv .venv
.venv/bin/pip install -r requirements.txt ${1:+-r "$1/requirements.txt"}
