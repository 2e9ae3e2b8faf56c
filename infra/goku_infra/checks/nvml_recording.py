"""NVML's answers in a file: recorded on a machine with GPUs, replayed on one without.

A recording is one JSON object: `source` says where the answers are from, `calls` lists each call's name, arguments and
answer (or the number of its error). A handle is kept as {"handle": n}, a structure with the name of its type.
"""

import ctypes
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goku_infra.errors import OpsError


class Recorder:
    """Stands for the library and keeps every call and its answer."""

    def __init__(self, nvml: Any, source: str) -> None:
        self._nvml = nvml
        self._source = source
        self._calls: list[dict[str, Any]] = []
        self._handles: dict[int, int] = {}

    def write(self, path: Path) -> None:
        lines = ",\n".join(json.dumps(call) for call in self._calls)
        path.write_text(f'{{"source": {json.dumps(self._source)}, "calls": [\n{lines}\n]}}\n')

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._nvml, name)
        return self._recorded(name, value) if name.startswith("nvml") and inspect.isfunction(value) else value

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            entry: dict[str, Any] = {"call": name, "arguments": [self._encode(argument) for argument in arguments]}
            self._calls.append(entry)
            try:
                answer = function(*arguments)
            except self._nvml.NVMLError as error:
                entry["error"] = error.value
                raise
            entry["answer"] = self._encode(answer)
            return answer

        call.__name__ = name
        return call

    def _encode(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple | ctypes.Array):
            return [self._encode(item) for item in value]
        if isinstance(value, ctypes._Pointer):
            address = ctypes.cast(value, ctypes.c_void_p).value or 0
            return {"handle": self._handles.setdefault(address, len(self._handles))}
        if isinstance(value, self._nvml.c_nvmlFieldValue_t):
            return {"field": value.fieldId, "error": value.nvmlReturn, "value": value.value.uiVal}
        names = [field[0] for field in getattr(value, "_fields_", ())] or list(vars(value))
        fields = {name: self._encode(getattr(value, name)) for name in names}
        return {"struct": type(value).__name__, "fields": fields}


class Replay:
    """Answers as the library did when the file was recorded.

    Types, constants and signatures are those of the installed library: a call that it does not have, or with other
    arguments than it takes, fails here, too. The same call gets its recorded answers in turn, the last one for ever.

    Raises:
        OpsError: the file cannot be read, or nvidia-ml-py is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            recording = json.loads(path.read_text())
            calls = recording["calls"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OpsError(f"{path} is no recording of NVML: {error}") from None
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError:
            raise OpsError("a replay needs the library's types; pip install nvidia-ml-py") from None
        self._answers: dict[str, list[dict[str, Any]]] = {}
        for call in calls:
            self._answers.setdefault(_key(call["call"], call["arguments"]), []).append(call)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._nvml, name)
        return self._replayed(name, value) if name.startswith("nvml") and inspect.isfunction(value) else value

    def _replayed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            inspect.signature(function).bind(*arguments)
            answers = self._answers.get(_key(name, [_plain(argument) for argument in arguments]))
            if answers is None:
                raise self._nvml.NVMLError(self._nvml.NVML_ERROR_NOT_SUPPORTED)
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if "error" in answer:
                raise self._nvml.NVMLError(answer["error"])
            return self._decode(answer["answer"])

        call.__name__ = name
        return call

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "handle" in value:
            return _Handle(value["handle"])
        if "field" in value:
            field = self._nvml.c_nvmlFieldValue_t()
            field.fieldId, field.nvmlReturn, field.value.uiVal = value["field"], value["error"], value["value"]
            return field
        fields = {name: self._decode(item) for name, item in value["fields"].items()}
        kind = getattr(self._nvml, value["struct"])
        if kind is self._nvml.nvmlFriendlyObject:
            return kind(fields)
        struct = kind()
        for name, item in fields.items():
            if name not in {field[0] for field in kind._fields_}:
                raise AttributeError(f"{value['struct']} has no field {name}")
            if not isinstance(item, _Handle):
                setattr(struct, name, item)
        return struct


class _Handle:
    """Stands for a pointer of the library."""

    def __init__(self, number: int) -> None:
        self.number = number


def _plain(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_plain(item) for item in argument]
    return {"handle": argument.number} if isinstance(argument, _Handle) else argument


def _key(name: str, arguments: list[Any]) -> str:
    return json.dumps([name, arguments])
