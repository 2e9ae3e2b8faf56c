"""The arrows between the rooms, and what a room may read from its surroundings."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"goku_mega": ROOT / "goku_mega", "goku_infra": ROOT / "infra/goku_infra"}
ENVIRONMENT_READ = {"environ", "getenv", "environb"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees the two packages from the checkout."""
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'infra')!r}]\n"
    return subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, cwd=ROOT)


def test_every_import_follows_the_arrows(tmp_path):
    done = python(
        "from importlinter.cli import lint_imports_command\n"
        f"lint_imports_command(['--config', {str(ROOT / 'setup.cfg')!r}, '--cache-dir', {str(tmp_path)!r}])"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_the_packages_in_setup_cfg_are_the_packages_on_disk():
    listed = setup_cfg()["options"]["packages"].split()
    on_disk = [
        ".".join((name, *path.parent.relative_to(folder).parts))
        for name, folder in PACKAGES.items()
        for path in folder.rglob("__init__.py")
    ]
    assert sorted(line for line in listed if not line.startswith("#")) == sorted(on_disk)


def test_every_folder_of_modules_is_a_package_with_an_empty_init():
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").read_text() == "", path.parent


@pytest.mark.parametrize("package", PACKAGES)
def test_the_environment_is_read_in_one_file_of_a_package(package):
    readers = [path.name for path in sorted(PACKAGES[package].rglob("*.py")) if _reads_environment(path)]
    assert len(readers) <= 1, readers


def test_importing_the_package_imports_neither_torch_nor_numpy():
    done = python("import goku_mega, goku_infra; print(sorted({'torch', 'numpy', 'megatron'} & sys.modules.keys()))")
    assert done.stdout == "[]\n", done.stderr


def test_the_operators_package_and_the_plans_work_where_torch_cannot_be_imported():
    infra = PACKAGES["goku_infra"]
    modules = [
        ".".join(("goku_infra", *path.relative_to(infra).with_suffix("").parts))
        for path in infra.rglob("*.py")
        if path.stem not in ("__init__", "agent")
    ]
    modules += re.findall(r"goku_mega\.\S+", setup_cfg()["importlinter:contract:paper"]["source_modules"])
    imports = "\n".join(f"import {name}" for name in [*modules, "goku_mega.plan.flops"])
    done = python(f"sys.modules['torch'] = None\n{imports}\nprint('imported')")
    assert done.stdout == "imported\n", done.stderr


def test_every_constraint_pins_one_version_and_every_pin_is_asked_for():
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = [re.fullmatch(r"([a-z0-9-]+)==\S+", pin)[1] for pin in pins]
    options = setup_cfg()
    asked = options["options"]["install_requires"] + "\n".join(options["options.extras_require"].values())
    asked_names = {re.split(r"[^a-z0-9-]", line)[0] for line in asked.splitlines() if line and not line.startswith("#")}
    assert set(names) <= asked_names
    required = {
        re.split(r"[^a-z0-9-]", line)[0] for line in options["options"]["install_requires"].splitlines() if line
    }
    assert required - {""} <= set(names)


def _reads_environment(path: Path) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_READ)
        or (
            isinstance(node, ast.ImportFrom) and node.module == "os" and ENVIRONMENT_READ & {n.name for n in node.names}
        )
        for node in ast.walk(ast.parse(path.read_text()))
    )
