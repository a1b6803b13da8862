"""Strings and numbers for people to read. What models and data say is hostile: it is made printable here."""

from __future__ import annotations

import re

# Not characters of XML, or able to reorder the text around them; all become the replacement character.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_LONGEST = 280
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printable(text: str) -> str:
    """`text` without control characters, surrogates and overrides of the writing direction."""
    return _UNPRINTABLE.sub("\ufffd", text)


def shorten(text: str, longest: int = _LONGEST) -> str:
    """`text`, or its beginning and how long it was."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text):,} characters)"


def ratio(value: float | None) -> str:
    """Two significant digits, with a power of ten below a thousandth: "0.10", "1.7 × 10⁻⁵"; an en dash for none."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.2g}" if abs(value) < 0.095 or value >= 1 else f"{value:.2f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; an en dash for none."""
    return "–" if value is None or value != value else f"{value:.{digits}%}".replace("%", "\u2009%")


def p_value(value: float) -> str:
    """A p-value with three decimals, or "< 0.001"."""
    return "< 0.001" if value < 0.0005 else f"{value:.3f}"


def listing(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def pixels(value: float) -> str:
    """A length in [0, 1] pixel units as levels of 8 bits: "8/255"."""
    return f"{value * 255:.4g}/255"
