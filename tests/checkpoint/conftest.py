"""A real S3 server on loopback for the tests that want one."""

from collections.abc import Iterator

import pytest
from s3_server import Front, faulty_front, s3_server, s3_settings


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Its address."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def shared_front(server: str) -> Iterator[Front]:
    """S3 behind a front that can fail, and a driver that leaves repeating to us."""
    with faulty_front(server) as front, s3_settings(front.endpoint, AWS_MAX_ATTEMPTS="1"):
        yield front
