#!/usr/bin/env bash
# The checks of a change.
#
#     bash launch/check.sh lint             ruff: mistakes and layout (`ruff check --fix . && ruff format .` mends most)
#     bash launch/check.sh types            mypy
#     bash launch/check.sh test [ARGS]      pytest
#     bash launch/check.sh golden [--write] recorded losses; --write records them anew
#     bash launch/check.sh all              lint, types and tests; golden losses are among the tests
#     bash launch/check.sh lock             write launch/requirements.txt anew from pyproject.toml
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

lint() {
    python -m ruff check .
    python -m ruff format --check .
}

types() { python -m mypy; }

lock() {
    # torch is chosen afresh: the pin of the file has no local suffix and would prefer another build than this machine's.
    sed -i.bak '/^torch==/d' launch/requirements.txt && rm launch/requirements.txt.bak
    uv_from_pip_settings pip compile --python .venv/bin/python --no-header --no-annotate --no-emit-index-url \
        --no-emit-find-links --extra dev --extra eval --extra hf --extra mix --output-file launch/requirements.txt pyproject.toml "$@"
    # A local build's suffix (torch 2.13.0+cpu) would not be found elsewhere; without it the same pin finds either. What
    # only the CUDA build needs is pinned by that build itself, and a machine without it shall not install it.
    local versions
    versions="$(sed 's/^\(torch==[^+]*\)+.*/\1/; /^#/d; /^nvidia-/d; /^cuda-/d; /^triton==/d' launch/requirements.txt)"
    {
        echo "# Exact versions of what launch/environment.sh installs. Do not edit: change pyproject.toml, then run"
        echo "# bash launch/check.sh lock [--upgrade]"
        echo "$versions"
    } >launch/requirements.txt
}

command="${1:-all}"
shift || true
case "$command" in
    lint | types | lock) "$command" "$@" ;;
    test) python -m pytest "$@" ;;
    golden) python -m pytest tests/golden "$@" ;;
    all)
        lint # each on its own line: after `&&` a failure inside the function would be overlooked
        types
        python -m pytest "$@"
        ;;
    *)
        echo "error: $command is none of lint, types, test, golden, all, lock" >&2
        exit 2
        ;;
esac
