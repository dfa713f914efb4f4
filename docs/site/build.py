"""Builds the site: `make docs`. Gathers the pages as they lie in the repository, writes those that follow from the code
(commands, recipes, reference, gallery) and runs Sphinx, to which every warning is an error.

    python docs/site/build.py [FOLDER]      # build/site; the site itself is html/ in it
"""

from __future__ import annotations

import importlib
import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gallery import GALLERY

import mvar_lightning

ROOT = Path(__file__).parents[2]
GATHERED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "constraints.txt")
TREES = ("docs", "recipes", "mvar_lightning", "benchmarks", "tests", "findings", "data/README.md", ".ci")
"""What the pages link to lies where it lies in the repository."""

CHAPTERS = {
    "Begin": ("docs/first_steps", "docs/install", "docs/demo", "docs/digits", "docs/own_images", "docs/released"),
    "Use": ("docs/commands", "docs/recipes", "docs/sampling", "docs/runs", "docs/data", "docs/tokens", "docs/clusters"),
    "Python": ("docs/api", "docs/python", "reference/index"),
    "Understand": (
        "docs/map",
        "docs/design",
        "docs/strategies",
        "docs/adding_a_strategy",
        "docs/tokenizer",
        "docs/adding_a_selector",
    ),
    "Measured": (
        *("docs/evidence", "docs/analyses", "docs/beyond", "docs/evaluation"),
        *("docs/metrics", "docs/speed", "docs/exactness"),
    ),
    "Look up": ("generated/options", "generated/recipes", "generated/gallery", "generated/results"),
    "About": ("docs/versions", "docs/moving_from_0", "docs/log", "CONTRIBUTING", "CHANGELOG", "findings/README"),
}

JOBS = {
    "jobs": (
        "checkpoints.source.Source",
        "data.making.shards.ShardsRequest",
        "data.making.shards.make_shards",
        "data.tokens.encoding.EncodeRequest",
        "data.tokens.encoding.encode_data",
        "sampling.jobs.SampleRequest",
        "sampling.jobs.sample_images",
        "sampling.animation.animate",
        "sampling.sampler.SamplingSettings",
        "sampling.sampler.sample_pyramid",
        "sampling.guidance.LinearGuidance",
        "sampling.guidance.ConstantGuidance",
        "sampling.guidance.CutoffGuidance",
        "sampling.editing.EditRequest",
        "sampling.editing.edit_picture",
        "sampling.editing.inpaint_mask",
        "sampling.editing.outpaint_mask",
        "evaluation.image_request.EvaluateImagesRequest",
        "evaluation.image_job.evaluate_images",
        "evaluation.tokenizer.EvaluateTokenizerRequest",
        "evaluation.tokenizer.run_tokenizer_evaluation",
        "evaluation.strips.ReconstructRequest",
        "evaluation.strips.reconstruct_images",
        "evaluation.papers.analyses.AnalyzeRequest",
        "evaluation.papers.analyses.analyze_attention",
        "runs.train.train",
        "runs.sweep.SweepRequest",
        "runs.sweep.run_sweep",
    )
}
"""Beside the public names: the functions of docs/python.md and what they take."""


def main(folder: Path) -> int:
    """Gather, write, build."""
    source, html = folder / "source", folder / "html"
    shutil.rmtree(source, ignore_errors=True)
    gather(source)
    for name, text in generated():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    words = ["-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-d", str(folder / "doctrees")]
    status = subprocess.run([sys.executable, *words, str(source), str(html)], check=False).returncode
    if status == 0:
        print(f"{html / 'index.html'}: {len(list(html.rglob('*.html')))} pages")
    return status


def gather(source: Path) -> None:
    """The pages and what they link to, at the places that they have in the repository."""
    source.mkdir(parents=True)
    for name in GATHERED:
        shutil.copy2(ROOT / name, source / name)
    skip = shutil.ignore_patterns("__pycache__", "site", "*.safetensors", "*.gz", "*.npz", "faults", "moving", "page")
    for name in TREES:
        whole = ROOT / name
        if whole.is_dir():
            shutil.copytree(whole, source / name, ignore=skip)
        elif whole.exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(whole, source / name)
    for path in (source / "benchmarks" / "results").glob("*.md"):  # tables without a title
        path.write_text(f"# {path.stem}\n\n{path.read_text()}")
    shutil.copy(Path(__file__).with_name("conf.py"), source / "conf.py")
    shutil.copytree(Path(__file__).with_name("static"), source / "static")
    shutil.copy2(ROOT / "mvar_lightning" / "demo" / "page" / "icon.svg", source / "static")


def generated() -> Iterator[tuple[str, str]]:
    """Name and text of each page that follows from the code."""
    yield "index.md", index()
    yield "generated/options.md", options()
    yield from recipes()
    yield "generated/gallery.md", gallery()
    yield "generated/results.md", "# Benchmarks as written\n\n```{toctree}\n:glob:\n\n../benchmarks/results/*\n```\n"
    yield from reference()


def index() -> str:
    """README's first screen, and all chapters."""
    trees = "\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: {chapter}\n\n" + "\n".join(pages) + "\n```\n"
        for chapter, pages in CHAPTERS.items()
    )
    return "```{include} README.md\n```\n\n" + trees


def options() -> str:
    """Every command's options, from the parser itself."""
    directive = (
        ".. sphinx_argparse_cli::\n   :module: mvar_lightning.cli\n   :func: build_parser\n   :prog: mvar\n"
        "   :title: Options of every command\n"
    )
    return f"```{{eval-rst}}\n{directive}```\n"


def recipes() -> Iterator[tuple[str, str]]:
    """A page for each folder of recipes: the header of each as text, its settings below."""
    folders = sorted({path.parent for path in (ROOT / "recipes").glob("*/*.yaml")})
    names = "\n".join(f"recipes_{folder.name}" for folder in folders)
    head = "# Every recipe\n\nThe header of each says where it is from, what it takes and what was measured.\n\n"
    yield "generated/recipes.md", f"{head}```{{toctree}}\n:maxdepth: 2\n\n{names}\n```\n"
    for folder in folders:
        parts = [f"# {folder.name}\n"]
        for path in sorted(folder.glob("*.yaml")):
            name = path.relative_to(ROOT / "recipes").with_suffix("")
            command = "sweep" if folder.name == "ablations" else "train"
            text = f"```{{literalinclude}} ../recipes/{name}.yaml\n:language: yaml\n```\n"
            parts.append(f"## {name}\n\n`mvar {command} {name}`\n\n{text}")
        yield f"generated/recipes_{folder.name}.md", "\n".join(parts)


def gallery() -> str:
    """Each picture with the command that draws it."""
    parts = ["# Gallery\n\nEach picture, and what draws it.\n"]
    for file, (title, command) in GALLERY.items():
        parts.append(f"## {title}\n\n```\n{command}\n```\n\n![{title}](../docs/img/{file})\n")
    return "\n".join(parts)


def reference() -> Iterator[tuple[str, str]]:
    """A page for each room: its public names, from their docstrings."""
    rooms: dict[str, list[str]] = {}
    for name in mvar_lightning.__all__:
        found = getattr(mvar_lightning, name)
        if not isinstance(found, str):
            rooms.setdefault(found.__module__.split(".")[1], []).append(f"{found.__module__}.{name}")
    rooms |= {room: [f"mvar_lightning.{name}" for name in names] for room, names in JOBS.items()}
    pages = "\n".join(sorted(rooms))
    words = "Names end in shapes: B batch, L tokens of a pyramid, l of one scale, Z code dim, V codes, HW pixels."
    yield "reference/index.md", f"# Reference\n\n{words}\n\n```{{toctree}}\n:maxdepth: 2\n\n{pages}\n```\n"
    for room, names in rooms.items():
        parts = [f"# {room}\n"]
        for dotted in sorted(names, key=lambda dotted: dotted.rpartition(".")[2].lower()):
            module, _, name = dotted.rpartition(".")
            found = getattr(importlib.import_module(module), name)
            kind = "autoclass" if inspect.isclass(found) else "autofunction"
            parts.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: {module}.{name}\n```\n")
        yield f"reference/{room}.md", "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"))
