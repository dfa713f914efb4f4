"""`mvar sample` and `mvar edit` on a tiny saved checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_formula import load_case
from PIL import Image
from reference_files import write_case

from mvar_lightning import (
    AdjacentAttention,
    MultiScaleTokenizer,
    NextScaleTransformer,
    edit,
    generate,
    import_official,
    save,
)
from mvar_lightning.cli import main
from mvar_lightning.errors import UserError
from mvar_lightning.sampling import ConstantGuidance, CutoffGuidance, GuidanceSchedule
from mvar_lightning.sampling.class_choice import class_indices
from mvar_lightning.sampling.jobs import list_jobs, mixed
from mvar_lightning.tools.drawing import from_image

Run = Callable[..., int]


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9n]*.png"))}


def test_writes_what_generate_makes(
    sample: Run, tmp_path: Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    assert sample(tmp_path, "--classes", "3,none", "--count", "3", "--cfg", "2", "--batch-size", "4") == 0
    jobs = list_jobs([3, -1], 3, seed=0)
    assert sorted(pngs(tmp_path)) == sorted(job.file for job in jobs)
    for job in (jobs[1], jobs[4]):
        with Image.open(tmp_path / job.file) as image:
            made = from_image(image)
        expected = generate(model, tokenizer, [job.label], cfg=2.0, seeds=[job.seed]).images[0]
        assert (made - expected).abs().max() <= 0.6 / 255
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 64 and grid.height > 2 * 64
    assert not list(tmp_path.glob(".*"))


def test_makes_only_what_is_missing(sample: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--classes", "0-1", "--count", "2", "--batch-size", "3")
    assert sample(tmp_path, *arguments) == 0
    first = pngs(tmp_path)
    kept, lost, *_ = sorted(first)
    (tmp_path / lost).unlink()
    (tmp_path / kept).write_bytes(marked := first[kept] + b" ")
    assert sample(tmp_path, *arguments) == 0
    assert "1 made now" in capsys.readouterr().out
    assert pngs(tmp_path) == {**first, kept: marked}
    assert sample(tmp_path, "--classes", "0-1", "--count", "3") == 0
    assert len(pngs(tmp_path)) == 6 and first.keys() <= pngs(tmp_path).keys()


def test_folder_of_other_settings_is_refused(sample: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(tmp_path, "--classes", "0", "--count", "1") == 0
    before = pngs(tmp_path)
    assert sample(tmp_path, "--classes", "1", "--count", "1", "--cfg", "3") == 2
    assert "cfg 1.5" in capsys.readouterr().err and pngs(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        (("--guidance", "constant"), ConstantGuidance(4.0)),
        (("--guided-scales", "0-1"), CutoffGuidance(4.0, 0, 1)),
        (("--guidance", "constant", "--guided-scales", "1-2"), CutoffGuidance(4.0, 1, 2, linear=False)),
    ],
)
def test_guidance_schedules(
    sample: Run,
    tmp_path: Path,
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    arguments: tuple[str, ...],
    schedule: GuidanceSchedule,
) -> None:
    assert sample(tmp_path, "--classes", "3", "--count", "2", "--cfg", "4", *arguments) == 0
    for job in list_jobs([3], 2, seed=0):
        with Image.open(tmp_path / job.file) as image:
            made = from_image(image)
        expected = generate(model, tokenizer, [3], cfg=schedule, seeds=[job.seed]).images[0]
        assert (made - expected).abs().max() <= 0.6 / 255


def test_folder_of_another_attention_is_refused(
    sample: Run, tmp_path: Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    """The same weights under another strategy make other images."""
    arguments = ("--classes", "0", "--count", "1")
    assert sample(tmp_path / "out", *arguments) == 0
    other = NextScaleTransformer.from_config(model.config, attention=AdjacentAttention())
    other.load_state_dict(model.state_dict())
    save(tmp_path / "other", other, tokenizer)
    assert sample(tmp_path / "out", *arguments, "--checkpoint", str(tmp_path / "other")) == 2


def test_npz_is_what_the_evaluator_reads(sample: Run, tmp_path: Path) -> None:
    arguments = ("--classes", "4,0", "--count", "2", "--format", "npz")
    assert sample(tmp_path, *arguments) == 0
    file = tmp_path / "samples.npz"
    with np.load(file, allow_pickle=False) as archive:
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert pixels.dtype == np.uint8 and pixels.shape == (4, 10, 10, 3) and sorted(labels) == [0, 0, 4, 4]
    for job, image in zip(mixed(list_jobs([4, 0], 2, 0)), pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / job.file)), image)
    written = file.stat().st_mtime_ns
    assert sample(tmp_path, *arguments) == 0 and file.stat().st_mtime_ns == written
    picture = tmp_path / list_jobs([4], 1, 0)[0].file
    picture.unlink()
    Image.new("RGB", (10, 10), "red").save(picture)
    assert sample(tmp_path, *arguments) == 0
    with np.load(file, allow_pickle=False) as archive:
        assert (archive["arr_0"] == [255, 0, 0]).all(axis=(1, 2, 3)).sum() == 1, "pictures made anew, same names"
    assert sample(tmp_path, "--classes", "4", "--format", "npz", "--count", "1") == 0
    with np.load(file, allow_pickle=False) as archive:
        assert len(archive["arr_0"]) == 1


@pytest.mark.slow
def test_two_processes_make_the_same_images(sample: Run, tmp_path: Path) -> None:
    arguments = ("--classes", "0,2", "--count", "3", "--batch-size", "2")
    assert sample(tmp_path / "one", *arguments) == 0
    assert sample(tmp_path / "two", *arguments, "--devices", "2") == 0
    assert pngs(tmp_path / "one") == pngs(tmp_path / "two")


def test_seeds_belong_to_class_and_index() -> None:
    assert list_jobs([3], 4, 0)[:2] == list_jobs([1, 3], 2, 0)[2:]
    seeds = [{job.seed for job in list_jobs([3], 100, seed)} for seed in (0, 1)]
    assert len(seeds[0]) == 100 and not seeds[0] & seeds[1]


def test_classes_by_index_range_and_name() -> None:
    names = ["ant", "bee", "2"]
    assert class_indices(None, 3) == [0, 1, 2]
    assert class_indices("2, 0-1,0", 3) == [2, 0, 1]
    assert class_indices("bee,2,none", 3, names) == [1, 2, -1]
    for text, said in (("3", "0 to 2"), ("1-9", "0 to 2"), ("cat", "'cat'"), ("", "''"), ("2-1", "2-1")):
        with pytest.raises(UserError, match=said):
            class_indices(text, 3, names[:2])


def test_class_names_come_from_the_data_folder(sample: Run, tmp_path: Path) -> None:
    index = {"format": "mvar-shards-1", "class_names": ["a", "b", "c", "d", "e"], "splits": {}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert sample(tmp_path / "out", "--classes", "d", "--count", "1", "--data", str(tmp_path)) == 0
    assert [name[:4] for name in pngs(tmp_path / "out")] == ["0003"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--classes", "5"), "class 5: the model knows classes 0 to 4"),
        (("--count", "0"), "--count 0"),
        (("--top-p", "0"), "top_p 0.0"),
        (("--cfg", "-1"), "cfg -1"),
        (("--official", "var"), "either --checkpoint"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...], said: str, sample: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_released_pair_needs_both_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--official", "var", "--model", "x.pth"]) == 2
    assert "--tokenizer FILE" in capsys.readouterr().err


def test_released_pair_with_scales_and_kernel_of_its_own(tmp_path: Path) -> None:
    """What the weights do not tell is given, as for `mvar import`."""
    case, files = load_case("mvar_tiny")[0], write_case("mvar_tiny", tmp_path)
    sizes = {name: case[name] for name in ("patch_nums", "kernel_size", "first_neighborhood_scale")}
    pair = ["--official", "mvar", "--model", str(files[0]), "--tokenizer", str(files[1]), "--kernel-size", "3"]
    pair += ["--patch-nums", ",".join(map(str, sizes["patch_nums"])), "--first-neighborhood-scale", "4"]
    arguments = ["--classes", "1", "--count", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["sample", *pair, *arguments]) == 0
    job = list_jobs([1], 1, seed=0)[0]
    expected = generate(*import_official(*files, "mvar", **sizes), [1], seeds=[job.seed]).images[0]
    with Image.open(tmp_path / "out" / job.file) as image:
        assert (from_image(image) - expected).abs().max() <= 0.6 / 255


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def run_edit(checkpoint: Path, picture: Path, tmp_path: Path) -> Run:
    def run(*arguments: str) -> int:
        given = ["--checkpoint", str(checkpoint), "--image", str(picture), "--out", str(tmp_path / "out")]
        return main(["edit", *given, "--device", "cpu", "--count", "2", *arguments])

    return run


def test_edit_writes_results_grid_and_strips(
    run_edit: Run, picture: Path, tmp_path: Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    # the right half of the middle square, columns 5 to 25 of 30
    assert run_edit("--box", "15,0,25,20", "--class", "2") == 0
    out, jobs = tmp_path / "out", list_jobs([2], 2, 0)
    names = {"before_after.png", "coarse_to_fine.png", *(job.file for job in jobs)}
    assert {path.name for path in out.iterdir()} == names
    with Image.open(picture) as image:
        square = image.resize((15, 10), Image.Resampling.LANCZOS).crop((2, 0, 12, 10))
    image_B3HW = from_image(square)[None] * 2 - 1
    mask = torch.zeros(5, 5)
    mask[:, 3:] = 1
    # the crop starts at column 2 of 15, so the box begins at 5.5 of 10: the third token of five is hardly touched
    expected, _ = edit(model, tokenizer, image_B3HW, mask, [2, 2], seeds=[job.seed for job in jobs])
    with Image.open(out / jobs[1].file) as result:
        assert (from_image(result) - expected[1]).abs().max() <= 0.6 / 255


def test_mask_file_equals_its_box_and_outpaint_inverts(run_edit: Run, tmp_path: Path) -> None:
    pixels = np.zeros((20, 30), dtype=np.uint8)
    pixels[:, :15] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    results = []
    for arguments in (
        ("--mask", str(tmp_path / "mask.png")),
        ("--box", "0,0,0.5,1"),
        ("--box", "0.5,0,1,1", "--outpaint"),
        ("--box", "0.5,0,1,1"),
    ):
        assert run_edit(*arguments) == 0
        results.append(pngs(tmp_path / "out"))
    assert results[0] == results[1] == results[2] != results[3]


def test_edit_takes_weights_of_few_bits(run_edit: Run, tmp_path: Path) -> None:
    results = []
    for arguments in ((), ("--quantize", "int4-weights")):
        assert run_edit("--box", "0,0,1,1", "--class", "2", *arguments) == 0
        results.append(pngs(tmp_path / "out"))
    assert results[0] != results[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--box", "0,0,31,5"), "30 x 20"),
        (("--box", "0,0,1,1", "--cache-budget", "0.1"), "--cache-budget 0.1: keeps 3 of 39 tokens"),
        (("--box", "0.5,0.5,0.5,1"), "holds nothing"),
        (("--box", "0,0,0.05,1"), "paints no token"),
        (("--mask", "picture.png"), "cannot be read"),
        (("--box", "0,0,1,1", "--class", "0-2"), "give one class"),
        (("--box", "0,0,1,1", "--class", "9"), "0 to 4"),
        (("--box", "0,0,1,1", "--image", __file__), "not a readable"),
    ],
)
def test_bad_edits(
    arguments: tuple[str, ...],
    said: str,
    run_edit: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert run_edit(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_mask_of_another_size(run_edit: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (20, 20), 255).save(tmp_path / "mask.png")
    assert run_edit("--mask", str(tmp_path / "mask.png")) == 2
    assert "20 x 20 pixels, the picture 30 x 20" in capsys.readouterr().err


def test_bf16_runs_from_end_to_end(
    sample: Run, run_edit: Run, tmp_path: Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    """The pictures are those of float32 weights under autocast; the tokenizer's stay float32."""
    out = tmp_path / "bf16"
    arguments = ("--classes", "3", "--count", "2", "--batch-size", "2")
    assert sample(out, *arguments, "--precision", "bf16") == 0
    jobs = list_jobs([3], 2, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = generate(model, tokenizer, [3, 3], seeds=[job.seed for job in jobs]).images
    for job, expected_3HW in zip(jobs, expected, strict=True):
        with Image.open(out / job.file) as image:
            assert (from_image(image) - expected_3HW).abs().max() <= 0.6 / 255
    assert sample(out, *arguments) == 2, "32-bit ones go into another folder"
    assert run_edit("--box", "15,0,25,20", "--class", "2", "--precision", "bf16") == 0


def test_blocks_are_compiled_if_asked_for(sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[NextScaleTransformer] = []
    monkeypatch.setattr("mvar_lightning.transformer.acceleration.compile_blocks", compiled.append)
    arguments = ("--classes", "0", "--count", "1")
    assert sample(tmp_path / "one", *arguments) == 0 and not compiled
    assert sample(tmp_path / "two", *arguments, "--compile") == 0 and len(compiled) == 1
