"""What is written about the commands is true, and asking for help costs no torch."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from goku_infra import cli as ops
from goku_mega import cli
from goku_mega.config_load import settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "launch/quickstart.sh", *sorted((ROOT / "docs").rglob("*.md"))]


def written_commands() -> list[tuple[str, list[str]]]:
    """(document, words after the program's name, that first) for every goku-mega and goku-ops line."""
    found = []
    for document in filter(Path.is_file, DOCUMENTS):
        text = document.read_text()
        blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S) if document.suffix == ".md" else [text]
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            line = re.sub(r"\s\d?>.*", "", line)  # where the output goes
            match = re.search(r"(?:^|[\s(])(goku-mega|goku-ops|goku_mega\.cli|goku_infra\.cli)\s+([^|;&>)]*)", line)
            if match and not line.lstrip().startswith(("#", "echo")):
                name = match[1].replace("_", "-").removesuffix(".cli").replace("goku-infra", "goku-ops")
                words = shlex.split(match[2], comments=True)
                found.append((document.name, [name, *(word for word in words if "@" not in word)]))  # no "${array[@]}"
    return found


def test_every_command_written_down_exists_with_its_settings():
    for document, (program, *words) in written_commands():
        if program == "goku-ops":
            ops.read([re.sub(r"^\$\w+$", "1", word) for word in words])  # it exits where it does not know a word
            continue
        if not words or words[0].startswith("-"):
            continue
        name, rest = cli._split_command(words)
        options = cli._read(rest, cli.COMMANDS[name])
        commands = list(cli.TASKS.values()) if name == "train" else [cli.COMMANDS[name]]
        known = {setting.name for command in commands for setting in settings(command.config_class())}
        assert {given for given, _ in options.overrides} <= known, f"{document}: {words}"
        if options.file is not None and "$" not in str(options.file):
            assert (ROOT / options.file).is_file(), f"{document}: {options.file}"


@pytest.mark.parametrize("module", ["goku_mega.cli", "goku_infra.cli"])
def test_help_of_every_command_needs_no_torch(module):
    commands = [name.split() for name in (cli if module == "goku_mega.cli" else ops).COMMANDS]
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'infra')!r}]\n"
        f"from {module} import main\n"
        f"for words in {[[], *commands]!r}:\n"
        "    try:\n"
        "        code = main([*words, '--help'])\n"
        "    except SystemExit as done:\n"
        "        code = done.code\n"
        "    assert code == 0, words\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'diffusers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(words[-1] in done.stdout for words in commands)


def test_every_commands_function_is_written_where_the_table_says():
    named = [command.function for command in [*cli.COMMANDS.values(), *cli.TASKS.values()]]
    named += [f"infra.{command.module}:{name}" for command in ops.COMMANDS.values() for name in command[2:]]
    for command in named:
        module, function = command.split(":")
        source = ROOT / f"{module.replace('.', '/')}.py"
        names = [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert function in names, command


def test_every_setting_is_read_somewhere():
    read = set()
    for path in (ROOT / "goku_mega").rglob("*.py"):
        if path.name != "config_load.py":
            tree = ast.parse(path.read_text())
            if path.parent.name == "config":  # its checks read settings only to refuse them
                tree = ast.Module([node for node in ast.walk(tree) if is_answer(node)], [])
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    rooms = [importlib.import_module(f"goku_mega.config.{path.stem}") for path in ROOT.glob("goku_mega/config/*.py")]
    kinds = {kind for room in rooms for kind in vars(room).values() if isinstance(kind, type) and is_dataclass(kind)}
    unread = {f"{kind.__name__}.{field.name}" for kind in kinds for field in fields(kind) if field.name not in read}
    # `task` chooses the configuration class before there is a configuration.
    assert unread - {"FlowRun.task", "VaeRun.task"} == set()


def is_answer(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_")


def test_every_setting_without_an_evident_name_is_explained():
    for name in ("train", "corpus shapes", "encode", "sample", "evaluate shapes"):
        explained = [setting for setting in settings(cli.COMMANDS[name].config_class()) if setting.text]
        assert len(explained) >= 3, name
