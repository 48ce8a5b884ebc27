"""The page: one HTML file without a network, a server, a font file or a foreign script.

Every text of a run (tokens, labels, model names) comes from arbitrary corpora. Jinja escapes it,
``formats.clean`` removes what HTML forbids, and a Content-Security-Policy that admits only the
page's own script, by its sha256, stands behind both.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sae_apps.report import formats
from sae_core.disk import atomic_write_text
from sae_core.errors import UserError

MAX_BYTES = 8_000_000
"""A page beyond this is slow to open and too large to send by mail."""
RESERVED_IDS = ("top", "content", "sections")


@dataclass(frozen=True)
class Section:
    """One part of the page, with its entry in the navigation."""

    id: str
    """Anchor and prefix of every id inside: a small letter, then small letters, digits, hyphens."""
    title: str
    html: Markup
    """Body below the heading. Markup, so that text which nobody escaped is refused."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.id) or self.id in RESERVED_IDS:
            raise UserError(
                "Section.id must be lower-case letters, digits and hyphens, start with a letter "
                f"and be none of {', '.join(RESERVED_IDS)}; got {self.id!r}."
            )
        if not self.title:
            raise UserError(f"Section {self.id!r}: expected a title, got an empty one.")
        if not isinstance(self.html, Markup):
            raise UserError(
                f"Section {self.id!r}: expected html as Markup, got {type(self.html).__name__}."
            )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sae_apps.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=formats.show,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = (formats.number, formats.percent, formats.duration, formats.memory)
    environment.filters |= {function.__name__: function for function in names}
    return environment


def render(template: str, **context: Any) -> Markup:
    """Fill a template of this package; values are cleaned and escaped, Markup passes through."""
    return Markup(_environment().get_template(template).render(**context))


def _source(name: str) -> Markup:
    """A file of our own, to be inlined as it is."""
    text = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    return Markup(text)


def build_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Put sections together into one self-contained HTML5 document.

    Args:
        title: heading and window title; subtitle: the line below it, may be empty.
        sections: parts in reading order, with different ids.
    Returns:
        The document, less than ``MAX_BYTES`` long in UTF-8.
    Raises:
        UserError: two sections share an id, an argument has another type, or the page is too large.
    """
    if not isinstance(title, str) or not isinstance(subtitle, str):
        raise UserError(
            "build_page expects title and subtitle as text, "
            f"got {type(title).__name__} and {type(subtitle).__name__}."
        )
    ids = [section.id for section in sections]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise UserError(f"Expected sections with different ids, got {', '.join(twice)} twice.")
    script = _source("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = render(
        "page.html.j2",
        title=title,
        subtitle=subtitle,
        sections=sections,
        style=_source("style.css"),
        script=script,
        script_hash=digest,
    )
    size = len(html.encode())
    if size > MAX_BYTES:
        largest = max(sections, key=lambda section: len(section.html))
        raise UserError(
            f"Expected a report of at most {MAX_BYTES:,} bytes, got {size:,}; "
            f"its largest section is {largest.id!r} with {len(largest.html.encode()):,} bytes."
        )
    return str(html)


def write_report(path: str | Path, html: str) -> None:
    """Write the page so that the file is the old page or the new one, never a part.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    atomic_write_text(Path(path), html)
