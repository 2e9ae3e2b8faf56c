"""Every recipe loads, and a changed default is a visible difference.

    python tests/house/test_recipes.py

writes tests/house/golden/ anew after a change that is meant.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
GOLDEN = Path(__file__).parent / "golden"


def expanded(recipe: Path) -> str:
    """The recipe with every setting filled in, as `--config RECIPE --print-config` shows it."""
    from goku_mega.config.curation import CurateConfig
    from goku_mega.config.training import FlowRun, VaeRun
    from goku_mega.config_load import load, read_yaml, to_yaml

    kinds = {"flow": FlowRun, "vae": VaeRun, "curate": CurateConfig}
    task = "curate" if recipe.stem == "curate" else read_yaml(recipe).get("task", "flow")
    return to_yaml(load(kinds[task], file=recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_expands_to_its_golden_form(recipe):
    assert expanded(recipe) == (GOLDEN / recipe.name).read_text(), "meant? python tests/house/test_recipes.py"


def test_every_golden_form_has_a_recipe():
    assert sorted(path.name for path in GOLDEN.glob("*.yaml")) == [path.name for path in RECIPES]


@pytest.mark.parametrize(("recipe", "processes"), [("tiny", 2), ("goku_1b", 8), ("goku_2b", 32), ("goku_8b", 64)])
def test_a_recipes_layout_fits_its_model(recipe, processes):
    from goku_mega.config.training import FlowRun
    from goku_mega.config_load import load
    from goku_mega.model.sizes import model_shape
    from goku_mega.parallel.layout import resolve

    run = load(FlowRun, file=ROOT / f"launch/recipes/{recipe}.yaml")
    layout = resolve(run.layout, processes, model_shape(run.size))
    assert layout.world_size == processes


def regenerate() -> None:
    """Write the golden forms of today's recipes and defaults."""
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.yaml"):
        old.unlink()
    for recipe in RECIPES:
        (GOLDEN / recipe.name).write_text(expanded(recipe))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    regenerate()
