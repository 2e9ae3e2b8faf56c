"""Which files are to be curated, and by what content they are known."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from goku_mega.curate.engine import Teller
from goku_mega.data.whole_files import xxh3_of
from goku_mega.errors import DataError, MediaError
from goku_mega.media.decode import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".mts", ".3gp", ".ogv"}
)
SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
CONTENT = "content"


@dataclass(frozen=True)
class ContentScore:
    """A file's content, and what tells that it has not changed since."""

    content: str
    """Hash of all bytes: the source's key."""
    file_bytes: int
    modified_ns: int


def find_sources(videos: Path, part: tuple[int, int]) -> list[str]:
    """The files of a folder and the folders in it, or of a list, in the order of their names.

    Args:
        part: (number, parts): every `parts`-th file from `number` on.

    Raises:
        DataError: there is no such folder or list, or it holds no video and no image.
    """
    if videos.is_dir():
        paths = sorted(_files_below(str(videos)))
    elif videos.is_file():
        lines = map(str.strip, videos.read_text(encoding="utf-8").splitlines())
        folder = str(videos.parent)
        paths = sorted({os.path.join(folder, line) for line in lines if line})
    else:
        raise DataError(f"{videos}: no such folder or list; give videos=FOLDER or a text file with a path a line")
    if not paths:
        raise DataError(f"{videos} holds no video and no image; known suffixes: {', '.join(sorted(VIDEO_SUFFIXES))}")
    return paths[part[0] :: part[1]]


def _files_below(folder: str) -> Iterator[str]:
    """Strings all the way: ten million paths as objects take minutes."""
    for place, folders, names in os.walk(folder):
        folders[:] = (name for name in folders if not name.startswith("."))
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield os.path.join(place, name)


def content_of(path: str) -> ContentScore:
    """
    Raises:
        MediaError: the file cannot be read.
    """
    try:
        about = os.stat(path)
        return ContentScore(xxh3_of(path), about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error


def is_unchanged(path: str, known: ContentScore) -> bool:
    """Whether a file looks as it did when its content was hashed."""
    try:
        about = os.stat(path)
    except OSError:
        return False
    return (about.st_size, about.st_mtime_ns) == (known.file_bytes, known.modified_ns)


def unhashed(paths: Iterable[str], known: Mapping[str, ContentScore]) -> list[str]:
    """The files whose content is not known, or has changed."""
    return [path for path in paths if path not in known or not is_unchanged(path, known[path])]


def make_hasher() -> Callable[[str, Teller], None]:
    """A worker of the engine: paths to contents."""
    return _tell_content


def _tell_content(path: str, teller: Teller) -> None:
    teller.begins(CONTENT)
    teller.found(CONTENT, path, asdict(content_of(path)), 0.0)
