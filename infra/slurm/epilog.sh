#!/usr/bin/env bash
# Epilog in slurm.conf: ends what a job has left running on this node, and removes its agent's files from memory. A
# process that cannot be ended is stuck in the kernel, and so is its GPU: the node is drained.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Processes of the job: ranks and agents carry its number. So do this script and what it starts: not those.
left_over() {
    local folder pid
    for folder in /proc/[0-9]*; do
        pid="${folder#/proc/}"
        if tr '\0' '\n' 2>/dev/null <"$folder/environ" | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID" &&
            [[ "$(ps -o pgid= -p "$pid" | tr -d ' ')" != "$own_group" ]] &&
            [[ "$(ps -o comm= -p "$pid")" != slurm* ]]; then
            echo "$pid"
        fi
    done 2>/dev/null
}

own_group="$(ps -o pgid= -p $$ | tr -d ' ')"
for attempt in {1..20}; do
    processes="$(left_over)"
    [[ -n "$processes" ]] || break
    kill -KILL $processes 2>/dev/null
    sleep 0.1
done
if [[ -n "$processes" ]]; then
    drain "epilog: processes ${processes//$'\n'/ } of job $SLURM_JOB_ID cannot be killed"
elif ! pgrep -u "$SLURM_JOB_UID" -f goku_infra.node.agent >/dev/null; then
    find /dev/shm -maxdepth 1 \( -name 'goku-agent-*' -o -name 'sem.goku-agent-*' \) -user "$SLURM_JOB_UID" -exec rm -rf {} +
fi
