"""`mvar demo`: a page on this machine that samples, edits, compares models and looks inside them."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from mvar_lightning.commands.reconstruct import named_checkpoints
from mvar_lightning.errors import UserError

NEEDED = ("starlette", "uvicorn")
"""What the page is served by; the extra ``demo``."""


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the parser of `mvar`."""
    parser = subparsers.add_parser(
        "demo",
        help="a page on this machine: watch images grow, paint into them, compare models, look inside",
        description="Serves a page at 127.0.0.1 until Ctrl-C. Nothing is downloaded, nothing is written, and no other "
        "machine is answered (ssh -L 7860:127.0.0.1:7860 HOST brings a remote one here).",
    )
    words = "a run's folder, a saved folder, or a Lightning checkpoint (default: digits, which ships)"
    parser.add_argument("checkpoints", nargs="*", metavar="[NAME=]CHECKPOINT", help=words)
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0 takes a free one (7860)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is")
    words = "auto: bf16 on a GPU, 32 on a CPU"
    parser.add_argument("--precision", default="auto", choices=("auto", "32", "bf16"), help=words)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; prints the address when the page answers."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"demo: needs {' and '.join(missing)}; pip install 'mvar-lightning[demo]'")
    checkpoints = named_checkpoints(args.checkpoints or ["digits"])
    from mvar_lightning.demo.answers import warm
    from mvar_lightning.demo.app import build_app
    from mvar_lightning.demo.serve import serve
    from mvar_lightning.demo.shelf import Shelf

    shelf = Shelf(checkpoints, args.device, args.precision)

    def ready(address: str) -> None:
        print(f"{', '.join(shelf.paths)}: {address} (Ctrl-C ends it)", flush=True)

    serve(build_app(shelf), args.port, lambda: warm(shelf), ready, args.open)
    return 0
