"""The README's tree is the tree: every module is in it, under its folder, and nothing else is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tree_in_the_readme_lists_every_module():
    listed: set[str] = set()
    folder = ""
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith(("goku_mega/", "infra/goku_infra/")):
            folder = line.strip()
        elif folder and line.startswith("  ") and ".py " in line:
            listed.add(folder + line.split()[0])
        elif line.startswith("```"):
            folder = ""
    packages = (ROOT / "goku_mega", ROOT / "infra" / "goku_infra")
    modules = [path for package in packages for path in package.rglob("*.py") if path.name != "__init__.py"]
    assert listed == {str(path.relative_to(ROOT)) for path in modules}
