#!/usr/bin/env bash
# HealthCheckProgram in slurm.conf: drains a node that has become unfit, and gives back one that it has drained itself
# as soon as it is fit again. No other drain is touched.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

finding="$(check_node)"
if [[ -n "$finding" ]]; then
    drain "check-node: $finding"
elif [[ "$(reason)" == "goku: check-node: "* ]]; then
    scontrol update "nodename=$node" state=resume
fi
