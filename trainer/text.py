"""Text that others supply, made harmless before it is stored or shown: in a terminal, in a log, on a page."""

from __future__ import annotations

import re
import unicodedata

MAX_LINE = 200
MAX_SAMPLE = 600
KEPT_CONTROLS = frozenset("\n\t")
# Cc: control characters, NUL among them. Cf: invisible ones, such as those that turn the writing direction around.
# Cs: halves of characters, which are no valid UTF-8. Co, Cn: private and unassigned. Zl, Zp: separators of lines.
REFUSED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def clean_line(text: object, limit: int = MAX_LINE) -> str:
    """One line of visible characters, at most `limit` of them; "" for what is no text."""
    return " ".join(_visible(text, limit, frozenset()).split())


def clean_block(text: object, limit: int = MAX_SAMPLE) -> str:
    """The same with line breaks and tabs kept."""
    return _visible(text, limit, KEPT_CONTROLS)


def one_line(error: BaseException) -> str:
    """An error's text in one line of bearable length, without a login."""
    return without_login(" ".join(str(error).split()))[:300] or type(error).__name__


def without_login(url: str) -> str:
    """A URL as it may be shown: a user name and password in it become "***"."""
    return re.sub(r"(?<=://)[^/@\s]*@", "***@", url)


def _visible(text: object, limit: int, kept: frozenset[str]) -> str:
    if not isinstance(text, str):
        return ""
    seen = text[: 4 * limit]  # a text of a megabyte is cut before it is looked at
    shown = (c if c in kept or unicodedata.category(c) not in REFUSED else "\ufffd" for c in seen)
    cut = "".join(shown)
    return cut if len(cut) <= limit else cut[: limit - 1] + "…"
