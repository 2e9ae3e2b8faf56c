"""What `goku-mega doctor` says of an optional part is what is so."""

import subprocess
import sys

import pytest

from goku_mega.config.nothing import NoConfig
from goku_mega.doctor import OPTIONAL, Part, describe, doctor


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Installs a module of the given source, with a version, and describes it."""

    def install(source: str | None) -> Part:
        if source is not None:
            (tmp_path / "some_part.py").write_text(source)
            (tmp_path / "some_part-1.2.3.dist-info").mkdir()
            (tmp_path / "some_part-1.2.3.dist-info" / "METADATA").write_text("Name: some-part\nVersion: 1.2.3\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "some_part", raising=False)
        return Part("some_part", "some-part", use="used by X", brings="speed", install="pip install some-part")

    return install


def test_a_part_that_is_missing_is_named_with_what_it_brings_and_how_to_get_it(part):
    assert describe(part(None)) == "not found; would bring speed; get it: pip install some-part"


def test_a_part_that_works_is_told_with_its_version_and_use(part):
    assert describe(part("print('hello')")) == "found 1.2.3, used by X"


def test_a_part_that_is_installed_but_broken_is_not_called_found(part):
    line = describe(part("raise RuntimeError('empty meta package\\nand more')"))
    assert line == "found 1.2.3, but does not start: RuntimeError: empty meta package; get it: pip install some-part"


def test_a_module_inside_a_package_of_the_same_name_by_others_is_not_the_part(tmp_path, monkeypatch):
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        describe(Part("another.dali", "another", "", "speed", "itself"))
        == "not found; would bring speed; get it: itself"
    )


def test_every_part_has_a_line_and_a_way_to_get_it():
    found = doctor(NoConfig())
    for name, part in OPTIONAL.items():
        assert "\n" not in found[name] and found[name].startswith(("found ", "not found; "))
        assert part.use and part.brings and part.install
    assert found["cuDNN attention"].startswith(("found ", "not found; "))


def test_importing_it_imports_no_optional_part():
    modules = [part.module.split(".")[0] for part in OPTIONAL.values()] + ["torch"]
    code = f"import sys, goku_mega.doctor; print([name for name in {modules} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
