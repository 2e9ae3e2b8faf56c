# Sourced by the batch scripts of this folder: trains with the command "$@" on all nodes of the job, supervised.
#
# An agent on every node runs the ranks; the nodes beyond those to train on are hot spares. What the job needs is
# saved and the job is requeued before its time is up. Settings, from the environment:
#   GOKU_SPARES          nodes of the job that are kept for those that fail (default 0)
#   GOKU_MIN_NODES       fewest nodes to go on with (default: all but the spares)
#   GOKU_RANKS_PER_NODE  default 8
#   GOKU_RUN_DIR         default: what the command's --print-config says
#   GOKU_CHECK           what a node must pass before it trains: full (all nodes together, too), quick or off;
#                        default: full with GPUs, else quick
#   GOKU_AGENT_OPTIONS   further words for `goku-ops agent`
#   VENV                 the virtual environment (default .venv, if it is there)
set -euo pipefail

venv="${VENV:-.venv}"
if [[ -n "${VENV:-}" || -e "$venv/bin/activate" ]]; then
    source "$venv/bin/activate"
fi
nodes=$((SLURM_JOB_NUM_NODES - ${GOKU_SPARES:-0}))
run_dir="${GOKU_RUN_DIR:-$("$@" --print-config | sed -n 's/^run_dir: *//p')}"
logs="$run_dir/supervisor/logs"
check="${GOKU_CHECK:-quick}"
[[ -n "${GOKU_CHECK:-}" || -z "${SLURM_GPUS_ON_NODE:-}" ]] || check=full
mkdir -p "$logs"
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: goku-ops status $run_dir"

journal="$run_dir/supervisor/journal.jsonl"
before="$(wc -l 2>/dev/null <"$journal" || echo 0)"

# A lost node ends neither the step nor the job. The agents write into files of their own: through srun they would
# stand still as soon as this node, and srun with it, is lost.
srun --no-kill --kill-on-bad-exit=0 --wait=0 --ntasks-per-node=1 --cpu-bind=none \
    --output="$logs/node_%N.log" --open-mode=append \
    goku-ops agent --run-dir "$run_dir" --nodes "$nodes" --min-nodes "${GOKU_MIN_NODES:-$nodes}" \
    --ranks-per-node "${GOKU_RANKS_PER_NODE:-8}" --check "$check" ${GOKU_AGENT_OPTIONS:-} -- "$@" &
step=$!

out_of_time() {
    woken=1
    for _ in {1..30}; do # the controller may just be replaced by another
        goku-ops stop "$run_dir" --save --requeue && break
        sleep 1
    done
}
trap out_of_time USR1
while true; do
    woken=0 code=0
    wait "$step" || code=$?
    ((woken)) || break # a signal ends a wait, too
done

# What the run itself came to: srun's code also counts an agent that died on the way.
finished="$(tail -n "+$((before + 1))" "$journal" 2>/dev/null | tail -n 1 |
    sed -n 's/.*"kind":"finished".*"exit_code":\([0-9]*\).*/\1/p' || true)"
code="${finished:-$code}"
if ((code)); then # the nodes' last words, each once
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do tail -n 1 "$logs/node_$node.log"; done | sort -u
fi
exit "$code"
