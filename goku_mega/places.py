"""Where files are: a folder of a mounted file system, or under a URL that one of fsspec's drivers reads."""

from pathlib import Path

from goku_mega.errors import UserError


def local_path(place: str | Path) -> Path | None:
    """The path of a local place; None of any other."""
    protocol, separator, rest = str(place).partition("://")
    if isinstance(place, Path) or not separator:
        return Path(place)
    return Path(rest) if protocol in ("file", "local") else None


def full_place(place: str | Path) -> str:
    """The place by a name that holds in any working directory."""
    local = local_path(place)
    return str(place) if local is None else str(local.resolve())


def check_driver(url: str, refusal: type[UserError]) -> None:
    """
    Raises:
        UserError: fsspec knows no store of this kind, or its driver is not installed; of the class `refusal`.
    """
    from fsspec.registry import get_filesystem_class, known_implementations

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ValueError:
        raise refusal(f"{url}: fsspec knows no store of the kind {protocol}://") from None
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        install = str(error) if package == "fsspec" else f"pip install {package}"
        raise refusal(f"{url}: the driver of {protocol}:// is not installed; {install}") from None
