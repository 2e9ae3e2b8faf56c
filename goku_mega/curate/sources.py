"""Which files are to be curated, and by what content they are known."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from goku_mega.curate.engine import Teller
from goku_mega.errors import DataError, MediaError
from goku_mega.media.decode import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".mts", ".3gp", ".ogv"}
)
CONTENT = "content"
BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class ContentScore:
    """A file's content, and what tells that it has not changed since."""

    content: str
    """Hash of all bytes: the source's key."""
    file_bytes: int
    modified_ns: int


def find_sources(videos: Path, part: tuple[int, int]) -> list[Path]:
    """The files of a folder and the folders in it, or of a list, in the order of their names.

    Args:
        part: (number, parts): every `parts`-th file from `number` on.

    Raises:
        DataError: there is no such folder or list, or it holds no video and no image.
    """
    if videos.is_dir():
        suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES
        found = (path for path in videos.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
        paths = sorted(path for path in found if not path.name.startswith("."))
    elif videos.is_file():
        lines = videos.read_text(encoding="utf-8").splitlines()
        paths = sorted({videos.parent / line.strip() for line in lines if line.strip()})
    else:
        raise DataError(f"{videos}: no such folder or list; give videos=FOLDER or a text file with a path a line")
    if not paths:
        raise DataError(f"{videos} holds no video and no image; known suffixes: {', '.join(sorted(VIDEO_SUFFIXES))}")
    return paths[part[0] :: part[1]]


def content_of(path: Path) -> ContentScore:
    """
    Raises:
        MediaError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        about = path.stat()
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    return ContentScore(digest.hexdigest(), about.st_size, about.st_mtime_ns)


def is_unchanged(path: Path, known: ContentScore) -> bool:
    """Whether a file looks as it did when its content was hashed."""
    try:
        about = path.stat()
    except OSError:
        return False
    return (about.st_size, about.st_mtime_ns) == (known.file_bytes, known.modified_ns)


def unhashed(paths: Iterable[Path], known: dict[str, ContentScore]) -> list[Path]:
    """The files whose content is not known, or has changed."""
    return [path for path in paths if str(path) not in known or not is_unchanged(path, known[str(path)])]


def make_hasher() -> Callable[[Path, Teller], None]:
    """A worker of the engine: paths to contents."""
    return _tell_content


def _tell_content(path: Path, teller: Teller) -> None:
    teller.begins(CONTENT)
    teller.found(CONTENT, str(path), asdict(content_of(path)), 0.0)
