"""Captions to embeddings: Flan-T5's encoder through transformers, or a tiny T5 for the quickstart.

A caption's bytes depend on itself alone: every batch has the same number of captions, and a length that is a multiple.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku_mega.encoders.hub import is_out_of_reach, reason
from goku_mega.errors import ConfigError, DataError
from goku_mega.seeding import derive_seed

TINY_WIDTH = 64
TINY_VOCABULARY = 2048
SENTENCE_ENDS = (",", ".", "!", "?")
MAX_TEXT_TOKENS = 512
BATCH_CAPTIONS = 8
"""Captions that go through together, always as many: matrix products of other sizes differ in their last bits."""
LENGTH_STEP_TOKENS = 16
"""Captions are batched with those of the same length, rounded up to this; what fills them up is masked out."""


class TextEncoder:
    """A frozen T5 encoder with its tokenizer."""

    def __init__(self, tokenizer: Any, model: Any, devices: Sequence[torch.device]) -> None:
        """
        Args:
            devices: more than one: the layers are spread over them, one run of layers each.
        """
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.device = devices[0]
        if len(devices) == 1:
            self.model.to(self.device)
        else:
            _spread(self.model, devices)

    @property
    def width(self) -> int:
        return int(self.model.config.d_model)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Each caption's embeddings [text_tokens, width], fp32 on the host, without padding.

        The same bytes whatever its neighbours are.
        """
        distinct = list(dict.fromkeys(captions))
        tokens: list[list[int]] = self.tokenizer(distinct, truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"]
        by_length: dict[int, list[int]] = {}
        for number, ids in enumerate(tokens):
            by_length.setdefault(-(-len(ids) // LENGTH_STEP_TOKENS) * LENGTH_STEP_TOKENS, []).append(number)
        known: dict[str, Tensor] = {}
        for length, numbers in by_length.items():
            for start in range(0, len(numbers), BATCH_CAPTIONS):
                batch = numbers[start : start + BATCH_CAPTIONS]
                embeddings = self._encode_batch([tokens[number] for number in batch], length)
                known.update(zip((distinct[number] for number in batch), embeddings, strict=True))
        return [known[caption] for caption in captions]

    def _encode_batch(self, tokens: list[list[int]], length: int) -> list[Tensor]:
        ids = torch.zeros(BATCH_CAPTIONS, length, dtype=torch.long)
        real = torch.zeros_like(ids)
        filled = [*tokens, *[tokens[0]] * (BATCH_CAPTIONS - len(tokens))]
        for number, row in enumerate(filled):
            ids[number, : len(row)] = torch.tensor(row)
            real[number, : len(row)] = 1
        output = self.model(input_ids=ids.to(self.device), attention_mask=real.to(self.device)).last_hidden_state
        hidden = output.float().cpu()  # [BATCH_CAPTIONS, length, width]
        return [hidden[number, : len(row)].clone() for number, row in enumerate(tokens)]


def _spread(model: Any, devices: Sequence[torch.device]) -> None:
    """Put the encoder's layers on several devices, and bring each layer's inputs to where it is."""
    stack = model.encoder
    layers = list(stack.block)
    model.shared.to(devices[0])
    stack.embed_tokens.to(devices[0])
    places = [devices[number * len(devices) // len(layers)] for number in range(len(layers))]
    for module, device in [*zip(layers, places, strict=True), (stack.final_layer_norm, places[-1])]:
        module.to(device)
        module.register_forward_pre_hook(_bring_to(device), with_kwargs=True)


def _bring_to(device: torch.device) -> Any:
    def bring(module: Any, arguments: Any, keywords: Any) -> Any:
        return _moved(arguments, device), _moved(keywords, device)

    return bring


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value


def load_text_encoder(name_or_path: str, *devices: torch.device) -> TextEncoder:
    """Load a T5 encoder: a folder or a hub name (`google/flan-t5-xl`).

    Args:
        devices: the CPU without any; several share the layers.

    Raises:
        ConfigError: there is no such encoder.
    """
    from transformers import T5EncoderModel, T5Tokenizer, logging

    logging.disable_progress_bar()
    local = is_out_of_reach(name_or_path)
    try:
        model = T5EncoderModel.from_pretrained(name_or_path, dtype=torch.float32, local_files_only=local)
        tokenizer = T5Tokenizer.from_pretrained(name_or_path, local_files_only=local)
    except (OSError, ValueError, RuntimeError) as error:
        why = reason(name_or_path, error, local=local)
        raise ConfigError(
            f"text encoder {name_or_path!r} cannot be loaded ({why}); give `tiny`, a folder or a hub name"
        ) from error
    if not any(piece[0] not in "<\u2581" or piece[1:].isalnum() for piece in tokenizer.get_vocab()):
        # transformers 5 makes an empty vocabulary, in silence, where it finds no file of one.
        raise ConfigError(
            f"text encoder {name_or_path!r} has no vocabulary: put T5's spiece.model beside its config.json"
        )
    return TextEncoder(tokenizer, model, devices or (torch.device("cpu"),))


def weight_bytes(name_or_path: str) -> int:
    """Bytes of an encoder's weights in fp32, from its configuration."""
    from transformers import T5Config, T5EncoderModel

    local = is_out_of_reach(name_or_path)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_pretrained(name_or_path, local_files_only=local))
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def build_tiny_text_encoder(captions: Iterable[str], folder: Path, seed: int) -> None:
    """A T5 of two layers with random weights, and a sentencepiece model trained on the captions.

    Random features keep every word apart; what words mean, the transformer's own caption projection
    and cross-attention learn.

    Raises:
        DataError: there are no words in the captions.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_train_vocabulary(sorted(set(captions))))
    # transformers ignores a model given as `vocab_file`; it takes the one it finds in the folder.
    tokenizer = T5Tokenizer.from_pretrained(str(folder), extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=TINY_WIDTH, d_kv=16, d_ff=4 * TINY_WIDTH, num_layers=2, num_heads=4,
        dropout_rate=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(derive_seed(seed, "text encoder"))
        model = T5EncoderModel(config)
    tokenizer.save_pretrained(str(folder))
    model.save_pretrained(str(folder))


def _train_vocabulary(captions: list[str]) -> bytes:
    """A sentencepiece model in which every word of the captions is one piece; other words fall into letters."""
    import sentencepiece

    words = sorted({word.strip("".join(SENTENCE_ENDS)) for caption in captions for word in caption.split()} - {""})
    if not words:
        raise DataError("the captions hold no words; a text encoder cannot be built from them")
    # The trainer takes only strings that occur in two surroundings for pieces: show each word at several ends.
    ended = [word + end for word in words for end in SENTENCE_ENDS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions + ended),
        model_writer=model,
        vocab_size=TINY_VOCABULARY,
        model_type="unigram",
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
