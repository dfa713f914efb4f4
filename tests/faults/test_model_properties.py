"""Whole kinds of input for checkpoints and stored moments: the right result, or one line."""

from __future__ import annotations

import io
import json
import shutil
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mvar_lightning.checkpoints import load, save
from mvar_lightning.checkpoints.folder import open_checkpoint
from mvar_lightning.errors import UserError
from mvar_lightning.metrics.moments import StoredReference
from tests.faults.small_models import lightning_content, small_model, small_tokenizer

SECONDS = 2.0

tries = settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30)]),
    st.floats(),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def pair() -> Any:
    return small_model(adjacent=True), small_tokenizer()


@pytest.fixture(scope="module")
def folder(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("properties") / "model"
    save(folder, *pair)
    return folder


def weights(*modules: nn.Module | None) -> list[torch.Tensor]:
    return [tensor for module in modules if module is not None for tensor in module.state_dict().values()]


def one_line(error: UserError) -> None:
    text = str(error)
    assert "\n" not in text and 0 < len(text) < 3000


def right_or_a_line(path: Path, pair: Any) -> bool:
    """Whether a checkpoint loads, with all weights as they were; refused in one line otherwise, soon either way."""
    start = time.monotonic()
    try:
        found = load(path)
    except UserError as error:
        one_line(error)
        return False
    finally:
        assert time.monotonic() - start < SECONDS
    pairs = zip(weights(*found), weights(*pair), strict=True)
    assert all(torch.equal(ours.nan_to_num(7), right.nan_to_num(7)) for ours, right in pairs)
    return True


@tries
@given(values)
def test_any_json_for_a_folders_record(pair: Any, folder: Path, value: Any) -> None:
    before = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(value))
    try:
        assert not right_or_a_line(folder, pair)
    finally:
        (folder / "config.json").write_text(before)


@st.composite
def places(draw: st.DrawFn, plain: Any) -> tuple[Any, ...]:
    """A path into nested dicts and lists."""
    path: list[Any] = []
    while isinstance(plain, (dict, list)) and plain and (not path or draw(st.booleans())):
        key = draw(st.sampled_from(sorted(plain))) if isinstance(plain, dict) else draw(st.integers(0, len(plain) - 1))
        path.append(key)
        plain = plain[key]
    return tuple(path)


@settings(tries, max_examples=90)
@given(st.data())
def test_any_value_for_any_entry_of_a_folders_record(pair: Any, folder: Path, data: st.DataObject) -> None:
    before = (folder / "config.json").read_text()
    config = json.loads(before)
    path = data.draw(places(config))
    inside = config
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = data.draw(values)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        right_or_a_line(folder, pair)
    finally:
        (folder / "config.json").write_text(before)


damage = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("zeros"), st.floats(0, 1, exclude_max=True), st.integers(1, 600)),
)


def damaged(content: bytes, how: tuple[str, float, int]) -> bytes:
    kind, share, much = how
    place = int(share * len(content))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ much]) + content[place + 1 :]
    return content[:place] + bytes(min(much, len(content) - place)) + content[place + much :]


@settings(tries, max_examples=90)
@given(st.sampled_from(["config.json", "model.safetensors", "tokenizer.safetensors"]), damage)
def test_damage_to_a_folders_files(pair: Any, folder: Path, name: str, how: tuple[str, float, int]) -> None:
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(before, how))
    try:
        right_or_a_line(folder, pair)
    finally:
        (folder / name).write_bytes(before)


@settings(tries, max_examples=60)
@given(damage, st.booleans())
def test_damage_to_a_lightning_checkpoint(
    pair: Any, tmp_path_factory: pytest.TempPathFactory, how: tuple[str, float, int], near_an_end: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    stream = io.BytesIO()
    torch.save(lightning_content(*pair), stream)
    content = stream.getvalue()
    if near_an_end:  # what describes the tensors is there
        how = how[0], min(1 - (1 - how[1]) / 10, 0.999999), how[2]
    path.write_bytes(damaged(content, how))
    if not right_or_a_line(path, pair):
        try:
            open_checkpoint(path)
        except UserError as error:
            one_line(error)


KINDS = ["<f2", "<f4", ">f4", "<f8", ">f8", "longdouble", "<i4", ">i8", "u1", "?", "c16", "U3", "M8[s]", "O", "V4"]


@st.composite
def arrays(draw: st.DrawFn, right: np.ndarray) -> tuple[np.ndarray, bool]:
    """An array for ``right``, and whether it says the same."""
    kind = draw(st.sampled_from(KINDS))
    order = draw(st.sampled_from(["C", "F", "strided"]))
    shape = draw(st.sampled_from([right.shape, right.shape, right.shape, (), (0,), (3, 1), (1, 3, 3)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            array = np.resize(right, shape).astype(kind)
        except (ValueError, TypeError):
            array = np.zeros(shape, kind)
    if order == "strided" and array.ndim:
        array = np.repeat(array, 2, axis=0)[::2]
    elif order == "F":
        array = np.asfortranarray(array) if array.ndim else array
    same = shape == right.shape and array.dtype.kind in "fiu" and bool((array.astype("f8") == right).all())
    return array, same


MEAN, COVARIANCE = np.array([1.0, 2.0, 3.0]), np.diag([2.0, 1.0, 1.0])


@settings(tries, max_examples=90)
@given(arrays(MEAN), arrays(COVARIANCE), values, st.booleans(), st.none() | damage)
def test_any_layout_of_stored_moments(
    tmp_path_factory: pytest.TempPathFactory, mean: Any, covariance: Any, images: Any, packed: bool, how: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "moments.npz"
    write = np.savez_compressed if packed else np.savez
    also = {"images": np.asarray(images, dtype=object)} if isinstance(images, (dict, list)) else {"images": images}
    write(path, mu=mean[0], sigma=covariance[0], **(also if images is not None else {}))
    if how is not None:
        path.write_bytes(damaged(path.read_bytes(), how))
    try:
        found = StoredReference.load(path)
    except UserError as error:
        one_line(error)
        return
    if how is None and mean[1] and covariance[1]:
        assert np.array_equal(found.features.mean_F.numpy(), MEAN)
        assert np.array_equal(found.features.covariance_FF.numpy(), COVARIANCE)


@pytest.mark.parametrize("shape", ["(10**12,)", "(-1,)", "(2,)"])
def test_a_header_that_tells_another_size(shape: str, tmp_path: Path) -> None:
    import zipfile

    np.savez(tmp_path / "a.npz", mu=MEAN, sigma=COVARIANCE)
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {eval(shape)}, }}".encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + MEAN.tobytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, zipfile.ZipFile(tmp_path / "b.npz", "w") as changed:
        changed.writestr("mu.npy", content)
        changed.writestr("sigma.npy", archive.read("sigma.npy"))
    with pytest.raises(UserError, match=r"b\.npz: not a readable npz"):
        StoredReference.load(tmp_path / "b.npz")
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    assert StoredReference.load(tmp_path / "b.npz").features.num_features == 3
