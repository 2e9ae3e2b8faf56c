"""What `goku-mega data stats` and `data show` answer: a data set in numbers, and its latents as pictures again."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goku_mega.config.data import DataShowConfig, DataStatsConfig
from goku_mega.config_load import nearest
from goku_mega.data.shards import Index, IndexRow, ShardReader, load_index
from goku_mega.encoders.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, content_key, load_vae
from goku_mega.errors import DataError, MediaError
from goku_mega.media.write import contact_sheet, write_image
from goku_mega.model.sizes import model_shape
from goku_mega.seeding import derive_seed

QUANTILES = {"least": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}

Row = dict[str, Any]


def stats(config: DataStatsConfig) -> Row:
    """What a data set holds, from its index: no shard is read.

    Frames, heights and widths are those of the encoded pictures, px; `bytes` is that of the arrays.

    Raises:
        DataError: there is none, or it is damaged.
        ConfigError: no such size of model.
    """
    index = load_index(config.path)
    shape = model_shape(config.size, latent_channels=index.latent_channels, text_width=index.text_width)
    tokens, tflops = index.tokens(shape), index.flops(shape) / 1e12
    videos = [row for row in index.rows if row.t > 1]
    hours = sum(frames(row.t) for row in videos) / config.fps / 3600 if config.fps else None
    return {
        "path": config.path,
        "samples": len(index),
        "images": len(index) - len(videos),
        "videos": len(videos),
        "hours": None if hours is None else round(hours, 3),
        "shards": len({row.shard for row in index.rows}),
        "bytes": sum(row.latent_bytes + row.text_bytes for row in index.rows),
        "size": config.size,
        "tokens": int(tokens.sum()),
        "training_tflops": round(float(tflops.sum()), 3),
        **{name: index.dataset.get(name) for name in ("vae", "text", "latent_channels", "text_width")},
        "shapes": _shapes(index, tokens, config.shapes),
        "of_a_sample": [
            _spread("tokens", tokens),
            _spread("training_tflops", tflops),
            _spread("text_tokens", np.array([row.text_tokens for row in index.rows])),
            _spread("caption_characters", np.array([len(row.caption) for row in index.rows])),
            _spread("caption_words", np.array([len(row.caption.split()) for row in index.rows])),
        ],
    }


def show(config: DataShowConfig) -> Row:
    """Decode some samples with the VAE that encoded them, and write a sheet of them with their captions.

    Raises:
        DataError: there is no data set, a key is not in it, or its VAE is another one now.
        ConfigError: its VAE cannot be loaded.
        MediaError: the output is no PNG.
    """
    import torch

    output = Path(config.output)
    if output.suffix != ".png":
        raise MediaError(f"{output}: a sheet is a PNG; give a name that ends in .png")
    torch.set_num_threads(config.threads)
    index = load_index(config.path)
    numbers = _named(index, config.keys.split(",")) if config.keys else _drawn(index, config.samples, config.seed)
    vae = load_vae(_vae(index), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    reader = ShardReader(index)
    clips, shown = [], []
    try:
        read = reader.start(numbers)
        for number in numbers:
            sample, row = read(number), index.rows[number]
            pictures = vae.decode(sample.latent[None])[0]
            clips.append((f"{row.key}: {row.caption}", _small(pictures, config.frames, config.height)))
            shown.append({"key": row.key, **_size(row), "caption": row.caption})
    finally:
        reader.close()
    write_image(output, contact_sheet(clips))
    return {"sheet": str(output), "samples": shown}


def frames(cells: int) -> int:
    """Frames of a clip whose latent has so many cells along the time."""
    return TEMPORAL_STRIDE * (cells - 1) + 1


def _size(row: IndexRow) -> Row:
    return {"frames": frames(row.t), "height": row.h * SPATIAL_STRIDE, "width": row.w * SPATIAL_STRIDE}


def _shapes(index: Index, tokens: NDArray[np.int64], most: int) -> list[Row]:
    """A row a shape, the most frequent first; beyond `most` rows one for all others."""
    count: Counter[tuple[int, int, int]] = Counter()
    long: Counter[tuple[int, int, int]] = Counter()
    for row, number in zip(index.rows, tokens.tolist(), strict=True):
        count[row.t, row.h, row.w] += 1
        long[row.t, row.h, row.w] += number
    rows = [
        {
            **{"frames": frames(t), "height": h * SPATIAL_STRIDE, "width": w * SPATIAL_STRIDE},
            "samples": number,
            "of_samples": round(number / len(index), 4),
            "of_tokens": round(long[t, h, w] / int(tokens.sum()), 4),
        }
        for (t, h, w), number in sorted(count.items(), key=lambda item: (-item[1], item[0]))
    ]
    others = rows[most:]
    sums = {name: round(sum(row[name] for row in others), 4) for name in ("samples", "of_samples", "of_tokens")}
    return rows[:most] + ([{"frames": None, "height": None, "width": None, **sums}] if others else [])


def _spread(name: str, values: NDArray[Any]) -> Row:
    found = np.quantile(values, list(QUANTILES.values()))
    numbers = dict(zip(QUANTILES, found.tolist(), strict=True)) | {"mean": float(values.mean())}
    return {"number": name, **{part: float(f"{number:.5g}") for part, number in numbers.items()}}


def _drawn(index: Index, count: int, seed: int) -> list[int]:
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "show")))
    return sorted(rng.choice(len(index), min(count, len(index)), replace=False).tolist())


def _named(index: Index, keys: Sequence[str]) -> list[int]:
    places = {row.key: number for number, row in enumerate(index.rows)}
    for key in keys:
        if key not in places:
            near = nearest(key, list(places), what="its samples are") if len(places) < 10_000 else "see captions.jsonl"
            raise DataError(f"{index.place} has no sample {key!r}; {near}")
    return [places[key] for key in keys]


def _vae(index: Index) -> str:
    vae, key = index.dataset.get("vae"), index.dataset.get("vae_key")
    if vae is None or content_key(vae) != key:
        raise DataError(
            f"{index.place} was encoded with the VAE {vae!r}, whose weights are gone or have changed; put them back, "
            "or encode again"
        )
    return str(vae)


def _small(pictures: NDArray[np.uint8], most: int, height: int) -> NDArray[np.uint8]:
    """Some frames of [frames, height, width, 3], evenly from the first to the last, no higher than `height`."""
    from PIL import Image

    chosen = pictures[np.unique(np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int))]
    if chosen.shape[1] <= height:
        return chosen
    width = round(chosen.shape[2] * height / chosen.shape[1])
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in chosen])
