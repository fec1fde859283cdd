#!/bin/sh
# Makes the virtual environment .venv and installs what the tutorial needs; with the argument
# `extras` or `tests`, also what those need.
set -e
cd "$(dirname "$0")"
export PIP_USER=0  # where pip installs for the user alone, it refuses to do so in .venv
newest=14  # TensorFlow has packages for Python 3.10 to 3.14; for Macs with Intel, to 3.12
[ "$(uname -sm)" != 'Darwin x86_64' ] || newest=12

fits() {
    "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null
}
works() {  # in a folder that was moved, an environment still names the place where it was made
    fits .venv/bin/python && .venv/bin/python -m pip --version &&
        grep -F "$(pwd -P)/.venv/" .venv/bin/pip
}
fail() {
    echo "setup.sh: $*, then run setup.sh again" >&2
    exit 1
}

if ! works >/dev/null 2>&1; then
    python=
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if fits $name; then python=$name; break; fi
    done
    if [ -z "$python" ]; then  # uv finds others on this machine, or downloads one
        uv=uv
        if ! command -v uv >/dev/null; then
            folder=$(mktemp -d)
            trap 'rm -rf "$folder"' EXIT
            python3 -m pip install --quiet --target "$folder" uv 2>/dev/null || true
            uv=$folder/bin/uv
        fi
        rm -rf .venv
        { command -v "$uv" && "$uv" venv --seed --python ">=3.10,<3.$newest" .venv; } >/dev/null ||
            fail "TensorFlow needs Python 3.10 to 3.$newest (found:" \
                 "$(python3 --version 2>/dev/null || echo none)). Install one of those from your" \
                 "system's packages or https://www.python.org/downloads/"
    else
        if ! $python -c 'import ensurepip' 2>/dev/null; then
            install="apt-get update && apt-get install -y $python-venv"
            [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
                fail "Python's module ensurepip is missing. Install it from your system's" \
                     "packages, on Debian and Ubuntu by this command: sudo sh -c '$install'"
            sh -c "$install"
        fi
        rm -rf .venv
        $python -m venv .venv
    fi
fi
.venv/bin/python -m pip install -r requirements.txt ${1:+-r "$1/requirements.txt"}
