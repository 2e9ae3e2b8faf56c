"""Language models in this process, with eyes and without, through transformers: greedy, one question at a time.

Served models are `curate.chat`'s, which is also where both kinds are chosen between.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from goku_mega.curate.answers import whole_sentences
from goku_mega.encoders.hub import is_out_of_reach, reason
from goku_mega.errors import ConfigError, MissingExtra

LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError)


class LocalChat:
    """A model and its processor (a tokenizer, for a model that sees nothing)."""

    at_once = 1

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int) -> None:
        self._model = model.eval().requires_grad_(False)
        self._processor = processor
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def answer(self, prompt: str, images: Sequence[NDArray[np.uint8]]) -> str:
        """The likeliest words behind the pictures [height, width, 3], in their order, and the prompt."""
        inputs = self._inputs(prompt, images).to(self._model.device)
        inputs = {
            name: value.to(self._model.dtype) if torch.is_floating_point(value) else value
            for name, value in inputs.items()
        }
        asked = inputs["input_ids"].shape[1]
        tokens = self._model.generate(
            **inputs, max_new_tokens=self._max_new_tokens, do_sample=False, num_beams=1
        )[0, asked:]  # fmt: skip
        text = str(self._processor.decode(tokens, skip_special_tokens=True))
        return whole_sentences(text) if self._is_cut(tokens) else text

    def _inputs(self, prompt: str, images: Sequence[NDArray[np.uint8]]) -> Any:
        from PIL import Image

        content: Any = prompt
        if images:
            shown = [{"type": "image", "image": Image.fromarray(image)} for image in images]
            content = [*shown, {"type": "text", "text": prompt}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip

    def _is_cut(self, tokens: torch.Tensor) -> bool:
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return len(tokens) == self._max_new_tokens and int(tokens[-1]) not in ends


def load_vision_language_model(name_or_path: str, *, device: str, max_new_tokens: int) -> LocalChat:
    """A model that is shown pictures: a folder or a hub name, of an architecture that transformers has itself.

    Raises:
        MissingExtra: its processor needs torchvision, as all do that take videos too (InternVL, Qwen-VL).
        ConfigError: there is no such model, it sees no pictures, or it has no chat template.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return _load(AutoModelForImageTextToText, AutoProcessor, name_or_path, device, max_new_tokens)


def load_language_model(name_or_path: str, *, device: str, max_new_tokens: int) -> LocalChat:
    """A model that reads and writes: a folder or a hub name.

    Raises:
        ConfigError: there is no such model, or it has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return _load(AutoModelForCausalLM, AutoTokenizer, name_or_path, device, max_new_tokens)


def _load(model_kind: Any, processor_kind: Any, name_or_path: str, device: str, max_new_tokens: int) -> LocalChat:
    from transformers import logging

    logging.disable_progress_bar()
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    local = is_out_of_reach(name_or_path)
    try:
        processor = processor_kind.from_pretrained(name_or_path, local_files_only=local)
        # CPUs compute in bf16 slowly, if at all; a GPU takes the weights as they were saved.
        dtype = torch.float32 if place.type == "cpu" else "auto"
        model = model_kind.from_pretrained(name_or_path, dtype=dtype, local_files_only=local).to(place)
    except LOAD_ERRORS as error:
        if "torchvision" in str(error).lower():
            raise MissingExtra(
                f"model {name_or_path!r} needs torchvision, which is not installed; pip install torchvision (the "
                "release that belongs to torch), or let vLLM serve the model and set `server`"
            ) from error
        raise ConfigError(
            f"model {name_or_path!r} cannot be loaded ({reason(name_or_path, error, local=local)}); give a folder or a "
            "hub name of a model that transformers has itself, or let vLLM serve it and set `server`"
        ) from error
    if not getattr(processor, "chat_template", None):
        raise ConfigError(f"model {name_or_path!r} has no chat template; take one that is made to be asked")
    return LocalChat(model, processor, max_new_tokens=max_new_tokens)
