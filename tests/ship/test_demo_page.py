"""The page of `mvar demo` in a real browser, served by the real command."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.small_models import small_model, small_tokenizer
from PIL import Image
from ship.browser import browsing, opened

from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, save

pytestmark = pytest.mark.ship
PATIENCE = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save(folder / "small", small_model(), small_tokenizer())
    sizes: dict[str, Any] = {"scales": [1, 2, 4, 8, 16], "vocab_size": 16, "code_dim": 4}
    tokenizer = MultiScaleTokenizer(**sizes, channels=8, norm_groups=4, num_res_blocks=1, channel_multipliers=[1])
    for name, channels in (("gray", 1), ("clear", 4)):
        few: dict[str, Any] = {"scales": [1, 2], "vocab_size": 16, "code_dim": 4}
        one = MultiScaleTokenizer(**few, channels=8, norm_groups=4, num_res_blocks=1, image_channels=channels)
        save(folder / name, NextScaleTransformer(**few, num_classes=2, depth=1, width=16, heads=2), one)
    save(folder / "slow", NextScaleTransformer(**sizes, num_classes=3, depth=8, width=256, heads=4), tokenizer)
    return folder


@pytest.fixture(scope="module")
def address(browser: Any, folder: Path) -> Iterator[str]:
    """Of the command, which is then told to end, and does."""
    words = [
        sys.executable,
        "-m",
        "mvar_lightning",
        "demo",
        "digits",
        "small=small",
        "slow=slow",
        "gray=gray",
        "clear=clear",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    log = (folder / "log").open("w+")
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("digits, small, slow, gray, clear: http://127.0.0.1:"), (folder / "log").read_text()
    yield re.findall(r"http://[\d.:]+", line)[0]
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    assert "Traceback" not in (folder / "log").read_text()
    assert {file.name for file in folder.iterdir()} == {"small", "slow", "gray", "clear", "log"}, (
        "the page writes nothing"
    )


def expect(page: Any, selector: str) -> Any:
    from playwright.sync_api import expect

    return expect(page.locator(selector))


def run(page: Any, said: str) -> None:
    page.click("#go")
    expect(page, "#status").to_contain_text(said, timeout=PATIENCE)
    expect(page, "#go").to_be_enabled(timeout=PATIENCE)


def test_the_first_picture_grows_at_once_and_can_be_saved(browser: Any, address: str, tmp_path: Path) -> None:
    page, wrong = opened(browser, address)
    expect(page, "#status").to_have_text("Ready.", timeout=PATIENCE)
    start = time.perf_counter()
    run(page, "4 made in")
    assert time.perf_counter() - start < float(os.environ.get("MVAR_FIRST_PICTURE", "3"))
    expect(page, "#sample .strip img").to_have_count(16)
    expect(page, "#sample .images img").to_have_count(4)
    scale, late = page.locator("#sample .images").get_attribute("data-shown").split(":")
    assert scale == "2" and float(late) < 0.15, "seconds from the drawing of a scale until it is shown"
    with page.expect_download() as saving:
        page.locator("#sample figcaption a").first.click()
    saving.value.save_as(tmp_path / "page.png")
    expect(page, "#sample figcaption >> nth=1").to_have_text("seed 0, image 2")
    words = page.locator("#sample [data-part=command]").inner_text().split()
    subprocess.run([sys.executable, "-m", "mvar_lightning", *words[1:], "--out", tmp_path / "out"], check=True)
    assert (tmp_path / "out" / saving.value.suggested_filename).read_bytes() == (tmp_path / "page.png").read_bytes()
    page.fill("[name=label]", "11")
    run(page, "class 11: the model knows classes 0 to 9")
    page.fill("[name=label]", "none")
    page.uncheck("[name=grow]")
    run(page, "4 made in")
    expect(page, "#sample .strip img").to_have_count(16)
    page.fill("[name=seed]", "77")  # what is typed is kept, asked for or not
    page.fill("[name=label]", "")
    page.reload()
    expect(page, "#status").to_have_text("Ready.", timeout=PATIENCE)
    expect(page, "[name=seed]").to_have_value("77")
    run(page, "4 made in")
    expect(page, "#sample [data-part=command]").to_contain_text("--classes none --count 4 --seed 77")
    assert not wrong


def test_a_class_that_the_model_lacks_is_not_left_in_the_form(browser: Any, address: str) -> None:
    page, wrong = opened(browser, address)
    expect(page, "#status").to_have_text("Ready.", timeout=PATIENCE)
    page.fill("[name=label]", "7")
    page.select_option("[name=model]", "gray")
    expect(page, "[name=label]").to_have_value("0")
    run(page, "4 made in")
    assert not wrong


@pytest.mark.parametrize(("name", "mode"), [("gray", "L"), ("clear", "RGBA")])
def test_models_of_other_channels_edit_what_they_get(
    browser: Any, address: str, tmp_path: Path, name: str, mode: str
) -> None:
    page, wrong = opened(browser, address)
    expect(page, "#status").to_have_text("Ready.", timeout=PATIENCE)
    page.select_option("[name=model]", name)
    page.fill("[name=count]", "1")
    run(page, "1 made in")
    page.click("#tab-edit")
    page.click("#edit-take")
    page.click("#half")
    run(page, "1 made in")
    Image.new("RGBA", (40, 30), (200, 40, 90, 3)).convert(mode).save(tmp_path / "picture.png")
    page.set_input_files("#edit-file", tmp_path / "picture.png")
    sending = {"data": (tmp_path / "picture.png").read_bytes(), "headers": {"Content-Type": "image/png"}}
    given = page.request.post(f"{address}/api/picture?model={name}", **sending).json()["image"]
    expect(page, "#status").to_contain_text("its middle at")
    page.click("#half")
    run(page, "1 made in")
    sent = page.locator("#save-picture").get_attribute("href").partition(",")[2]
    assert sent == given and Image.open(io.BytesIO(base64.b64decode(sent))).mode == mode
    assert not wrong


def test_a_job_waits_for_that_before_it_and_the_model_stays(browser: Any, address: str) -> None:
    page, wrong = opened(browser, address)
    expect(page, "#status").to_have_text("Ready.", timeout=PATIENCE)
    page.select_option("[name=model]", "slow")
    page.fill("[name=count]", "16")
    page.click("#go")
    expect(page, "#status").to_contain_text(re.compile("Scale [1-4] of 5"), timeout=PATIENCE)
    expect(page, "[name=model]").to_be_disabled()
    page.click("#tab-inside")  # asks for the mask, after the images
    assert page.locator("img.mask").get_attribute("src") is None
    page.click("#stop")  # of the images still
    expect(page, "img.mask").to_have_attribute("src", re.compile("^data:image/png"), timeout=PATIENCE)
    assert page.locator("#sample [data-part=command]").inner_text() == "", "was stopped before it ended"
    expect(page, "[name=model]").to_be_enabled(timeout=PATIENCE)
    expect(page, "#go").to_be_enabled()
    page.reload()
    expect(page, "img.mask").to_have_attribute("src", re.compile("^data:image/png"), timeout=PATIENCE)
    assert not wrong


def test_a_drawn_mask_is_painted_and_bad_uploads_are_told(browser: Any, address: str, tmp_path: Path) -> None:
    page, wrong = opened(browser, address)
    page.click("#tab-edit")
    run(page, "picture: upload one")
    picture = Image.new("RGB", (40, 30), "white")
    picture.save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (8000, 8000)).save(tmp_path / "bomb.png")
    page.set_input_files("#edit-file", tmp_path / "text.png")
    expect(page, "#status").to_contain_text("not a readable JPEG, PNG or WebP")
    page.set_input_files("#edit-file", tmp_path / "bomb.png")
    expect(page, "#status").to_contain_text("8000 x 8000 pixels; at most")
    page.set_input_files("#edit-file", tmp_path / "white.png")
    expect(page, "#status").to_contain_text("its middle at 16 x 16 pixels")
    run(page, "mask: paints no token")
    box = page.locator("#paint").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    for step in range(8):
        page.mouse.move(box["x"] + 20 + 10 * step, box["y"] + 20 + 35 * step, steps=3)
    page.mouse.up()
    page.fill("[name=label]", "7")
    run(page, "4 made in")
    expect(page, "#edit .images img").to_have_count(5)
    mask = page.locator("#save-mask").get_attribute("href")
    drawn = Image.open(io.BytesIO(base64.b64decode(mask.partition(",")[2]))).convert("L")
    assert drawn.size == (16, 16) and drawn.getpixel((1, 1)) > 200 and drawn.getpixel((15, 0)) == 0
    page.check("#outpaint")
    run(page, "4 made in")
    # the browser reports the refused uploads' status in its console; nothing else went wrong
    assert [line for line in wrong if "400 (Bad Request)" not in line] == []


def test_models_beside_each_other_and_those_that_do_not_fit(browser: Any, address: str) -> None:
    page, wrong = opened(browser, address)
    page.click("#tab-compare")
    expect(page, "#rivals select").to_have_count(2)
    run(page, "digits has scales 1 2 3 4, small 1 2 3")
    page.locator("#rivals select").nth(0).select_option("digits")
    page.locator("#rivals select").nth(1).select_option("int8")
    run(page, "Done.")
    expect(page, ".sides article").to_have_count(2)
    expect(page, ".sides article:nth-child(2) h2").to_have_text("digits, int8")
    expect(page, ".sides article:nth-child(1) table").to_contain_text("key-value cache per image245.8 kB")
    assert not wrong


def test_a_click_on_a_token_shows_where_it_looks(browser: Any, address: str, tmp_path: Path) -> None:
    page, wrong = opened(browser, address)
    page.click("#tab-inside")
    expect(page, "img.mask").to_have_attribute("src", re.compile("^data:image/png"), timeout=PATIENCE)
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "ring.png")
    page.set_input_files("#inside-file", tmp_path / "ring.png")
    expect(page, ".maps canvas").to_have_count(4, timeout=PATIENCE)
    expect(page, ".maps figcaption >> nth=3").to_contain_text("4 x 4, ")
    expect(page, "#go").to_be_enabled(timeout=PATIENCE)
    before = page.locator(".maps canvas").nth(0).screenshot()
    page.locator(".maps canvas").nth(3).click(position={"x": 60, "y": 60})
    expect(page, "#looked").to_contain_text("The token in row 2, column 2 of 4 x 4 looks at", timeout=PATIENCE)
    assert page.locator(".maps canvas").nth(0).screenshot() != before
    assert not wrong


def test_a_stop_and_a_second_visitor(browser: Any, address: str) -> None:
    (page, wrong), (other, also_wrong) = opened(browser, address), opened(browser, address)
    for each in (page, other):
        expect(each, "#status").to_have_text("Ready.", timeout=PATIENCE)
        each.select_option("[name=model]", "slow")
        each.fill("[name=label]", "2")
    page.fill("[name=count]", "16")
    other.fill("[name=count]", "1")
    drawing = re.compile("Scale [1-4] of 5")
    page.click("#go")
    expect(page, "#status").to_contain_text(drawing, timeout=PATIENCE)
    other.click("#go")
    expect(other, "#status").to_contain_text("Waiting: 1 before this one", timeout=PATIENCE)
    page.click("#stop")
    expect(page, "#status").to_have_text("Stopped.", timeout=PATIENCE)
    expect(other, "#status").to_contain_text("1 made in", timeout=PATIENCE)
    page.click("#go")
    expect(page, "#status").to_contain_text(drawing, timeout=PATIENCE)
    page.reload()  # in the middle: the job of a visitor who left holds nobody up
    expect(page, "#status").to_have_text("Ready.", timeout=PATIENCE)
    page.fill("[name=count]", "1")
    run(page, "1 made in")
    assert not wrong and not also_wrong


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_is_wider_than_the_window(browser: Any, address: str, width: int, scheme: str) -> None:
    page, wrong = opened(browser, address, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for tab in ("sample", "edit", "compare", "inside"):
        page.click(f"#tab-{tab}")
        expect(page, "#go").to_be_enabled(timeout=PATIENCE)
        if tab == "sample":
            run(page, "made in")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong
