#!/usr/bin/env bash
# Expected: the spelling of scales that VAR's own command line takes, 1_2_3_4_5_6_8_10_13_16, stays text in a recipe
#   where the field is declared `str`, or is refused.
# Happens: YAML 1.1 reads it as one number with digit separators. OmegaConf turns that number into text again, as the
#   field asks for text, and gives '1234568101316' from a file and from a dot-list: one scale of that length.
#   jsonargparse refuses the same file (int for str), in its YAML mode as in its omegaconf mode, but takes the same
#   words on the command line unchanged.
# Version: omegaconf 2.4.0, jsonargparse 4.53.0
# Source: https://yaml.org/type/int.html ("_" is ignored); conversion to the declared type:
#   https://omegaconf.readthedocs.io/en/latest/structured_config.html; `pn` in utils/arg_util.py of FoundationVision/VAR
# Why it matters: people who move a next-scale model's settings from a command line into a recipe lose the scales; the
#   type that was declared against it hides the loss. Quotes, a list, or 1-2-3 keep them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    omegaconf==2.4.0 'jsonargparse[signatures,omegaconf]==4.53.0'
cd "$work"
venv/bin/python - <<'EOF'
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf

print(*(f"{name} {version(name)}" for name in ("omegaconf", "jsonargparse", "PyYAML")))
SCALES, GLUED = "1_2_3_4_5_6_8_10_13_16", "1234568101316"


@dataclass
class Model:
    pn: str = "1_2_3"


def merged(other):
    return OmegaConf.merge(OmegaConf.structured(Model), other).pn


def parsed(arguments, mode):
    parser = ArgumentParser(parser_mode=mode, exit_on_error=False)
    parser.add_argument("--pn", type=str)
    parser.add_argument("--config", action="config")
    try:
        return parser.parse_args(arguments).pn
    except ArgumentError:
        return "ArgumentError"


Path("recipe.yaml").write_text(f"pn: {SCALES}\n")
Path("quoted.yaml").write_text(f"pn: '{SCALES}'\n")
found = [
    ("OmegaConf, file, no type", OmegaConf.load("recipe.yaml").pn, int(GLUED)),
    ("OmegaConf, file, str", merged(OmegaConf.load("recipe.yaml")), GLUED),
    ("OmegaConf, dot-list, str", merged(OmegaConf.from_dotlist([f"pn={SCALES}"])), GLUED),
    ("OmegaConf, quoted file, str", merged(OmegaConf.load("quoted.yaml")), SCALES),
]
for mode in ("yaml", "omegaconf"):
    found.append((f"jsonargparse, file, {mode}", parsed(["--config", "recipe.yaml"], mode), "ArgumentError"))
    found.append((f"jsonargparse, command line, {mode}", parsed(["--pn", SCALES], mode), SCALES))
failed = False
for title, value, expected in found:
    print(f"{title}: {value!r}", "" if value == expected else f"CHANGED, was {expected!r}")
    failed |= value != expected
raise SystemExit(failed)
EOF
