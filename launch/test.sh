#!/usr/bin/env bash
# All tests, on a machine with nothing but Python: makes .venv if needed, then runs pytest with the given arguments, in
# two processes: most of the time a test waits for others that it started.
#
#     bash launch/test.sh
#     bash launch/test.sh tests/config -k override
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# Each with one thread: with more of them than cores, threads that wait for each other take most of the time.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n 2 --dist worksteal "$@"
