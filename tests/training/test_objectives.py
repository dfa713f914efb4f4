"""Objectives: each loss against its formula written out, what it leaves alone, and mistakes told before training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from faults.small_models import SCALES, SIZES, small_model, small_tokenizer
from torch.utils.data import DataLoader, TensorDataset

from mvar_lightning import (
    CCA,
    AdjacentAttention,
    CrossEntropy,
    Distillation,
    NextScaleTransformer,
    ScalePyramid,
    UserError,
    VARModule,
    WeightedScales,
)
from mvar_lightning.checkpoints import save
from mvar_lightning.sampling import LinearGuidance
from mvar_lightning.sampling.guidance import GuidedRows
from mvar_lightning.training.objectives import Objective, range_loss
from mvar_lightning.training.token_loss import token_loss

TOKENIZER = small_tokenizer()
IMAGES, LABELS = torch.rand(6, 3, 6, 6) * 2 - 1, torch.tensor([0, 1, 2, 2, 1, 0])
SIZE: dict[str, Any] = {"depth": 1, "width": 16, "heads": 2, "gamma_init": 0.1, "top_k": None, "top_p": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path, small_model(), TOKENIZER)
    return path


def other(seed: int = 5, **changes: Any) -> NextScaleTransformer:
    torch.manual_seed(seed)
    return NextScaleTransformer(
        SCALES, **{**SIZES, "num_classes": 3, "depth": 2, "width": 16, "heads": 2, **changes}
    ).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    idx_BL = TOKENIZER.encode(IMAGES)
    return TOKENIZER.teacher_input(idx_BL), LABELS, idx_BL


def test_hmars_weights_are_the_published_ones() -> None:
    weights = WeightedScales("hmar").of_scales(ScalePyramid([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]))
    published = [0.025, 0.064, 0.115, 0.138, 0.140, 0.133, 0.121, 0.105, 0.088, 0.071]
    assert weights == pytest.approx(published, abs=6e-4)


def test_weighted_scales() -> None:
    model, batch = small_model(), inputs()
    plain = token_loss(model(batch[0], batch[1]), batch[2], model.pyramid)
    for weights, expected in (
        ("flat", plain.loss),
        ("equal", plain.loss_K.mean()),
        ([0.0, 0.0, 2.0], plain.loss_K[2]),
        ([1.0, 1.0, 2.0], (plain.loss_K * torch.tensor([0.25, 0.25, 0.5])).sum()),
    ):
        found = WeightedScales(weights).loss(model, None, *batch)
        torch.testing.assert_close(found.loss, expected)
        assert torch.equal(found.loss_K, plain.loss_K) and found.loss.requires_grad


def log_likelihoods(
    model: NextScaleTransformer, x: torch.Tensor, label: torch.Tensor, idx: torch.Tensor
) -> torch.Tensor:
    return model(x, label).log_softmax(-1).gather(-1, idx[..., None])[..., 0].sum(1)


@pytest.mark.parametrize("weight", [0.5, 50.0])
def test_cca_is_its_formula(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference, (x, label, idx) = other(), small_model(), inputs()
    free = torch.tensor([True, False, False, False, False, False])
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.where(free, 0.05, 0.5))
    beta, terms_own, terms_other = 0.1, [], []
    for i in range(6):
        own = 3 if free[i] else int(label[i])
        rolled = 3 if free[i] else int(label[(i + 1) % 6])
        one = x[i : i + 1], idx[i : i + 1]
        g_own, g_other = (
            log_likelihoods(model, one[0], torch.tensor([c]), one[1])
            - log_likelihoods(reference, one[0], torch.tensor([c]), one[1])
            for c in (own, rolled)
        )
        positive = bool(free[i]) or int(label[(i + 1) % 6]) == int(label[i])
        terms_own.append(F.logsigmoid(beta * g_own))
        terms_other.append((1 if positive else weight) * F.logsigmoid((1 if positive else -1) * beta * g_other))
    expected = -(torch.cat(terms_own).mean() + torch.cat(terms_other).mean()) / max(weight, 1)
    found = CCA(beta=beta, weight=weight).loss(model, reference, x, label, idx)
    torch.testing.assert_close(found.loss, expected[()] if expected.ndim == 0 else expected)
    found.loss.backward()
    assert all(p.grad is None for p in reference.parameters())


def test_cca_starts_at_the_log_of_two() -> None:
    """At the reference itself every g is 0; labels that are all alike make every pair positive."""
    model, (x, _, idx) = small_model(), inputs()
    found = CCA(unconditional=0.0).loss(model, small_model(), x, torch.zeros(6, dtype=torch.int64), idx)
    assert float(found.loss) == pytest.approx(2 * math.log(2) / 50, rel=1e-5)


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize(("temperature", "hard"), [(1.0, 0.0), (2.0, 0.3)])
def test_distillation_is_its_formula(cfg: float, temperature: float, hard: float) -> None:
    student, teacher, (x, label, idx) = other(label_drop=0.0), small_model(adjacent=True), inputs()
    rows = GuidedRows(teacher, label, LinearGuidance(cfg))  # the teacher's logits as sampling makes them
    with torch.no_grad():
        logits = [rows.step(0, None)]
        start = 0
        for scale in (1, 2):
            tokens = teacher.pyramid.tokens_of(scale)
            logits.append(rows.step(scale, x[:, start : start + tokens]))
            start += tokens
        target = (torch.cat(logits, dim=1) / temperature).softmax(-1)
        own = student(x, label)
    soft = (target * (target.log() - (own / temperature).log_softmax(-1))).sum(-1).mean() * temperature**2
    expected = (1 - hard) * soft + hard * F.cross_entropy(own.flatten(0, 1), idx.flatten())
    found = Distillation("x", temperature, cfg, hard).loss(student, teacher, x, label, idx)
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)


def test_a_student_of_its_own_teacher_has_nothing_to_learn() -> None:
    model = small_model()
    found = Distillation("x").loss(model, small_model(), *inputs())
    assert float(found.loss) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("scales", [range(2, 3), range(1, 2), range(1, 3)])
def test_some_scales_alone_are_that_part_of_the_whole(adjacent: bool, scales: range) -> None:
    batch, model = inputs(), small_model(adjacent)
    whole = token_loss(model(batch[0], batch[1]), batch[2], model.pyramid)
    counts = torch.tensor([model.pyramid.tokens_of(scale) for scale in scales], dtype=torch.float32)
    expected = (whole.loss_K[scales.start : scales.stop] * counts / counts.sum()).sum()
    loss, figures = range_loss(model, *batch, scales)
    torch.testing.assert_close(loss, expected)
    assert figures.scales == scales


def fit(module: VARModule, steps: int = 2) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6))
    return trainer


@pytest.mark.parametrize(
    "objective",
    [None, CrossEntropy(), WeightedScales(), CCA(), Distillation("here", cfg=1.0)],
    ids=lambda o: type(o).__name__,
)
def test_a_run_moves_the_model_and_keeps_the_frozen_one_out_of_its_weights(
    objective: Objective | None, folder: Path
) -> None:
    if isinstance(objective, Distillation):
        objective = Distillation(str(folder), cfg=1.0)
    torch.manual_seed(0)
    module = VARModule(str(folder), 3, **SIZE, init_from=str(folder), base_lr=0.1, objective=objective)
    names = set(module.state_dict())
    trainer = fit(module)
    assert set(module.state_dict()) == names
    moved = [
        name for name, p in small_model().named_parameters() if not torch.equal(p, module.model.state_dict()[name])
    ]
    assert moved and torch.isfinite(trainer.callback_metrics["train/loss"])
    saved = NextScaleTransformer.from_config(module.model.config)
    assert saved.config == small_model().config


def test_ccas_reference_may_be_the_start_under_another_name(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "same", small_model(), TOKENIZER)
    VARModule(str(folder), 3, **SIZE, init_from=str(folder), objective=CCA(str(tmp_path / "same")))
    save(tmp_path / "run" / "model", moved := small_model(), TOKENIZER)
    with torch.no_grad():
        moved.head.linear.bias += 1  # what a run has written
    save(tmp_path / "run" / "model", moved, TOKENIZER)
    with pytest.raises(UserError, match="leave reference out"):
        VARModule(str(folder), 3, **SIZE, init_from=str(folder), objective=CCA(str(tmp_path / "run")))


def test_trained_scales_alone_have_figures(folder: Path) -> None:
    module = VARModule(str(folder), 3, **SIZE, attention=AdjacentAttention(), train_scales=[2])
    figures = fit(module).callback_metrics
    assert "train/loss_scale_2" in figures and "train/loss_scale_1" not in figures


def test_an_objective_is_written_and_read_by_name() -> None:
    for objective in (CCA("a", beta=0.1), Distillation("b", cfg=2.0), WeightedScales([1.0, 2.0])):
        assert Objective.from_config(objective.config()) == objective


def test_mistakes_are_told_before_training(folder: Path, tmp_path: Path) -> None:
    def made(**settings: Any) -> VARModule:
        return VARModule(str(folder), 3, **SIZE, **settings)

    torch.manual_seed(9)
    strange = type(TOKENIZER)(**TOKENIZER.config)
    save(tmp_path / "strange", small_model(), strange)
    save(tmp_path / "classes", other(num_classes=4), TOKENIZER)
    save(tmp_path / "alone", None, TOKENIZER)
    groups = {"attention": AdjacentAttention(), "scale_groups": [[0, 1], [2]]}
    mistakes: list[tuple[Any, str]] = [
        (lambda: WeightedScales("best"), "unknown"),
        (lambda: WeightedScales([0.0]), "not all 0"),
        (lambda: WeightedScales([1.0, -1.0]), "at least 0"),
        (lambda: made(objective=WeightedScales([1.0])), "1 weights for 3 scales"),
        (lambda: CCA(beta=0), "beta 0"),
        (lambda: CCA(beta="x"), "beta 'x'"),  # type: ignore[arg-type]
        (lambda: WeightedScales(["a"]), "give numbers of at least 0"),  # type: ignore[list-item]
        (lambda: WeightedScales(5), "WeightedScales 5"),  # type: ignore[arg-type]
        (lambda: Distillation("x", temperature="hot"), "temperature 'hot'"),  # type: ignore[arg-type]
        (
            lambda: made(objective=CCA(str(tmp_path / "classes")), init_from=str(folder)),
            "not what training starts from",
        ),
        (lambda: Distillation("x", temperature=0), "temperature 0"),
        (lambda: Distillation("x", hard=2), "hard 2"),
        (lambda: made(objective=CCA(), **groups), "scale_groups"),
        (lambda: made(train_scales=[2], **groups), "scale_groups"),
        (lambda: made(train_scales=[2], objective=WeightedScales()), "leave out WeightedScales"),
        (lambda: made(train_scales=[0, 2]), "follow each other, from 0 to 2"),
        (lambda: made(train_scales=[2, 3]), "from 0 to 2"),
        (lambda: made(train_scales=[]), "follow each other"),
        (lambda: fit(made(objective=CCA())), "init_from"),
        (lambda: fit(made(objective=CCA(str(tmp_path / "none")), init_from=str(folder))), "no such checkpoint"),
        (lambda: fit(made(objective=Distillation(str(tmp_path / "strange")))), "another tokenizer"),
        (lambda: fit(made(objective=Distillation(str(tmp_path / "classes")))), "4 classes"),
        (lambda: fit(made(objective=Distillation(str(tmp_path / "alone")))), "tokenizer alone"),
    ]
    for mistake, words in mistakes:
        with pytest.raises(UserError, match=words):
            mistake()
