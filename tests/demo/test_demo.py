"""The page's server without a browser: the same bytes as `mvar sample`, a stop, and requests that mean harm."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image

from mvar_lightning import UserError
from mvar_lightning.cli import main
from mvar_lightning.demo import app, serve
from mvar_lightning.demo import asked as asked_module
from mvar_lightning.demo.app import HEADERS, LONGEST, SMALL, build_app
from mvar_lightning.demo.asked import (
    MOST_VALUES,
    UPLOAD_BYTES,
    UPLOAD_PIXELS,
    Edited,
    Sampled,
    command_of,
    decode_picture,
    parse,
    python_of,
)
from mvar_lightning.demo.shelf import Shelf
from mvar_lightning.demo.turns import Stopped, Turns
from mvar_lightning.evaluation.papers.attention_mass import attention_from

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf({"digits": "digits"}, "cpu")


@pytest.fixture(scope="module")
def port(shelf: Shelf) -> Iterator[int]:
    listening = serve._listen(0)
    server = uvicorn.Server(uvicorn.Config(build_app(shelf), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def post(port: int, path: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, Events]:
    """Status, and the events of the answer's lines."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, content, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    text = answer.read()
    lines = [line for line in text.splitlines() if line.startswith(b"{")]
    return answer.status, [json.loads(line) for line in lines]


def asked(**changes: Any) -> dict[str, Any]:
    return {"job": "a job of a test", "model": "digits", "label": "7", "count": 3, "seed": 5, **changes}


def png(size: tuple[int, int] = (16, 16), color: int = 255, left: int | None = None) -> str:
    picture = Image.new("RGB", size)
    picture.paste((color,) * 3, (0, 0, size[0] if left is None else left, size[1]))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("grow", [True, False])
def test_images_are_those_of_the_command_and_of_python(port: int, shelf: Shelf, grow: bool, tmp_path: Path) -> None:
    content = asked(grow=grow, cfg=2.0, guidance="constant", guided_scales=[1, 2], top_k=50, top_p=0.9)
    _, events = post(port, "/api/sample", content)
    (made,) = [event for event in events if event["event"] == "made"]
    assert [event["event"] for event in events][-1] == "done"
    grown = [event["scale"] for event in events if event["event"] == "grown"]
    assert grown == [0, 1, 2], "the last scale is decoded once, as the result"
    after = [event for event in events[events.index(made) :] if event["event"] == "grown"]
    assert len(after) == (0 if grow else 3), "the finished images do not wait for a strip"
    words = made["command"].split()
    assert words[:2] == ["mvar", "sample"]
    assert main([*words[1:], "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    for file, image in zip(made["files"], made["images"], strict=True):
        assert (tmp_path / "out" / file).read_bytes() == base64.b64decode(image)
    names: dict[str, Any] = {}
    exec(made["python"], names)
    pixels = [torch.frombuffer(bytearray(Image.open(io.BytesIO(base64.b64decode(each))).tobytes()), dtype=torch.uint8)
              for each in made["images"]]  # fmt: skip
    images = names["images"].mul(255).round().byte().permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(images, torch.stack(pixels))


def test_an_edit_is_that_of_the_command(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image, mask = png(color=200, left=9), png(left=8)
    _, events = post(port, "/api/edit", asked(image=image, mask=mask, count=2))
    (made,) = [event for event in events if event["event"] == "made"]
    Path("picture.png").write_bytes(base64.b64decode(image))
    Path("mask.png").write_bytes(base64.b64decode(mask))
    assert main([*made["command"].split()[1:], "--device", "cpu"]) == 0
    for file, result in zip(made["files"], made["images"], strict=True):
        assert Path("edits", file).read_bytes() == base64.b64decode(result)
    names: dict[str, Any] = {}
    exec(made["python"], names)
    assert names["images"].shape == (2, 3, 16, 16)


def test_models_side_by_side(port: int) -> None:
    _, events = post(port, "/api/compare", asked(others=["digits"], precisions=["int8"]))
    plain, quantized = (event for event in events if event["event"] == "compared")
    assert plain["weight_bytes"] > 3 * quantized["weight_bytes"] and plain["seconds"] > 0
    assert plain["cache_bytes"] == 2 * 122_880 and plain["peak_bytes"] > 0, "both halves; README's bytes for one"
    _, events = post(port, "/api/compare", asked(others=["none"], precisions=[""]))
    assert "'none': is not here" in events[-1]["message"]


def test_models_that_do_not_fit_are_told(tmp_path: Path) -> None:
    from faults.small_models import small_model, small_tokenizer

    from mvar_lightning import save
    from mvar_lightning.demo.answers import answer_compared
    from mvar_lightning.demo.asked import Compared

    save(tmp_path / "small", small_model(), small_tokenizer())
    shelf = Shelf({"digits": "digits", "small": str(tmp_path / "small")}, "cpu")
    drawn: Events = []
    with pytest.raises(UserError, match="digits has scales 1 2 3 4, small 1 2 3; take models that agree"):
        answer_compared(shelf, Compared("digits", others=["small"], precisions=[""]), drawn.append)
    assert not any(drawn), "before anything is drawn"
    save(tmp_path / "tokenizer", None, small_tokenizer())
    with pytest.raises(UserError, match="holds a tokenizer alone"):
        Shelf({"it": str(tmp_path / "tokenizer")}, "cpu")


def test_looking_inside(port: int) -> None:
    _, events = post(port, "/api/tokens", asked_only(image=png(left=8)))
    grown, tokens = [event for event in events if event["event"] == "grown"], events[-2]["tokens"]
    assert [event["scale"] for event in grown] == [0, 1, 2, 3] and len(tokens) == 30
    assert grown[3]["psnr"] > grown[0]["psnr"]
    _, events = post(port, "/api/attention", asked_only(tokens=tokens, query=14, label="7"))
    blocks = torch.tensor(events[-2]["blocks"])
    assert blocks.shape == (4, 30)
    torch.testing.assert_close(blocks.sum(dim=1), torch.ones(4), atol=1e-3, rtol=0)
    _, events = post(port, "/api/attention", asked_only(tokens=tokens, query=30))
    assert "token 30: the pyramid has 0 to 29" in events[-1]["message"]
    _, events = post(port, "/api/mask", asked_only())
    assert Image.open(io.BytesIO(base64.b64decode(events[-2]["image"]))).width > 500


def asked_only(**content: Any) -> dict[str, Any]:
    return {"job": "a job of a test", "model": "digits", **content}


def test_a_token_looks_where_the_mask_lets_it() -> None:
    from faults.small_models import small_model, small_tokenizer

    model, tokenizer = small_model(adjacent=True), small_tokenizer()
    idx_1L = tokenizer.encode(torch.rand(1, 3, 6, 6) * 2 - 1)
    for query in (0, 4, 13):
        share_NL = attention_from(model, tokenizer, idx_1L, 0, query)
        assert torch.equal(share_NL[0] > 0, model.mask()[query])
        assert share_NL.sum() == pytest.approx(1)


def test_a_stop_stops_and_another_visitor_goes_on(port: int, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = shelf.get("digits").tokenizer
    decode, seen = type(tokenizer).decode_latent, threading.Event()

    def slowly(self: Any, f_hat: torch.Tensor) -> torch.Tensor:
        seen.set()
        time.sleep(0.4)
        return decode(self, f_hat)

    monkeypatch.setattr(type(tokenizer), "decode_latent", slowly)
    found: dict[str, Events] = {}
    names = ("first of two", "second of two")
    visitors = [threading.Thread(target=lambda n=n: found.update({n: post(port, "/api/sample", asked(job=n))[1]}))
                for n in names]  # fmt: skip
    visitors[0].start()
    assert seen.wait(20)
    visitors[1].start()
    time.sleep(0.2)
    assert post(port, "/api/stop", {"job": names[0]})[1] == [{"stopped": True}]
    for visitor in visitors:
        visitor.join(60)
    first, second = (found[name] for name in names)
    assert first[-1]["event"] == "stopped" and not any(event["event"] == "made" for event in first)
    assert second[0] == {"event": "waiting", "ahead": 1} and second[-1]["event"] == "done"
    assert post(port, "/api/stop", {"job": names[0]})[1] == [{"stopped": False}]


def test_a_stop_is_heard_while_a_model_is_read_and_between_decodings(shelf: Shelf) -> None:
    from mvar_lightning.demo import answers
    from mvar_lightning.demo.asked import Compared, Tokens

    def stopping(after: int) -> tuple[list[str], Any]:
        heard: list[str] = []

        def tell(event: dict[str, Any]) -> None:
            heard.append(event.get("event", "look"))
            if len(heard) > after:
                raise Stopped

        return heard, tell

    for asked_for, answered, looks in (
        (Sampled("digits"), answers.answer_sampled, 2),
        (Compared("digits", others=["digits"], precisions=["32"]), answers.answer_compared, 4),
        (Tokens("digits", image=png()), answers.answer_tokens, 2 + 4),
    ):
        for after in range(looks):
            heard, tell = stopping(after)
            with pytest.raises(Stopped):
                answered(shelf, asked_for, tell)  # type: ignore[operator]
            assert heard == ["look"] * (after + 1)


def test_the_job_of_a_visitor_who_left_is_before_others_until_its_thread_is_free() -> None:
    async def visits() -> list[Any]:
        turns, goes_on, began = Turns(), threading.Event(), threading.Event()

        def work(tell: Any) -> None:
            began.set()
            assert goes_on.wait(20)

        leaving = turns.run("one who leaves", work)
        assert (await anext(leaving))["event"] == "begun" and began.wait(20)
        await leaving.aclose()
        found = []
        async for event in turns.run("another one", lambda tell: None):
            found.append(event)
            goes_on.set()
        turns.close()
        return [*found, [*turns._turns]]

    events = asyncio.run(visits())
    assert events[0] == {"event": "waiting", "ahead": 1}
    assert [event["event"] for event in events[1:-1]] == ["begun", "done"] and events[-1] == []


def test_compared_models_are_warm_and_agree_before_any_draws(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvar_lightning.demo import answers
    from mvar_lightning.demo.asked import Compared

    counts: list[int] = []
    draw = answers._generate
    monkeypatch.setattr(answers, "_generate", lambda *a: (counts.append(len(a[2])), draw(*a))[1])
    asked_for = Compared("digits", others=["digits"], precisions=["bf16"], count=2, label="3")
    fresh = Shelf(shelf.paths, "cpu")
    fresh.get("digits")
    events: Events = []
    answers.answer_compared(fresh, asked_for, events.append)
    compared = [event for event in events if event.get("event") == "compared"]
    assert counts == [2, 1, 2], "the second was read for this, and draws one image that is not timed"
    assert all(0 < event["begin_bytes"] <= event["peak_bytes"] for event in compared)
    for precision, name, zero in (("32", "digits", "zero"), ("bf16", "other", "naught")):
        shown = fresh.get("digits", precision)
        fresh._kept["digits", precision] = replace(shown, name=name, class_names=[zero, *"123456789"])
    with pytest.raises(UserError, match="class 0 of digits is 'zero', of other 'naught'; take models that agree"):
        answers.answer_compared(fresh, asked_for, events.append)
    assert counts == [2, 1, 2]


BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xff\xff\x00\x00\xff\xff\x08\x02\x00\x00\x00"


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("sample", asked(count=0), "count 0: must be from 1 to 16"),
        ("sample", asked(count=10**6), "count 1000000: must be"),
        ("sample", asked(count="four"), "count 'four': must be int"),
        ("sample", asked(seed=-1), "seed -1: must be a whole number"),
        ("sample", asked(top_p=2.0), "top_p 2.0: must be in"),
        ("sample", asked(temperature=float("nan")), "temperature nan: must be"),
        ("sample", asked(cfg=-1.0), "cfg -1.0: must be 0"),
        ("sample", asked(guidance="upward"), "guidance upward: choose linear or constant"),
        ("sample", asked(guided_scales=[0, 9]), "last_scale=9; the model has scales 0 to 3"),
        ("sample", asked(label="11"), "class 11: the model knows classes 0 to 9"),
        ("sample", asked(label="0-9"), "class '0-9': give one class"),
        ("sample", asked(label="three"), "class 'three': is not known; give none, an index from 0 to 9"),
        ("sample", asked(label="all"), "class 'all': is not known"),
        ("sample", asked(model="../../etc/passwd"), "is not here; choose one of digits"),
        ("sample", asked(precision="float8"), "precision 'float8': choose one of 32"),
        ("sample", asked(out="/tmp/x"), "'out' is no part of it"),
        ("sample", asked(job="short"), "needs a job"),
        ("sample", b"[1, 2", "request: is no JSON"),
        ("sample", b"[1, 2]", "needs a job"),
        ("edit", asked(image=png(), mask=png(color=0)), "mask: paints no token"),
        ("edit", asked(image=png(), mask=png((8, 8))), "mask: is 8 x 8 pixels, the picture 16 x 16"),
        ("edit", asked(image="", mask=png()), "picture: is missing"),
        ("edit", asked(image="%%%", mask=png()), "picture: is no base64"),
        ("edit", asked(image=base64.b64encode(b"text").decode(), mask=png()), "not a readable JPEG, PNG or WebP"),
        ("edit", asked(image=base64.b64encode(BOMB).decode(), mask=png()), "not a readable"),
        ("compare", asked(others=[], precisions=[]), "compare: give two to 4 models"),
        ("tokens", asked_only(tokens=[1, 2]), "tokens of shape (1, 2)"),
        ("tokens", asked_only(tokens=[10**9] * 30), "the codebook has 0 to 255"),
        ("nothing", asked(), "nothing of that name is answered"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else "",
)
def test_a_crafted_request_is_told_and_the_server_goes_on(port: int, path: str, content: Any, message: str) -> None:
    _, events = post(port, f"/api/{path}", content)
    assert events[-1]["event"] == "error" and message in events[-1]["message"]
    assert "\n" not in events[-1]["message"]


def test_uploads_are_cut_bounded_and_from_this_page(port: int) -> None:
    def upload(data: bytes, **headers: str) -> tuple[int, Events]:
        return post(port, "/api/picture?model=digits", data, **{"Content-Type": "image/png"} | headers)

    status, (event,) = upload(base64.b64decode(png((40, 24))))
    assert status == 200 and Image.open(io.BytesIO(base64.b64decode(event["image"]))).size == (16, 16)
    stream = io.BytesIO()
    Image.new("1", (8000, 8000)).save(stream, format="PNG")  # 8 kB that are 64 million pixels
    assert len(stream.getvalue()) < 20_000 and UPLOAD_PIXELS < 8000**2
    assert "8000 x 8000 pixels; at most 16,000,000 are taken" in upload(stream.getvalue())[1][0]["message"]
    assert "too long and thin" in upload(base64.b64decode(png((7_000_000, 1))))[1][0]["message"]
    assert "not a readable" in upload(b"no picture")[1][0]["message"]
    assert "more than 16,777,216 bytes" in upload(b"x" * (2**24 + 1))[1][0]["message"]
    assert "must be sent as image" in upload(b"", **{"Content-Type": "text/plain"})[1][0]["message"]
    assert upload(b"", Origin="http://elsewhere.example")[0] == 403
    assert upload(b"", Host="elsewhere.example")[0] == 400
    assert upload(b"", Origin=f"http://127.0.0.1:{port}")[0] == 400, "an empty upload, but of this page"


def test_pictures_are_decoded_one_at_a_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, now, most = app.decode_picture, [0], [0]

    def slowly(*arguments: Any, **options: Any) -> Image.Image:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.05)
        now[0] -= 1
        return decode(*arguments, **options)

    monkeypatch.setattr(app, "decode_picture", slowly)
    data, found = base64.b64decode(png((40, 24))), []
    headers = {"Content-Type": "image/png"}

    def visit() -> None:
        found.append(post(port, "/api/picture?model=digits", data, **headers)[0])

    visitors = [threading.Thread(target=visit) for _ in range(6)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(30)
    assert found == [200] * 6 and most == [1]


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
def test_a_large_transparent_picture_is_made_smaller_before_it_is_laid_on_white(mode: str) -> None:
    picture = Image.new("RGBA", (400, 300), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 200, 300))
    stream = io.BytesIO()
    picture.convert(mode).save(stream, format="PNG", **({"transparency": 0} if mode == "P" else {}))
    whole, less = decode_picture(stream.getvalue()), decode_picture(stream.getvalue(), side=32)
    assert whole.mode == less.mode == "RGB" and whole.size == (400, 300)
    assert less.size == ((400, 300) if mode == "RGB" else (45, 34))
    assert [less.resize((2, 1)).getpixel((x, 0)) for x in (0, 1)] == [
        pytest.approx(whole.resize((2, 1)).getpixel((x, 0)), abs=16) for x in (0, 1)
    ]


@pytest.mark.parametrize(
    ("name", "bytes_", "message"),
    [
        ("sample", SMALL + 1, "more than 65,536 bytes"),
        ("attention", LONGEST["attention"] + 1, "more than 262,144 bytes"),
        ("attention", 2 * MOST_VALUES + 100, "more than 32,768 values"),
        ("tokens", 8_000_000, "more than 32,768 values"),
    ],
)
def test_long_requests_are_refused_before_their_values_are_looked_at(
    port: int, name: str, bytes_: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "parse", lambda *arguments: pytest.fail("was looked at"))
    body = b'{"job": "a job of a test", "model": "digits", "tokens": ['
    body += b"1," * ((bytes_ - len(body) - 3) // 2 + 1) + b"1]}"
    assert message in post(port, f"/api/{name}", body)[1][0]["message"]


def test_a_picture_of_the_size_that_is_promised_is_taken(port: int) -> None:
    image = base64.b64encode(base64.b64decode(png()) + bytes(UPLOAD_BYTES - 2000)).decode()
    assert post(port, "/api/tokens", asked_only(image=image))[1][-1]["event"] == "done"


def test_what_is_sent_writes_no_lines_into_the_log(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    for guidance in ("\ud800", "x\nmvar demo: all is well\x1b[2J", "x" * 60_000):
        _, events = post(port, "/api/sample", asked(guidance=guidance))
        assert "choose linear or constant" in events[-1]["message"] and len(events[-1]["message"]) < 700
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("mvar demo: guidance ") and len(line) < 700 for line in lines)
    assert r"\ud800" in lines[0] and r"x\nmvar demo" in lines[1] and r"\x1b[2J" in lines[1]


def test_a_failure_of_ours_is_told_in_a_line(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "parse", lambda *arguments: {}["nothing"])
    assert post(port, "/api/sample", asked()) == (
        500,
        [{"event": "error", "message": "the server failed (KeyError); its log says where"}],
    )
    assert capfd.readouterr().err.count("Traceback") == 1


def test_an_upload_that_breaks_off_leaves_no_traceback(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/api/picture?model=digits")
    for name, value in (("Content-Type", "image/png"), ("Content-Length", "1000")):
        connection.putheader(name, value)
    connection.endheaders(b"half")
    time.sleep(0.1)
    connection.close()
    log, end = "", time.monotonic() + 10
    while "broken off" not in log and time.monotonic() < end:
        time.sleep(0.05)
        log += capfd.readouterr().err
    assert log == "mvar demo: upload: was broken off\n"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/models", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("/api/models", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "document"}, 403),
        ("/page.js", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"}, 403),
        ("/", {"Origin": "null"}, 403),
        ("/", {"Host": "elsewhere.example"}, 400),
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, 200),
        ("/api/models", {"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_pages_are_refused_with_the_headers_of_ours(
    port: int, path: str, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    assert answer.status == status and all(answer.getheader(name) == value for name, value in HEADERS.items())


@pytest.mark.parametrize(
    "path", ["/../serve.py", "/%2e%2e/serve.py", "/..%2fserve.py", "//etc/passwd", "/page.css/../../app.py"]
)
def test_no_file_outside_of_its_folder_is_given(port: int, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    assert connection.getresponse().status == 404


def test_the_page_names_nothing_elsewhere(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert "default-src 'none'" in str(answer.getheader("Content-Security-Policy")) and b"<canvas" in answer.read()
    page = Path(serve.__file__).parent / "page"
    assert {file.name for file in page.iterdir()} == {
        "index.html",
        "page.css",
        "page.js",
        "paint.js",
        "inside.js",
        "icon.svg",
    }
    for file in page.iterdir():
        outside = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in outside and "https:" not in outside and "//cdn" not in outside


def test_a_port_in_use_and_a_missing_library(capsys: pytest.CaptureFixture[str]) -> None:
    taken = serve._listen(0)
    port = taken.getsockname()[1]
    assert main(["demo", "--port", str(port), "--device", "cpu"]) == 2
    assert f"--port {port}: is in use; give another one, or 0" in capsys.readouterr().err
    assert main(["demo", "nowhere"]) == 2 and "nowhere: no such checkpoint" in capsys.readouterr().err
    code = "import sys; sys.modules['starlette'] = None; from mvar_lightning.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'mvar-lightning[demo]'" in done.stderr


def test_words_for_elsewhere_follow_the_settings(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_module, "choose_device", lambda name: torch.device("cpu"))
    shown = shelf.get("digits")
    one = parse(Sampled, {"model": "digits", "label": "none", "count": 1, "top_k": 0, "more_smooth": True})
    jobs = one.jobs(shown)
    assert (
        command_of(one, shown, jobs)
        == "mvar sample --checkpoint digits --classes none --count 1 --top-k 0 --more-smooth"
    )
    assert "top_k=None, more_smooth=True" in python_of(one, shown, jobs)
    monkeypatch.setattr(asked_module, "choose_device", lambda name: torch.device("cuda", 0))
    assert command_of(one, shown, jobs).startswith("mvar sample --checkpoint digits --device cpu --classes"), (
        "beside a GPU the page's CPU is not what the command takes"
    )
    with pytest.raises(UserError, match="edits are made in 32 or bf16"):
        Edited("digits", "int8")
