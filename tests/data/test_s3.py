"""Shards, token caches and checkpoints in a bucket, of a real S3 server on this machine (moto's), by s3fs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mvar_lightning.data.check import check
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.errors import UserError
from mvar_lightning.tools import remote
from mvar_lightning.tools.copies import download
from mvar_lightning.tools.remote import NotThere, open_remote

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import boto3

    names = ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION")
    for name, value in zip(names, (server, "key", "secret", "us-east-1"), strict=True):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    boto3.client("s3").create_bucket(Bucket="mine")
    return "s3://mine"


def upload(folder: Path, key: str) -> None:
    import boto3

    client = boto3.client("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "mine", f"{key}/{path.relative_to(folder).as_posix()}")


def images(loader) -> torch.Tensor:
    return torch.cat([batch["image"] for batch in loader])


def test_shards_of_a_bucket_stream_as_a_folder_does(numbered_shards, bucket, tmp_path):
    folder = numbered_shards(train=20, val=9, samples_per_shard=5)
    upload(folder, "shards")
    here, there = (
        ShardsDataModule(str(path), 8, 4, num_workers=workers, resize_ratio=1.0)
        for path, workers in ((folder, 0), (f"{bucket}/shards", 1))
    )
    assert torch.equal(images(here.val_dataloader()), images(there.val_dataloader()))
    assert torch.equal(images(here.train_dataloader())[:4], images(there.train_dataloader())[:4])
    assert check(f"{bucket}/shards") == []
    target = tmp_path / "x.tar"
    download(f"{bucket}/shards/train/000000.tar", target, there.index.split("train").shards[0].sha256)
    with pytest.raises(NotThere, match=r"shard s3://mine/no/x\.tar: cannot be read \(.*\); check the address"):
        open_remote(f"{bucket}/no/x.tar", what="shard").read()
    for ask in (lambda: open_remote("s3://none/x").read(), lambda: download("s3://mine/none", target)):
        with pytest.raises(NotThere, match=r"^s3://\w+/\w+: cannot be read"):
            ask()


def test_ranges_of_a_bucket_are_read_on_from_anywhere(bucket, tmp_path):
    import boto3

    data = bytes(range(256)) * 4000
    boto3.client("s3").put_object(Bucket="mine", Key="x.bin", Body=data)
    with remote.RemoteFile(f"{bucket}/x.bin", len(data), start=1000, tail=data[1000 - remote.TAIL : 1000]) as file:
        assert file.readall() == data[1000:]


def test_without_credentials_it_is_one_line(bucket, monkeypatch):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"cannot be read \(.*credentials.*\)"):
        open_remote(f"{bucket}/x").read()
    S3FileSystem.clear_instance_cache()
