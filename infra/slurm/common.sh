# Sourced by the hooks beside it. SLURM starts those as root with next to no environment: where goku-ops and SLURM's
# settings are stands in goku.env beside this file, or these defaults hold.
export SLURM_CONF="${SLURM_CONF:-/etc/slurm/slurm.conf}"
GOKU_OPS=/opt/goku_mega/bin/goku-ops
here="$(dirname "${BASH_SOURCE[0]}")"
if [[ -e "$here/goku.env" ]]; then
    source "$here/goku.env"
fi
node="${SLURMD_NODENAME:-$(hostname --short)}"

# Nothing printed: the node is fit. Otherwise the first finding.
check_node() {
    local said code=0
    said="$("$GOKU_OPS" check-node --quick 2>&1)" || code=$?
    if ((code)); then
        head -n 1 <<<"${said:-exit code $code}"
    fi
}

reason() {
    sinfo --noheader --Node --nodes="$node" --format=%E | head -n 1
}

# A drain that is there already, an operator's above all, keeps its reason.
drain() {
    if [[ "$(reason)" == none ]]; then
        scontrol update "nodename=$node" state=drain "reason=goku: $1"
    fi
}
