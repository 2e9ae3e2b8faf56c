"""What a folder or URL is, whoever names it."""

from pathlib import Path

import pytest

from goku_mega.checkpoint.storage import open_folder
from goku_mega.data.shard_store import open_store
from goku_mega.errors import CheckpointError, DataError
from goku_mega.places import full_place, local_path


def test_a_place_has_a_name_that_holds_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert full_place("data") == full_place(f"file://{tmp_path}/data") == str(tmp_path / "data")
    assert full_place("s3://bucket/data") == "s3://bucket/data"


def test_a_path_is_local_whatever_its_name():
    assert local_path(Path("s3://bucket")) == Path("s3://bucket")
    assert local_path("data") == Path("data") and local_path("s3://bucket") is None


@pytest.mark.parametrize(("opened", "refusal"), [(open_store, DataError), (open_folder, CheckpointError)])
def test_an_unknown_kind_of_store_is_refused(opened, refusal):
    with pytest.raises(refusal, match="fsspec knows no store of the kind swarm://"):
        opened("swarm://bucket/data")
