#!/bin/sh
# Makes the virtual environment .venv and installs what the scripts need into it; with the argument
# `tests` also what the tests need.
set -e
cd "$(dirname "$0")"
if ! python3 -c 'import ensurepip'; then
    sudo=$(command -v sudo || true)  # Debian has this part of Python in a package of its own
    $sudo apt-get update
    $sudo apt-get install -y python3-venv
fi
python3 -m venv .venv
.venv/bin/pip install -r requirements.txt ${1:+-r "$1/requirements.txt"}
