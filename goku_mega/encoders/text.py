"""Captions to embeddings: Flan-T5's encoder through transformers, or a tiny T5 for the quickstart."""

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


class TextEncoder:
    """A frozen T5 encoder with its tokenizer."""

    def __init__(self, tokenizer: Any, model: Any, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device

    @property
    def width(self) -> int:
        return int(self.model.config.d_model)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Each caption's embeddings [text_tokens, width], fp32 on the host, without padding.

        One caption at a time: the same bytes whatever its neighbours are.
        """
        known: dict[str, Tensor] = {}
        for caption in captions:
            if caption not in known:
                tokens = self.tokenizer(caption, return_tensors="pt", truncation=True, max_length=MAX_TEXT_TOKENS)
                hidden = self.model(input_ids=tokens["input_ids"].to(self.device)).last_hidden_state
                known[caption] = hidden[0].float().cpu()
        return [known[caption] for caption in captions]


def load_text_encoder(name_or_path: str, device: torch.device | None = None) -> TextEncoder:
    """Load a T5 encoder: a folder or a hub name (`google/flan-t5-xl`).

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
    if tokenizer.convert_tokens_to_ids("\u2581a") == tokenizer.unk_token_id:
        # transformers 5 makes an empty vocabulary, in silence, where it finds no file of one.
        raise ConfigError(
            f"text encoder {name_or_path!r} has no vocabulary: put T5's spiece.model beside its config.json"
        )
    return TextEncoder(tokenizer, model, device or torch.device("cpu"))


def build_tiny_text_encoder(captions: Iterable[str], folder: Path, seed: int) -> None:
    """A T5 of two layers with random weights, and a sentencepiece model trained on the captions.

    Random features keep every word apart; what words mean, the transformer's own caption projection
    and cross-attention learn.

    Raises:
        DataError: there are no words in the captions.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

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
