#!/usr/bin/env bash
# Sets up this machine where needed, then checks style, types and the whole test suite.
#
# usage: bash launch/test.sh [--quick] [pytest arguments]
#   --quick   leave out the types and the tests marked `slow`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
select=()
if [[ "${1:-}" == --quick ]]; then
    shift
    select=(-m "not slow")
fi

ruff check .
if [[ ${#select[@]} -eq 0 ]]; then
    mypy
fi
# A file stays in one process, so that its fixtures are made once. Exit 5, nothing collected, fails, too.
pytest -n 2 --dist loadfile "${select[@]}" "$@"
