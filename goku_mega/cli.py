"""goku-mega: a command is a configuration and a function, named here and imported when it is called.

Nothing is computed here, and `--help` imports no torch.
"""

import atexit
import contextlib
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from goku_mega import environment
from goku_mega.errors import ConfigError, RunFault, UserError


class Command(NamedTuple):
    """What a command takes and what it calls."""

    about: str
    config: str
    """Room in `goku_mega.config` and class."""
    function: str
    """Module and function."""

    def config_class(self) -> type:
        room, _, name = self.config.partition(":")
        return getattr(importlib.import_module(f"goku_mega.config.{room}"), name)


COMMANDS = {
    "corpus shapes": Command(
        "write a captioned corpus of moving shapes", "data:CorpusConfig", "goku_mega.data.shapes:write_corpus"
    ),
    "curate": Command(
        "raw videos and images -> scored, captioned clips", "curation:CurateConfig", "goku_mega.curate.curate:curate"
    ),
    "curate filter": Command(
        "move thresholds over the scores that there are; runs no model",
        "curation:CurateConfig",
        "goku_mega.curate.curate:filter_clips",
    ),
    "encode": Command("corpus -> latents and text in shards", "data:EncodeConfig", "goku_mega.data.encode:encode"),
    "data stats": Command("what a data set holds, in numbers", "data:DataStatsConfig", "goku_mega.data.inspect:stats"),
    "data show": Command(
        "samples of a data set as pictures again", "data:DataShowConfig", "goku_mega.data.inspect:show"
    ),
    "train": Command(
        "train the transformer (with `task: vae`, the codec)", "training:FlowRun", "goku_mega.train.loop:train"
    ),
    "sample": Command("prompt -> image or video file", "sampling:SampleConfig", "goku_mega.sample.sampler:sample"),
    "evaluate shapes": Command(
        "sample prompts and score them with the exact detector",
        "sampling:EvaluateConfig",
        "goku_mega.evaluate.shapes:evaluate_shapes",
    ),
    "checkpoint list": Command(
        "list the checkpoints of a run", "checkpoints:CheckpointFolder", "goku_mega.checkpoint.tools:list_checkpoints"
    ),
    "checkpoint verify": Command(
        "read every file of a run's checkpoints", "checkpoints:CheckpointFolder", "goku_mega.checkpoint.tools:verify"
    ),
    "checkpoint inspect": Command(
        "what a checkpoint holds, and of which run", "checkpoints:InspectConfig", "goku_mega.checkpoint.tools:inspect"
    ),
    "checkpoint diff": Command(
        "where two checkpoints differ", "checkpoints:DiffConfig", "goku_mega.checkpoint.diff:diff"
    ),
    "checkpoint reshard": Command(
        "a checkpoint in other files or another dtype",
        "checkpoints:ReshardConfig",
        "goku_mega.checkpoint.rewrite:reshard",
    ),
    "checkpoint export": Command(
        "weights -> safetensors or diffusers' folders",
        "checkpoints:ExportConfig",
        "goku_mega.interchange.export:export",
    ),
    "checkpoint import": Command(
        "safetensors or diffusers' folders -> checkpoint",
        "checkpoints:ImportConfig",
        "goku_mega.interchange.importing:import_weights",
    ),
    "checkpoint prune": Command(
        "delete checkpoints that are no longer wanted", "checkpoints:PruneConfig", "goku_mega.checkpoint.tools:prune"
    ),
    "plan": Command(
        "which layouts fit some GPUs, and how fast they are", "planning:PlanConfig", "goku_mega.plan.fit:plan"
    ),
    "doctor": Command(
        "show what this machine has of what goku_mega can use", "nothing:NoConfig", "goku_mega.doctor:doctor"
    ),
}
TASKS = {
    "flow": COMMANDS["train"],
    "vae": Command("train a small codec on a corpus", "training:VaeRun", "goku_mega.train.vae:train_vae"),
}
POSITIONAL = {
    "data:DataStatsConfig": ("path",),
    "data:DataShowConfig": ("path",),
    "checkpoints:CheckpointFolder": ("path",),
    "checkpoints:InspectConfig": ("path",),
    "checkpoints:PruneConfig": ("path",),
    "checkpoints:DiffConfig": ("first", "second"),
    "checkpoints:ReshardConfig": ("checkpoint", "output"),
    "checkpoints:ExportConfig": ("checkpoint", "output"),
    "checkpoints:ImportConfig": ("source", "output"),
}
"""Settings that may be given without their names, in this order."""
SWITCHES = ("--help", "--print-config", "--json")
HELP_WORDS = ("-h", "--help")
LINES_ABOVE = 3
"""Longer lists of texts are printed a line each."""
SMALLEST_PLAIN = 0.01
"""Smaller numbers of a table are printed with an exponent."""


class Arguments(NamedTuple):
    """A command line, read."""

    file: Path | None
    overrides: list[tuple[str, str]]
    switches: frozenset[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad input, a `RunFault`'s own, 130 when interrupted, 141 when nobody
    reads the output."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=_log_format(), datefmt="%H:%M:%S")
    logging.getLogger("goku_mega").setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)  # torch's and megatron's deprecations are not the user's
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _report(error)
    except RunFault as error:
        print(f"goku-mega: error: {error}\n{json.dumps(error.report)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 141


def _run(words: list[str]) -> int:
    if not words or words[0] in HELP_WORDS:
        print(_overview(COMMANDS))
        return 0
    name, rest = _split_command(words)
    if name not in COMMANDS:
        print(_overview({full: command for full, command in COMMANDS.items() if full.startswith(f"{name} ")}))
        return 0
    command = COMMANDS[name]
    options = _read(rest, command)
    if "--help" in options.switches:
        print(_help(name, command))
        return 0
    if name == "train":
        command = _task(options)
    from goku_mega.config_load import load, to_yaml

    config: Any = load(command.config_class(), file=options.file, overrides=options.overrides)
    if "--print-config" in options.switches:
        if environment.rank() == 0:
            print(to_yaml(config), end="")
        return 0
    result = _call(command, config)
    if environment.rank() == 0:
        print(json.dumps(result) if "--json" in options.switches else _readable(result))
    return 0


def _call(command: Command, config: Any) -> dict[str, Any]:
    module, function = command.function.split(":")
    return getattr(importlib.import_module(module), function)(config)


def _task(options: Arguments) -> Command:
    """What `train` trains is decided by `task`, before the other settings can be read."""
    from goku_mega.config_load import nearest, read_yaml

    file_task = read_yaml(options.file).get("task") if options.file else None
    task = dict(options.overrides).get("task", file_task)
    if task is not None and task not in TASKS:
        raise ConfigError(f"task is {task!r}; {nearest(str(task), list(TASKS), what='the tasks are')}")
    return TASKS[task or "flow"]


def _report(error: UserError) -> int:
    """One line on stderr, once, however many ranks have met the error."""
    rank = environment.rank()
    if rank:
        time.sleep(2)  # if rank 0 has met it too, it says so, and the launcher ends this rank before it wakes
    print(f"goku-mega: {f'rank {rank}: ' if rank else ''}error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _split_command(words: list[str]) -> tuple[str, list[str]]:
    """The command's name and the words after it; the first word alone when help on a group is asked for."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
    group = [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and words[1:2] and words[1] in HELP_WORDS:
        return words[0], []
    from goku_mega.config_load import nearest

    if group and not (words[1:2] and not words[1].startswith("-")):
        raise ConfigError(f"{words[0]} needs one of: {', '.join(group)}")
    given, known = (words[1], group) if group else (words[0], list(dict.fromkeys(name.split()[0] for name in COMMANDS)))
    raise ConfigError(f"unknown command {given!r}; {nearest(given, known, what='the commands are')}")


def _read(words: list[str], command: Command) -> Arguments:
    """Flags and `name=value` words; a flag of a yes-or-no setting needs no value."""
    from goku_mega.config_load import settings

    yes_or_no = {setting.name for setting in settings(command.config_class()) if setting.kind is bool}
    file, overrides, switches = None, [], set()
    unnamed = iter(POSITIONAL.get(command.config, ()))
    rest = iter(words)
    for word in rest:
        if word in SWITCHES or word in HELP_WORDS:
            switches.add("--help" if word in HELP_WORDS else word)
            continue
        name, value = _name_and_value(word, rest, unnamed, yes_or_no)
        if name == "config":
            file = Path(value)
        else:
            overrides.append((name, value))
    return Arguments(file, overrides, frozenset(switches))


def _name_and_value(word: str, rest: Iterator[str], unnamed: Iterator[str], yes_or_no: set[str]) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not word.startswith("--"):
        if equals:
            return name, value
        setting = None if word.startswith("-") else next(unnamed, None)
        if setting is not None:
            return setting, word
        raise ConfigError(f"command line: {word!r} is not understood; write name=value or --name value")
    name = name[2:].replace("-", "_")
    if equals:
        return name, value
    if name in yes_or_no:
        return name, "true"
    following = next(rest, None)
    if following is None or following.startswith("--"):
        raise ConfigError(f"command line: {word} needs a value")
    return name, following


def _overview(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    lines = ["usage: goku-mega COMMAND [--config FILE.yaml] [name=value | --name value ...]", "", "commands:"]
    lines += [f"  {name:{width}}  {command.about}" for name, command in commands.items()]
    lines += ["", "every command: --help, --print-config, --json (one JSON object as the last line)"]
    return "\n".join(lines)


def _help(name: str, command: Command) -> str:
    unnamed = "".join(f"{setting.upper()} " for setting in POSITIONAL.get(command.config, ()))
    usage = f"usage: goku-mega {name} {unnamed}[--config FILE.yaml] [name=value ...]"
    blocks = [f"{usage}\n  {command.about}", f"settings ({command.config_class().__name__}):\n{_settings(command)}"]
    if name == "train":
        blocks.append(f"settings with `task: vae` (VaeRun):\n{_settings(TASKS['vae'])}")
    blocks.append("  --config FILE   a YAML recipe; settings given beside it win\n"
                  "  --print-config  print the resolved settings as YAML and stop\n"
                  "  --json          print the result as one JSON object, the last line")  # fmt: skip
    return "\n\n".join(blocks)


def _settings(command: Command) -> str:
    """One line a setting: name, type, default, and the text under the field in goku_mega/config."""
    from goku_mega.config_load import settings, type_words

    rows = []
    for setting in settings(command.config_class()):
        default = "required" if setting.default is MISSING else f"default {setting.default!r}"
        rows.append((setting.name, f"{type_words(setting.kind)}; {default}", setting.text))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return "\n".join(f"  {name:{widths[0]}}  {kind:{widths[1]}}  {text}".rstrip() for name, kind, text in rows)


def _readable(result: dict[str, Any]) -> str:
    """`key: value` lines; lists of like rows as tables, long lists of texts in lines of their own."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            lines += [f"{key}:", *_table(value)]
        elif isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {item}" for name, item in value.items())]
        elif isinstance(value, list) and len(value) > LINES_ABOVE and all(isinstance(item, str) for item in value):
            lines += [f"{key}:", *(f"  {item}" for item in value)]
        else:
            lines.append(f"{key}:\n{value}" if "\n" in str(value) else f"{key}: {value}")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [[name, *(_cell(row.get(name)) for row in rows)] for name in names]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return [f"  {'  '.join(line).rstrip()}" for line in zip(*padded, strict=True)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < SMALLEST_PLAIN else f"{value:.3f}"
    return "-" if value is None else str(value)


def _log_format() -> str:
    rank = f" rank {environment.rank()}" if environment.world_size() > 1 else ""
    return f"%(asctime)s{rank} %(levelname).1s %(message)s"


def run_and_leave() -> NoReturn:
    """`goku-mega`: run the command, then end the process without taking the interpreter down.

    A thread of gloo's that drops its last tensor while Python ends aborts the process (exit -6, seen now and
    then on busy machines), after all work was done and saved.
    """
    code = main()
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_leave()
