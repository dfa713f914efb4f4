"""The data set emoji: Unicode's table, the split, and what is drawn. The font is matplotlib's where Debian's is not."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mvar_lightning.data.making import emoji as module
from mvar_lightning.data.making.embedded import load_source
from mvar_lightning.data.making.emoji import Emoji, read_table
from mvar_lightning.errors import UserError

TABLE = """# group: Smileys & Emotion
1F600 ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F ; fully-qualified # ☺️ E0.6 smiling face
263A ; unqualified          # ☺ E0.6 smiling face
# group: Component
1F3FB ; component           # 🏻 E1.0 light skin tone
# group: Symbols
2600 FE0F ; fully-qualified # ☀️ E0.6 sun
1F600 200D 1F600 ; fully-qualified # 😀‍😀 E1.0 two that are not joined
1FAE8 ; fully-qualified     # 🫨 E15.0 shaking face
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table and a font of outlines, which has no emoji of sequences and no new ones."""
    (tmp_path / module.TABLE).write_text(TABLE, encoding="utf-8")
    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    (tmp_path / module.FONT).symlink_to(font)
    monkeypatch.setattr(module, "PLACES", {module.FONT: tmp_path, module.TABLE: tmp_path})
    return tmp_path


def image_of(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def test_groups_are_classes_and_what_the_font_lacks_is_told(files: Path) -> None:
    source = load_source("emoji")
    assert source.class_names == ("Smileys & Emotion", "Symbols")
    names = {example.name: example.label for example in [*source.train, *source.val]}
    assert names == {"emoji grinning face": 0, "emoji smiling face": 0, "emoji sun": 1}
    assert source.notes == (f"2 emoji that {module.FONT} does not have are left out",)


def test_pictures_are_whole_and_differ(files: Path) -> None:
    source = load_source("emoji")
    pictures = [image_of(example.load()) for example in [*source.train, *source.val]]
    assert all(picture.shape == (module.SIDE, module.SIDE, 3) for picture in pictures)
    assert all(picture.min() < 60 and picture.mean() > 100 for picture in pictures), "black on white"
    assert not any((a == b).all() for a in pictures for b in pictures if a is not b)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("woman running: dark skin tone", "person running"),
        ("men with bunny ears", "people with bunny ears"),
        ("man: red hair", "woman"),
    ],
)
def test_variants_are_kin(one: str, other: str) -> None:
    assert Emoji("People & Body", "", one).kin == Emoji("People & Body", "", other).kin


def test_others_are_not() -> None:
    assert Emoji("Flags", "", "flag: Chad").kin != Emoji("Flags", "", "flag: Romania").kin
    assert Emoji("People & Body", "", "woman cook").kin != Emoji("People & Body", "", "woman pilot").kin


def test_a_table_as_unicode_writes_it(files: Path) -> None:
    found = list(read_table(files / module.TABLE))
    assert found[1] == Emoji("Smileys & Emotion", "\u263a\ufe0f", "smiling face") and len(found) == 5


def test_bad_files_are_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / module.TABLE).write_text("1F600 ; unqualified # no\n")
    with pytest.raises(UserError, match="has no line of a fully-qualified emoji"):
        load_source("emoji")
    (files / module.TABLE).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_source("emoji")
    (files / module.TABLE).write_text(TABLE, encoding="utf-8")
    (files / module.FONT).unlink()
    (files / module.FONT).write_bytes(b"no font")
    with pytest.raises(UserError, match="is no font of 109 pixels"):
        load_source("emoji")
    monkeypatch.setattr(module, "OWN_PLACE", tmp_path / "none")
    (files / module.FONT).unlink()
    with pytest.raises(UserError, match=r"data set emoji: NotoColorEmoji.ttf is not in .*apt-get install fonts-noto"):
        load_source("emoji")


def test_a_pillow_that_joins_nothing_is_told(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.features, "check", lambda name: False)
    with pytest.raises(UserError, match="has no Raqm"):
        load_source("emoji")


@pytest.mark.skipif(not module.PLACES[module.FONT].is_dir(), reason="needs apt-get install fonts-noto-color-emoji")
def test_the_font_as_packaged() -> None:
    path = module.PLACES[module.FONT] / module.FONT
    picture = image_of(module._png(path, "\U0001f44b\U0001f3fd"))
    assert picture.std(axis=2).max() > 20, "in color"
