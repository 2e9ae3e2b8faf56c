"""`goku-ops submit`: a supervised training run as a SLURM job."""

import argparse
import shlex
from pathlib import Path

from goku_infra import slurm
from goku_infra.errors import OpsError
from goku_infra.node.run import run_dir_of
from goku_infra.node.worker import check_command

SCRIPT = Path(__file__).parents[3] / "launch/sbatch/train.sbatch"
LOGS = Path("out/slurm")
"""Where the script's `#SBATCH --output` points; SLURM does not make the folder."""
RECIPE_SUFFIXES = (".yaml", ".yml")
SPLITTING = ",'\""
"""What sbatch does not take for a part of a value in --export."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True, help="nodes to train on")
    parser.add_argument("--spares", type=int, default=0, help="nodes kept warm for those that fail (default 0)")
    parser.add_argument("--min-nodes", type=int, default=0, help="fewest nodes to go on with (default: --nodes)")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="processes, one a GPU (default 8)")
    parser.add_argument("--gpus-per-node", type=int, help="asked of SLURM (default: --ranks-per-node; 0 without GPUs)")
    parser.add_argument("--time", default="", help="limit of the job, as D-HH:MM:SS; it saves and is requeued before")
    parser.add_argument("--partition", default="", help="SLURM's partition")
    parser.add_argument("--name", default="", help="the job's name (default: the recipe's, or goku-train)")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch=--account=ours")
    parser.add_argument("--script", type=Path, default=SCRIPT, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch command and submit nothing")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="RECIPE.yaml [name=value ...] | -- COMMAND",
        help="what every rank runs: a recipe with overrides, or a whole command",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Submit the job and say where to look; 0.

    Raises:
        OpsError: unusable sizes or settings of the run, or SLURM refuses the job.
    """
    command = _training_command(options.command)
    check_command(command)
    _check_sizes(options)
    run_dir = run_dir_of(command)  # which also finds a wrong setting now, and not after hours in the queue
    if any(mark in str(run_dir) for mark in SPLITTING):
        raise OpsError(f"run_dir {run_dir} has a comma or a quotation mark, where sbatch would split it; rename it")
    sbatch = _options(options, command, run_dir)
    if options.dry_run:
        print(shlex.join(slurm.submit_command(options.script, command, sbatch)))
        return 0
    if not options.script.is_file():
        raise OpsError(f"{options.script} is not there; run this from a checkout, or name the job's script by --script")
    LOGS.mkdir(parents=True, exist_ok=True)
    job_id = slurm.submit(options.script, command, sbatch)
    print(f"job {job_id}, run_dir {run_dir}")
    print(f"look: goku-ops status {run_dir}")
    return 0


def _training_command(words: list[str]) -> list[str]:
    """A recipe stands for `goku-mega train` with it."""
    if words[:1] == ["--"]:
        return words[1:]
    if words and words[0].endswith(RECIPE_SUFFIXES):
        return ["goku-mega", "train", "--config", *words]
    return words


def _check_sizes(options: argparse.Namespace) -> None:
    for name, least in (("nodes", 1), ("spares", 0), ("min_nodes", 0), ("ranks_per_node", 1)):
        if getattr(options, name) < least:
            raise OpsError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be {least} or more")
    if options.min_nodes > options.nodes:
        raise OpsError(f"--min-nodes {options.min_nodes} is more than the {options.nodes} nodes to train on")


def _options(options: argparse.Namespace, command: list[str], run_dir: Path) -> list[str]:
    """sbatch's options: they go before those in the script."""
    gpus = options.ranks_per_node if options.gpus_per_node is None else options.gpus_per_node
    sizes = {
        "GOKU_SPARES": options.spares, "GOKU_MIN_NODES": options.min_nodes or options.nodes,
        "GOKU_RANKS_PER_NODE": options.ranks_per_node, "GOKU_RUN_DIR": run_dir,
    }  # fmt: skip
    words = [f"--nodes={options.nodes + options.spares}", f"--gpus-per-node={gpus}"]
    recipe = next((Path(word).stem for word in command if word.endswith(RECIPE_SUFFIXES)), "")
    for name, value in (("job-name", options.name or recipe), ("time", options.time), ("partition", options.partition)):
        words += [f"--{name}={value}"] if value else []
    return [*words, "--export=ALL," + ",".join(f"{name}={value}" for name, value in sizes.items()), *options.sbatch]
