"""The page that goes with exported weights: what they are and how they were made, from what the checkpoint says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

PAPER = "arXiv 2502.04896"
PRIVATE = ("path", "vae_key")
"""What a data set says of itself that means nothing on another machine."""


@dataclass(frozen=True)
class WeightsSummary:
    """What the card is about, besides the checkpoint's own info."""

    weights: str
    """ema or model."""
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int


def model_card(info: Mapping[str, Any], exported: WeightsSummary) -> str:
    """README.md of a folder of weights: Markdown with the YAML head that the Hugging Face hub reads.

    The licence stays open, for whoever publishes the weights to choose. Figures are shown only if `info` holds them.
    """
    model = info.get("model", {})
    size = model.get("size", "of its own size")
    kind = "class to image" if model.get("text_width") is None else "text to image and video"
    average = "the moving average of the weights" if exported.weights == "ema" else "the weights themselves"
    parts = [
        f"---\n{_head(model)}---\n",
        f"# Goku {size}, {info.get('step', 0)} steps\n",
        f"A rectified-flow transformer of the Goku family ({PAPER}), {kind}, trained with goku_mega: {average} "
        f"after {info.get('step', 0)} steps.\n",
        _table({
            "parameters": f"{exported.parameters:,}",
            "stored as": f"{', '.join(exported.dtypes)} ({exported.bytes / 1e9:.3g} GB)",
            **{name.replace("_", " "): value for name, value in model.items()},
        }),
        _section("Training data", _table({k: v for k, v in info.get("dataset", {}).items() if k not in PRIVATE})),
        _section("Measured", _table(_figures(info))),
        _section("Recipe", _recipe(info.get("run", {}))),
        _section("Use", _use(model)),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _head(model: Mapping[str, Any]) -> str:
    tags = ["goku", "rectified-flow", "diffusion-transformer"]
    task = {} if model.get("text_width") is None else {"pipeline_tag": "text-to-video"}
    head = yaml.safe_dump({"library_name": "goku_mega", **task, "tags": tags}, sort_keys=False)
    return f"# license: to be chosen by whoever publishes the weights\n{head}"


def _figures(info: Mapping[str, Any]) -> dict[str, Any]:
    measured = {"mean training loss since the checkpoint before": info["loss"]} if info.get("loss") is not None else {}
    return measured | dict(info.get("figures", {}))


def _use(model: Mapping[str, Any]) -> str:
    commands = ["goku-mega checkpoint import THIS_FOLDER imported    # to train from: init.checkpoint=imported"]
    if model.get("text_width") is not None:
        commands.insert(0, "goku-mega sample checkpoint=THIS_FOLDER prompt='...' output=sample.mp4")
    return "```bash\n" + "\n".join(commands) + "\n```\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(rows: Mapping[str, Any]) -> str:
    """Two columns; nothing if there is nothing to show."""
    shown = {name: _words(value) for name, value in rows.items() if value is not None}
    lines = [f"| {name} | {value} |" for name, value in shown.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""]) if lines else ""


def _words(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.5g}" if isinstance(value, float) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _recipe(run: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(run), sort_keys=False)}```\n" if run else ""
