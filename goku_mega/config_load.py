"""From YAML recipes and command-line overrides to the frozen dataclasses of `config`, strictly.

What is not known is refused by name, with the nearest name that is. Values of other types are refused,
too; only the text of a number is read as that number.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from goku_mega.errors import ConfigError

Config = TypeVar("Config")
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
COMMAND_LINE = "command line"


class Setting(NamedTuple):
    """One field of a configuration, or of a section inside it."""

    name: str
    """Dotted: `layout.tp`."""
    kind: Any
    default: Any
    """`dataclasses.MISSING` where a value must be given."""
    section: type
    """The class that it is a field of."""

    @property
    def text(self) -> str:
        """What stands under the field in `config`; only help needs it, for reading the source takes a while."""
        return _field_texts(self.section).get(self.name.rpartition(".")[2], "")


def load(kind: type[Config], *, file: Path | None = None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """A `kind` from a recipe and from overrides, which win.

    Args:
        overrides: (dotted name, text) pairs; text settings take the text as it is, others read it as YAML.

    Raises:
        ConfigError: a key is unknown, missing or of another type; names the key, the file and what to do.
    """
    node = _schema(kind)
    if file is not None:
        for name, value in _leaves(kind, read_yaml(file), source=str(file)):
            node = _put(node, name, value, kind, source=str(file))
    for name, text in overrides:
        node = _put(node, name, _parse(kind, name, text), kind, source=COMMAND_LINE)
    try:
        unset = OmegaConf.missing_keys(node)
        missing = [setting.name for setting in settings(kind) if setting.name in unset]
        if missing:
            place = f"set it in {file}" if file else "set it in a --config file"
            raise ConfigError(f"{missing[0]} is not set; give --{missing[0].replace('_', '-')} VALUE or {place}")
        return typing.cast(Config, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file or COMMAND_LINE}: {error.full_key}: {str(error).splitlines()[0]}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain values.

    Raises:
        ConfigError: the file is missing, not YAML, or says a key twice.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}; give a YAML recipe") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a YAML recipe: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold `key: value` lines")
    return typing.cast(dict[str, Any], values)


def to_yaml(config: Any) -> str:
    """A config with every value filled in; `load` reads it back to the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(dataclasses.asdict(config))))


def settings(kind: Any, prefix: str = "") -> list[Setting]:
    """Every setting of a configuration in the order of its text, sections unfolded."""
    found, hints = [], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += settings(hint, f"{name}.")
        else:
            found.append(Setting(name, hint, field.default, kind))
    return found


def type_words(hint: Any) -> str:
    """A field's type as a person says it."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {type_words(typing.get_args(hint)[0])}"
    return TYPE_WORDS.get(hint, str(hint))


def nearest(given: str, known: Sequence[str], *, what: str) -> str:
    """`did you mean X?`, or all that is known when nothing is near."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{what}: {', '.join(known) or 'none'}"


def _schema(kind: type) -> Any:
    """An empty node for every setting: required sections are unfolded, so that what is missing has a full name."""
    node = OmegaConf.structured(kind)
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            node = OmegaConf.merge(node, {name: _schema(typing.cast(type, hint))})
    return node


def _leaves(kind: Any, values: dict[Any, Any], *, source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in a nested mapping. Raises ConfigError on a key that `kind` has not."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        hint = _hint(kind, str(key), name, source)
        if not dataclasses.is_dataclass(hint):
            yield name, value
        elif isinstance(value, dict):
            yield from _leaves(hint, value, source=source, prefix=f"{name}.")
        elif value is not None:
            keys = ", ".join(field.name for field in dataclasses.fields(hint))
            raise ConfigError(f"{source}: {name} is {value!r}; it is a section with the keys {keys}")


def _hint(kind: Any, key: str, name: str, source: str) -> Any:
    hints = typing.get_type_hints(kind)
    if key in hints:
        return hints[key]
    section = name.removesuffix(key)
    near = difflib.get_close_matches(key, hints, n=1)
    deeper = [setting.name for setting in settings(kind, section) if setting.name.split(".")[-1] == key]
    if near or deeper:
        hint = f"did you mean {(section + near[0] if near else deeper[0])!r}?"
    else:
        hint = f"the keys {'of ' + section.rstrip('.') if section else 'here'} are {', '.join(hints) or 'none'}"
    raise ConfigError(f"{source}: unknown key {name!r}; {hint}")


def _parse(kind: Any, name: str, text: str) -> Any:
    """An override's value, read by its field's type."""
    hint, walked = kind, ""
    for part in name.split("."):
        if not dataclasses.is_dataclass(hint):
            raise ConfigError(f"{COMMAND_LINE}: unknown key {name!r}; {walked} is a value, not a section")
        walked = f"{walked}.{part}" if walked else part
        hint = _hint(hint, part, walked, COMMAND_LINE)
    if dataclasses.is_dataclass(hint):
        keys = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(hint))
        raise ConfigError(f"{COMMAND_LINE}: {name} is a section; set one of {keys}")
    if hint is str:
        return _literal(text)
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException):
        raise ConfigError(f"{COMMAND_LINE}: {name} is {text!r}; it must be {type_words(hint)}") from None


def _put(node: Any, name: str, value: Any, kind: Any, *, source: str) -> Any:
    """The node with one setting set. Raises ConfigError when the value has another type."""
    nested = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    try:
        return OmegaConf.merge(node, nested)
    except OmegaConfBaseException:
        hint = next(setting.kind for setting in settings(kind) if setting.name == name)
        said = "empty" if value is None else repr(value)
        raise ConfigError(f"{source}: {name} is {said}; it must be {type_words(hint)}") from None


def _literal(value: Any) -> Any:
    """Plain values in which OmegaConf finds nothing to interpolate."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


@functools.cache
def _field_texts(kind: type) -> dict[str, str]:
    """The string under each field, from the class's source: Python itself does not keep it."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    texts = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return texts
