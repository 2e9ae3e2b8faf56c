#!/usr/bin/env bash
# Prolog in slurm.conf: no job starts on a node that is unfit. The node is drained with what was found, and SLURM
# starts the job elsewhere: at once with SchedulerParameters=nohold_on_prolog_fail, else when it is released by hand.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

finding="$(check_node)"
if [[ -n "$finding" ]]; then
    drain "check-node: $finding"
    exit 1
fi
