# Sourced by quickstart.sh and test.sh: afterwards goku-mega and goku-ops are on PATH.
#
# Uses the active virtual environment, or makes .venv beside setup.cfg. Installs once for each state of
# setup.cfg, pyproject.toml and constraints.txt. $PYTHON names the interpreter of a new environment, $GOKU_EXTRAS the
# extras beside `dev` (`curate,dali`).

goku_fail() {
    echo "setup: error: $*" >&2
    return 1
}

goku_environment() {
    local python="${PYTHON:-python3}"
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        export VIRTUAL_ENV="$GOKU_ROOT/.venv"
        if [[ ! -x "$VIRTUAL_ENV/bin/pip" ]]; then
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
                goku_fail "$python is not Python 3.11 or newer; set PYTHON to one that is" || return 1
            echo "setup: making $VIRTUAL_ENV" >&2
            "$python" -m venv "$VIRTUAL_ENV" ||
                goku_fail "$python -m venv failed; install its venv module (Debian: apt install python3-venv)" || return 1
        fi
    fi
    export PATH="$VIRTUAL_ENV/bin:$PATH"
}

goku_state() {
    { "$VIRTUAL_ENV/bin/python" --version && echo "$GOKU_ROOT" "${GOKU_EXTRAS:-}" &&
        (cd "$GOKU_ROOT" && cat setup.cfg pyproject.toml launch/constraints.txt); } | sha256sum
}

goku_torch_version() {
    "$VIRTUAL_ENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))'
}

goku_install() {
    local constraints="$GOKU_ROOT/launch/constraints.txt" stamp="$VIRTUAL_ENV/.goku_mega_installed" torch
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$(goku_state)" ]]; then
        return 0
    fi
    echo "setup: installing into $VIRTUAL_ENV (once, some minutes)" >&2
    # torch first and alone, then pinned to exactly the build that came: no later dependency can swap a CPU
    # build for a CUDA build of several GB.
    pip install --quiet --quiet --constraint "$constraints" "$(grep '^torch==' "$constraints")" || return 1
    torch="$(goku_torch_version)" || return 1
    pip install --quiet --quiet --constraint "$constraints" "torch==$torch" \
        --editable "$GOKU_ROOT[dev${GOKU_EXTRAS:+,$GOKU_EXTRAS}]" || return 1
    [[ "$(goku_torch_version)" == "$torch" ]] || goku_fail "torch $torch was replaced by another build" || return 1
    goku_state >"$stamp"
    echo "setup: done, torch $torch" >&2
}

GOKU_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
goku_environment && goku_install || goku_fail "goku_mega is not installed; see the lines above"
