"""`mvar sample`: images of chosen classes as PNG files and a grid, or as one npz; continues where it stopped."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands import sampling_options as options
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from mvar_lightning.commands.sampling_jobs import Job, Report, Task


def add_parser(subparsers: Any) -> None:
    """Add `sample` to the parser of `mvar`."""
    parser = subparsers.add_parser("sample", help="generate images of chosen classes")
    options.add_source(parser)
    options.add_settings(parser)
    parser.add_argument("--classes", metavar="3,7", help="indices, ranges (0-9), names, or none (default: all classes)")
    parser.add_argument("--count", type=int, default=16, help="images of each class (16)")
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="what is there already is kept (samples)")
    parser.add_argument("--format", default="png", choices=("png", "npz"), help="npz: also one file for the evaluator")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time on each device (16)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="processes, each on its own GPU (1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the images that are missing; prints where they are, the speed and the peak memory."""
    import torch

    from mvar_lightning.commands import sampling_jobs

    _check_counts(args)
    source, settings = options.source_of(args), options.settings_of(args)
    device = options.choose_device(args.device)
    precision = options.choose_precision(args.precision, device)
    if device.type == "cuda" and args.devices > torch.cuda.device_count():
        raise UserError(f"--devices {args.devices}: there are {torch.cuda.device_count()} GPUs here")
    model, tokenizer = source.load(torch.device("cpu"))
    names = options.class_names(args.data, model.num_classes)
    jobs = sampling_jobs.list_jobs(options.class_indices(args.classes, model.num_classes, names), args.count, args.seed)
    folder = Path(args.out)
    weights = sampling_jobs.weights_hash(model, tokenizer)
    guidance = {"cfg": args.cfg, "guidance": repr(settings["cfg"])}
    identity = {**settings, **guidance, "precision": precision, "weights": weights}
    del model, tokenizer  # each process reads its own
    sampling_jobs.claim_folder(folder, identity)
    task = sampling_jobs.Task(source, settings, precision, args.batch_size, device.type, folder)
    made = _make_missing(task, jobs, args.devices)
    print(f"{folder}: {len(jobs)} images, {made}")
    print(f"grid: {sampling_jobs.write_grid(folder, jobs)}")
    if args.format == "npz":
        print(f"npz: {sampling_jobs.write_archive(folder, jobs)}")
    return 0


def _check_counts(args: argparse.Namespace) -> None:
    for name in ("count", "batch_size", "devices"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")


def _make_missing(task: Task, jobs: Sequence[Job], processes: int) -> str:
    """Make what is not there yet, with a progress bar; says what was made, how fast, and the peak memory."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    missing = [job for job in jobs if not (task.folder / job.file).exists()]
    if not missing:
        return "all of them there already"
    latest: dict[int, Report] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        shown = bar.add_task("images", total=len(jobs), completed=len(jobs) - len(missing))

        def receive(report: Report) -> None:
            latest[report.rank] = report
            bar.advance(shown, report.images)

        if processes == 1:
            from mvar_lightning.commands.sampling_jobs import make_images

            make_images(task, missing, 0, receive)
        else:
            _run_processes(task, missing, min(processes, len(missing)), receive)
    speed = len(missing) / max(report.seconds for report in latest.values())
    peak = max(report.peak_bytes for report in latest.values()) / 2**30
    each = "" if processes == 1 else " in the largest process"
    return f"{len(missing)} made now at {speed:.1f} images/s, peak memory {peak:.2f} GiB{each}"


def _run_processes(task: Task, jobs: Sequence[Job], processes: int, receive: Callable[[Report], None]) -> None:
    """Share the jobs among processes and pass on what they report. Raises `UserError` where one of them does."""
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(_process, (task, jobs, processes, queue), nprocs=processes, join=False, daemon=True)
    assert context is not None
    ended = False
    while not ended:
        ended = context.join(timeout=0.1)
        while not queue.empty():
            report = queue.get()
            if isinstance(report, str):
                for process in context.processes:
                    process.terminate()
                raise UserError(report)
            receive(report)
        time.sleep(0.05)


def _process(rank: int, task: Task, jobs: Sequence[Job], processes: int, queue: Any) -> None:
    """One process: every N-th job, on its own GPU or on its share of the cores."""
    import dataclasses
    import os

    import torch

    from mvar_lightning.commands.sampling_jobs import make_images

    if task.device == "cuda":
        task = dataclasses.replace(task, device=f"cuda:{rank}")
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        make_images(task, jobs[rank::processes], rank, queue.put)
    except UserError as error:
        queue.put(str(error))
