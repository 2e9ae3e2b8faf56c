"""One class for every clip from a few of its frames (paper 4.4): the classes, the question, and the answer's reading.

What the classes are used for is `curate.balance`'s affair.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from goku_mega.config.curation import TagConfig
from goku_mega.config_load import read_yaml
from goku_mega.curate.answers import tidy
from goku_mega.curate.chat import ChatSettings, open_chat, shrink
from goku_mega.curate.clip import Clip
from goku_mega.errors import ConfigError

OTHER = "other"
"""Primary class and subclass of clips whose answer names no subclass."""
MAX_NEW_TOKENS = 32

PROMPT = (
    "These pictures are frames of one video, in their order. Put the video into one of the classes below by what it "
    "is mainly about. Each line is a primary class with its subclasses behind the colon.\n\n"
    "{classes}\n\n"
    "Answer with one line and nothing else: the primary class, a slash, the subclass, both written as above, for "
    "example: {example}. If several fit, take the one that fills most of the video. If none fits, answer: other."
)

Classes = Mapping[str, tuple[str, ...]]
"""Primary class -> its subclasses."""


@dataclass(frozen=True)
class TagScore:
    """A clip's class, and the answer that it was read from."""

    primary: str
    subclass: str
    answer: str


class Tags:
    """A model that is shown clips and asked for their class."""

    def __init__(self, config: TagConfig) -> None:
        """
        Raises:
            ConfigError: the classes cannot be used, the model cannot be loaded, or the server's address or key is none.
        """
        self.config = config
        self.classes = read_classes(Path(config.classes) if config.classes else None)
        self.prompt = tag_prompt(self.classes)
        settings = ChatSettings(
            server=config.server, api_key_file=config.api_key_file, max_new_tokens=MAX_NEW_TOKENS,
            request_timeout_s=config.request_timeout_s, device=config.device,
        )  # fmt: skip
        self._chat = open_chat(config.model, settings, sees=True)

    def score(self, clip: Clip) -> TagScore:
        """
        Raises:
            DataError: the model has no answer for this clip.
            ConfigError: the server is gone, or has no such model.
        """
        frames = [shrink(frame, self.config.max_side_px) for frame in clip.spread(self.config.key_frames)]
        answer = tidy(self._chat.answer(self.prompt, frames))
        primary, subclass = read_tag(answer, self.classes)
        return TagScore(primary, subclass, answer)


def read_classes(file: Path | None) -> Classes:
    """Primary classes and their subclasses from a YAML file; without one, those that ship.

    Raises:
        ConfigError: the file cannot be read, or a class is empty, no text, or there twice; names the file and the key.
    """
    if file is not None:
        return _checked(read_yaml(file), str(file))
    with resources.as_file(resources.files("goku_mega.curate") / "classes.yaml") as shipped:
        return _checked(read_yaml(shipped), str(shipped))


def tag_prompt(classes: Classes) -> str:
    lines = [f"{primary}: {', '.join(subclasses)}" for primary, subclasses in classes.items()]
    primary, subclasses = next(iter(classes.items()))
    return PROMPT.format(classes="\n".join(lines), example=f"{primary} / {subclasses[0]}")


def read_tag(answer: str, classes: Classes) -> tuple[str, str]:
    """The (primary class, subclass) that an answer names; of an answer that names no subclass, ("other", "other").

    Case, punctuation, a plural's s and words around do not matter. Of several subclasses, one of a primary class that
    is named too goes first, then the one that is named first.
    """
    primaries = {_words(primary): primary for primary in classes}
    subclasses = {_words(name): (primary, name) for primary, names in classes.items() for name in names}
    found = list(_named(_words(answer), {*primaries, *subclasses}))
    named = {primaries[words] for words in found if words in primaries}
    tags = [subclasses[words] for words in found if words in subclasses]
    tags.sort(key=lambda tag: tag[0] not in named)
    return tags[0] if tags else (OTHER, OTHER)


def _named(words: tuple[str, ...], names: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """The names in a text, from its start; a name inside of a longer one (`car` of `race car`) is none."""
    longest, at = max(map(len, names)), 0
    while at < len(words):
        lengths = range(min(longest, len(words) - at), 0, -1)
        length = next((length for length in lengths if words[at : at + length] in names), None)
        if length is not None:
            yield words[at : at + length]
        at += length or 1


def _words(text: str) -> tuple[str, ...]:
    """A text as it is compared: words in small letters, without punctuation and the s of plurals."""
    return tuple(
        word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
        for word in re.findall(r"[^\W_]+", text.lower())
    )


def _checked(content: Mapping[Any, Any], source: str) -> Classes:
    if not content:
        raise ConfigError(f"{source}: has no classes; write `primary class: [subclass, subclass]` lines")
    places: dict[tuple[str, ...], str] = {_words(OTHER): "the name of what fits no class"}
    for primary in content:
        _take(places, primary, primary, source, what="a primary class")
    for primary, names in content.items():
        if not isinstance(names, list) or not names:
            raise ConfigError(f"{source}: {primary}: must be a list of subclasses, not {names!r}")
        for name in names:
            _take(places, name, primary, source, what=f"a subclass of {primary}")
    return {primary: tuple(names) for primary, names in content.items()}


def _take(places: dict[tuple[str, ...], str], name: Any, key: Any, source: str, *, what: str) -> None:
    """Note a name as taken, in the form in which answers are read: two that read alike could not be told apart."""
    if not isinstance(name, str) or not _words(name):
        raise ConfigError(f"{source}: {key}: {name!r} names no class; write words, in quotes if need be")
    if _words(name) in places:
        raise ConfigError(f"{source}: {key}: {name!r} is already {places[_words(name)]}; give every class its own name")
    places[_words(name)] = what
