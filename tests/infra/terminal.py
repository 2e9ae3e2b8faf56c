"""A command in a terminal of its own, and what stands on its screen: as much as rich's live display uses of one."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Callable

LIMIT_S = 60.0
ESCAPE = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])")


class Screen:
    """Cells with their colours; a second page for programs that want the whole screen.

    Raises:
        AssertionError: something is written that it does not know.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width
        self.whole_screen = False
        self.cursor_shown = True
        self._style = ""
        self._kept: list[list[tuple[str, str]]] = []
        self._clear()

    @property
    def lines(self) -> list[str]:
        return ["".join(character for character, _ in line).rstrip() for line in self._cells]

    def styled(self, style: str) -> list[str]:
        """What stands in each line in a style, such as "1;31"; lines without it are left out."""
        parts = ["".join(c for c, cell in line if cell == style).strip() for line in self._cells]
        return [part for part in parts if part]

    def write(self, text: str) -> None:
        place = 0
        while place < len(text):
            if text[place] == "\x1b":
                found = ESCAPE.match(text, place)
                assert found, text[place : place + 20]
                self._obey(found[1] + found[3], found[2])
                place = found.end()
                continue
            self._put(text[place])
            place += 1

    def _clear(self) -> None:
        self._cells = [[(" ", "")] * self.width for _ in range(self.height)]
        self._row = self._column = 0

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n" or self._column == self.width:
            self._row += 1
            self._column = 0 if character != "\n" else self._column
            if self._row == self.height:
                self._cells = [*self._cells[1:], [(" ", "")] * self.width]
                self._row -= 1
        if character not in "\r\n":
            assert character.isprintable(), repr(character)
            self._cells[self._row][self._column] = (character, self._style)
            self._column += 1

    def _obey(self, command: str, numbers: str) -> None:
        if command == "m":
            self._style = "" if numbers in ("", "0") else numbers
        elif command == "H":
            assert not numbers
            self._row = self._column = 0
        elif (command, numbers) == ("?h", "1049"):
            self.whole_screen, self._kept = True, self._cells
            self._clear()
        elif (command, numbers) == ("?l", "1049"):
            self.whole_screen = False
            self._clear()
            self._cells = self._kept
        elif numbers == "25":
            self.cursor_shown = command == "?h"
        else:
            raise AssertionError(f"unknown: {command} {numbers}")


class Terminal:
    """Runs a command in a new terminal; a context manager that kills it at the end."""

    def __init__(self, words: list[str], *, height: int = 30, width: int = 100) -> None:
        self.screen = Screen(height, width)
        self.pid, self._file = pty.fork()
        if not self.pid:
            # Not before rich has asked for it: the size must be there when the command starts.
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
            environment = {
                name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
            }
            os.execvpe(words[0], words, environment | {"TERM": "xterm-256color"})
        self._text = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._file)

    def until(self, shown: Callable[[Screen], bool]) -> Screen:
        """Read on until the screen is as wanted."""
        deadline = time.monotonic() + LIMIT_S
        while not shown(self.screen):
            assert time.monotonic() < deadline, "\n".join(self.screen.lines)
            assert self._read_on(), "ended:\n" + "\n".join(self.screen.lines)
        return self.screen

    def finish(self) -> int:
        """Wait for the command's end; its exit code."""
        while self._read_on():
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read_on(self) -> bool:
        """Whether the command still has the terminal. A sequence that has not come whole waits for its end."""
        if not select.select([self._file], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._file, 1 << 16)
        except OSError:
            data = b""
        self._text += data.decode(errors="replace")
        whole = len(self._text)
        last = self._text.rfind("\x1b")
        if data and last >= 0 and not ESCAPE.match(self._text, last):
            whole = last
        self.screen.write(self._text[:whole])
        self._text = self._text[whole:]
        return bool(data)
