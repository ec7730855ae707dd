"""A picture as a part of a page: its text is the page's, and its colours follow it from light to dark."""

import re
from pathlib import Path

from markupsafe import Markup

from residual_saes.eval.report.figures import INK, LINE, PAPER, SOFT

# What the page has other colours for on a dark ground.
_VARIABLES = {INK: "currentColor", "#000000": "currentColor", SOFT: "var(--soft)", LINE: "var(--line)", PAPER: "none"}
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]*;", re.DOTALL)


def inline(path: Path, prefix: str, title: str) -> Markup:
    """The <svg> of a file, its names of parts made unlike those of others on the page by `prefix`."""
    text = _DROPPED.sub("", path.read_text(encoding="utf-8"))
    _, box, parts = re.split(r'<svg [^>]*viewBox="([\d. ]*)"[^>]*>', text, maxsplit=1)
    parts = parts[: parts.index("</svg>")]
    for colour, variable in _VARIABLES.items():
        parts = parts.replace(colour, variable)
    parts = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", parts)
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box, title) + Markup(parts + "</svg>")
