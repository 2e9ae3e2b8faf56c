"""What the writers of a job say to each other over TCP: a JSON object, and bytes that go with it."""

import asyncio
import json
import socket
import struct
from typing import Any

Message = dict[str, Any]

_LENGTHS = struct.Struct("!IQ")
PIECE_BYTES = 4 * 2**20


def connect(address: tuple[str, int]) -> socket.socket:
    """A connection whose other end may think for long, but whose silence of a minute means that its host is gone.

    Raises:
        OSError: nobody is there.
    """
    connection = socket.create_connection(address, timeout=30)
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def ask(address: tuple[str, int], message: Message, content: bytes | memoryview = b"") -> Message:
    """Send a message, and the answer to it.

    Raises:
        OSError: nobody is there, or the connection broke.
    """
    with connect(address) as connection:
        send(connection, message, content)
        return receive(connection)


def send(connection: socket.socket, message: Message, content: bytes | memoryview = b"") -> None:
    """Send a message with `content`, which is not copied."""
    header = json.dumps(message).encode()
    connection.sendall(_LENGTHS.pack(len(header), len(content)) + header)
    connection.sendall(content)


def receive(connection: socket.socket) -> Message:
    """An answer, which has no content.

    Raises:
        ConnectionResetError: the other end closed before that.
    """
    with connection.makefile("rb") as stream:
        start = stream.read(_LENGTHS.size)
        if len(start) == _LENGTHS.size:
            length, _ = _LENGTHS.unpack(start)
            header = stream.read(length)
            if len(header) == length:
                return json.loads(header)
    raise ConnectionResetError("the writer at the other end is gone")


async def read(reader: asyncio.StreamReader) -> tuple[Message, int]:
    """A message, and the bytes of content that follow it."""
    length, content = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    return json.loads(await reader.readexactly(length)), content


async def answer(writer: asyncio.StreamWriter, message: Message) -> None:
    """Answer without content."""
    header = json.dumps(message).encode()
    writer.write(_LENGTHS.pack(len(header), 0) + header)
    await writer.drain()
