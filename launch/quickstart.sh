#!/usr/bin/env bash
# The main job from nothing, on a laptop without a GPU: corpus -> encode -> train on two processes, one of
# them killed half way -> resume on another number of processes -> sample -> score.
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
    torchrun --standalone --nproc-per-node "$1" -m goku_mega.cli train "${settings[@]}" "${@:2}"
}

steps_done() { # the step that rank 0 is at, 0 before it has begun
    goku-ops status "$out/run" --json 2>/dev/null |
        python -c 'import json, sys; print(max([r["step"] for r in json.load(sys.stdin)["ranks"]], default=0))' \
            2>/dev/null || echo 0
}

rank_pid() {
    goku-ops status "$out/run" --json |
        python -c 'import json, sys; print([r["pid"] for r in json.load(sys.stdin)["ranks"] if r["rank"] == int(sys.argv[1])][0])' "$1"
}

mkdir -p "$out"
say "1/6 corpus: moving shapes as H.264 videos and PNG images, with captions"
goku-mega corpus shapes --output "$out/corpus"

say "2/6 encode: frames to latents (CogVideoX VAE), captions to embeddings (T5), tar shards"
goku-mega encode --corpus "$out/corpus" --output "$out/data"

say "3/6 train on 2 processes; one of them will be killed at half of $steps steps"
if [[ ! -e "$out/run/killed" ]]; then
    # What a killed rank makes the others say fills pages: it goes to a file, the steps are shown.
    train 2 2> >(tee "$out/killed.log" | grep --line-buffered -E ' I (step|resumed)' >&2 || true) &
    trainer=$!
    trap 'kill "$trainer" 2>/dev/null || true' EXIT
    while kill -0 "$trainer" 2>/dev/null && (($(steps_done) < steps / 2)); do sleep 1; done
    victim="$(rank_pid 1)"
    goku-ops status "$out/run"
    kill -KILL "$victim"
    say "killed rank 1 (pid $victim) with SIGKILL; what the other rank said is in $out/killed.log"
    wait "$trainer" && { echo "the run survived the loss of a process?" >&2; exit 1; }
    trap - EXIT
    touch "$out/run/killed"
fi

say "4/6 resume on 1 process from the newest intact checkpoint"
goku-mega checkpoint list "$out/run"
train 1 threads_per_rank=2

say "5/6 sample"
goku-mega sample --checkpoint "$out/run" --prompt "a red circle moving left" --output "$out/clip.mp4"
goku-mega sample --checkpoint "$out/run" --prompt "a blue square moving up" --output "$out/clip.gif" --seed 1

say "6/6 evaluate on prompts with new seeds; held_out: combinations never trained on"
goku-mega evaluate shapes --checkpoint "$out/run" --prompts "$out/corpus/prompts.jsonl" \
    --untrained --sheet "$out/sheet.png" --table "$out/evaluation.json"
say "look at $out/sheet.png, $out/clip.mp4 and $out/clip.gif"
