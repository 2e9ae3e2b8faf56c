#!/usr/bin/env bash
# Sets up this machine where needed, then checks style, types and the whole test suite.
#
# usage: bash launch/test.sh [--quick] [pytest arguments]
#   --quick   leave out the types and the tests marked `slow`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
GOKU_EXTRAS="${GOKU_EXTRAS-curate,dali,ray,torchcodec}"
source launch/setup.sh

# Real engines for the tests, from the distribution: SLURM on nodes made of namespaces, a browser, Prometheus, and
# FFmpeg, which makes media that PyAV cannot and has the libraries that torchcodec needs. Where they cannot be installed, the tests that need them are skipped and say so.
install_engines() {
    local program missing=()
    declare -A package=([slurmctld]=slurm-wlm [munged]=munge [ip]=iproute2 [chromium]=chromium [prometheus]=prometheus [ffmpeg]=ffmpeg)
    for program in "${!package[@]}"; do
        command -v "$program" >/dev/null || missing+=("${package[$program]}")
    done
    [[ ${#missing[@]} -gt 0 && $EUID -eq 0 ]] && command -v apt-get >/dev/null || return 0
    echo "test: installing ${missing[*]}" >&2
    # No service is to start: the tests start what they need themselves.
    apt-get update --quiet --quiet >/dev/null || true
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends \
        "${missing[@]}" >/dev/null || echo "test: could not install ${missing[*]}; their tests are skipped" >&2
}
install_engines

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
# A file stays in one process, so that its fixtures are made once; in the order of their names, for the longest are
# not those with the most tests. Exit 5, nothing collected, fails, too. A failure is told in few lines, for a CI shows
# no more than some thousand characters of all of them.
pytest -n 2 --dist loadfile --no-loadscope-reorder --tb=short --show-capture=no --disable-warnings "${select[@]}" "$@"
