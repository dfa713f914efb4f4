"""Rows of checkpoints and models: places that cannot be written or read, and use as a library."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvar_lightning.attention import SpatialAttention, backends, choose_backend
from mvar_lightning.checkpoints import export_official, load, save
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.sampling import generate
from mvar_lightning.tools import files
from tests.faults.harness import ask, broken_promise, refused
from tests.faults.small_models import published_pair, small_model, small_tokenizer

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# places that cannot be written or read


@pytest.mark.parametrize("files_", [("m.pth", "t.pth"), ("m.safetensors", "t.safetensors")])
def test_a_disk_that_is_full(files_: tuple[str, str], tmp_path: Path) -> None:
    save(tmp_path / "model", *published_pair())
    answer = ask("export", "model", "--model", files_[0], "--tokenizer", files_[1], cwd=tmp_path, file_mb=0.01)
    refused(answer, files_[0], "File too large")
    assert names(tmp_path) == ["model"]
    export_official(*published_pair(), tmp_path / "m.pth", tmp_path / "t.pth")
    command = ("import", "--architecture", "var", "--model", "m.pth", "--tokenizer", "t.pth", "--patch-nums", "1,2,3")
    answer = ask(*command, "--out", "again", cwd=tmp_path, file_mb=0.01)
    refused(answer, "again", "File too large")
    assert names(tmp_path) == ["m.pth", "model", "t.pth"]


@as_root
def test_a_place_that_is_anothers(pair: Any, folder: Path) -> None:
    save(folder.parent / "published", *published_pair())
    export = ("export", "published", "--model", "m.pth", "--tokenizer", "t.pth")
    refused(ask(*export, cwd=folder.parent, uid=NOBODY), "m.pth", "Permission denied")
    code = (
        "from mvar_lightning import save\nfrom tests.faults.small_models import *\nsave('new', None, small_tokenizer())"
    )
    answer = ask(code=code, cwd=folder.parent, uid=NOBODY)
    assert answer.err.strip().splitlines()[-1].startswith("mvar_lightning.errors.UserError: new: cannot be written")


@as_root
@pytest.mark.parametrize("hidden", ["model", "model/config.json", "model/model.safetensors"])
def test_what_may_not_be_read(hidden: str, folder: Path) -> None:
    (folder.parent / hidden).chmod(0)
    for command in (("info", folder), ("sample", "--checkpoint", folder, "--count", 1, "--out", "/nowhere")):
        refused(ask(*command, cwd=folder.parent, uid=NOBODY), "Permission denied", str(folder.name))


@as_root
def test_the_lock_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / ".lock").write_text("process 1")
    (tmp_path / ".lock").chmod(0o644)
    code = "from pathlib import Path\nfrom mvar_lightning.tools.files import Lock\nLock(Path('.lock'), 'busy').take()"
    answer = ask(code=code, cwd=tmp_path, uid=NOBODY)
    assert "UserError" in answer.err and "Permission denied" in answer.err


def test_a_name_that_is_too_long_or_none(pair: Any, tmp_path: Path) -> None:
    for name in ("x" * 300, "x" * 5000, "a\0b"):
        for use in (load, lambda path: save(path, *pair), lambda path: files.existing_file(path)):
            with pytest.raises(UserError) as told:
                use(tmp_path / name)
            assert len(str(told.value)) < 3000
    longest = "x" * 240  # allowed, though nothing in front of it would be
    save(tmp_path / longest, *pair)
    assert names(tmp_path) == [longest]


def test_threads_that_write_one_file(tmp_path: Path) -> None:
    faults: list[Exception] = []

    def work(number: int) -> None:
        try:
            for _ in range(50):
                files.write(tmp_path / "a", f"{number}" * 5000)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(set((tmp_path / "a").read_text())) == 1 and names(tmp_path) == ["a"]


# library use


def test_a_bare_seed_and_numbers_of_other_libraries(pair: Any) -> None:
    right = generate(*pair, 1, seeds=[5])
    for label, seeds in ((1, 5), (np.int64(1), np.int64(5)), (torch.tensor(1), torch.tensor(5)), ([np.int64(1)], [5])):
        assert torch.equal(generate(*pair, label, seeds=seeds).images, right.images)
    with pytest.raises(UserError, match="give one for each of the 2 images"):
        generate(*pair, [0, 1], seeds=5)
    for label in (1.0, "cat", None, [[1]]):
        with pytest.raises(UserError, match="label"):
            generate(*pair, label)
    for seeds in ("a", 1.5, [None], {1: 2}):
        with pytest.raises(UserError, match="seed"):
            generate(*pair, 1, seeds=seeds)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_modules_in_half_precision(kind: torch.dtype, pair: Any) -> None:
    model, tokenizer = small_model(), small_tokenizer().to(kind)
    images = generate(model, tokenizer, [0, 1], seeds=[1, 2]).images
    assert images.dtype == torch.float32 and images.shape == (2, 3, 6, 6)
    assert (images - generate(*pair, [0, 1], seeds=[1, 2]).images).abs().mean() < 0.1
    assert generate(model.to(kind), tokenizer, [0, 1], seeds=[1, 2]).images.isfinite().all()


@pytest.mark.parametrize(("strategy", "head_dim"), [(SpatialAttention(1), 16), (SpatialAttention(3), 12)])
def test_what_nattens_kernels_do_not_take(
    strategy: SpatialAttention, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "natten_has_kernels", lambda: True)
    pyramid = ScalePyramid([1, 2, 4])
    assert choose_backend("auto", strategy, pyramid, head_dim).name == "per_scale"
    if backends.importlib.util.find_spec("natten") is not None:
        assert choose_backend("auto", SpatialAttention(3), pyramid, 16).name == "natten"
        with pytest.raises(UserError, match=r"neighborhoods of more than 1.*use per_scale or auto"):
            choose_backend("natten", strategy, pyramid, head_dim)


def test_edit_says_what_it_cuts_and_shrinks(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (96, 64), (200, 30, 30)).save(folder.parent / "wide.png")
    command = ("edit", "--checkpoint", folder, "--image", "wide.png", "--box", "0,0,1,1", "--count", 1)
    answer = ask(*command, cwd=folder.parent)
    assert answer.status == 0 and broken_promise(answer) is None
    assert "wide.png: 96 x 64 pixels; its middle square of 64 is used, at 6 x 6" in answer.out + answer.err
