"""A page: one HTML file that holds all it needs, and takes nothing from the network.

What it shows was written by strangers: queries, passages, docids, a model's reasoning. In the
templates Jinja2 escapes everything; what the script shows comes as JSON and is put in as text,
never as HTML; and the page's own policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
import json
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
# Inside a <script> these could end it, or (U+2028 and U+2029) a line of it.
UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def script_json(data: Any) -> Markup:
    """Data as JSON that may stand inside a <script>, whatever its texts hold. Half a surrogate
    pair, which no file can hold, becomes a question mark."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.encode("utf-8", "replace").decode().translate(UNSAFE))


def render(kind: str, data: Any, **values: Any) -> str:
    """A page ("run", "reader" or "comparison"): its template filled in with values, and `data` for
    its script."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed}
    files = ("page.js", f"{kind}.js", "page.css")
    shared, own, style = ((HERE / name).read_text("utf-8") for name in files)
    script = shared + own
    return environment.get_template(f"{kind}.html.jinja").render(
        data=script_json(data),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def number(value: Any) -> str:
    """A figure as the pages write it: three decimals, fewer for large ones, more for small ones."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return str(value)
    size = abs(value)
    if value == int(value) and size < 1e15:
        text = f"{int(value):,}"
    elif size >= 100:
        text = f"{value:,.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.001:
        text = f"{value:.3f}"
    else:
        text = f"{value:.1e}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int = 4) -> str:
    text = f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")
