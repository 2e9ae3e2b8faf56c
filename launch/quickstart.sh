#!/usr/bin/env bash
# The main job from nothing, on a laptop without a GPU: corpus -> encode -> train on two processes, one of them
# killed and started again by the supervisor -> go on with another number of processes -> sample -> score.
#
# usage: bash launch/quickstart.sh [OUTPUT_FOLDER]      (default: out)
# A quickstart that was stopped goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

out="${1:-out}"
recipe=launch/recipes/tiny.yaml
settings=(--config "$recipe" "run_dir=$out/run" "data.path=$out/data")
steps="$(sed -n 's/^steps: *//p' "$recipe")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

say() { printf '\n== %s\n' "$*" >&2; }

train() { # processes, then overrides
    goku-ops run --ranks "$1" -- goku-mega train "${settings[@]}" "${@:2}"
}

of_run() { # a Python expression over what `goku-ops status` knows of the run as `run`; empty before it knows
    goku-ops status "$out/run" --json 2>/dev/null |
        python -c 'import json, sys; run = json.loads(sys.stdin.readlines()[-1]); print(eval(sys.argv[1]))' "$1" 2>/dev/null || true
}

wait_for_step() {
    while kill -0 "$trainer" 2>/dev/null && (("$(of_run 'run["step"]')" + 0 < $1)); do sleep 1; done
}

mkdir -p "$out"
say "1/6 corpus: moving shapes as H.264 videos and PNG images, with captions"
goku-mega corpus shapes --output "$out/corpus"

say "2/6 encode: frames to latents (CogVideoX VAE), captions to embeddings (T5), tar shards"
goku-mega encode --corpus "$out/corpus" --output "$out/data"

say "3/6 train on 2 processes under the supervisor; one of them will be killed at a third of $steps steps"
if [[ ! -e "$out/run/stopped" ]]; then
    train 2 &
    trainer=$!
    trap 'kill "$trainer" 2>/dev/null || true' EXIT
    wait_for_step $((steps / 3))
    victim="$(of_run '[rank["pid"] for rank in run["ranks"] if rank["rank"] == 1][0]')"
    kill -KILL "$victim"
    say "killed rank 1 (pid $victim) with SIGKILL; the supervisor starts the ranks again"
    wait_for_step $((steps / 2))
    goku-ops status "$out/run"
    say "at half of the steps: save, and stop"
    goku-ops stop "$out/run" --save
    wait "$trainer"
    trap - EXIT
    touch "$out/run/stopped"
fi

say "4/6 go on with 1 process from the newest intact checkpoint"
goku-mega checkpoint list "$out/run"
train 1 threads_per_rank=2

say "5/6 sample"
goku-mega sample --checkpoint "$out/run" --prompt "a red circle moving left" --output "$out/clip.mp4"
goku-mega sample --checkpoint "$out/run" --prompt "a blue square moving up" --output "$out/clip.gif" --seed 1

say "6/6 evaluate on prompts with new seeds; held_out: combinations never trained on"
goku-mega evaluate shapes --checkpoint "$out/run" --prompts "$out/corpus/prompts.jsonl" \
    --untrained --sheet "$out/sheet.png" --table "$out/evaluation.json"
say "look at $out/sheet.png, $out/clip.mp4 and $out/clip.gif"
