"""Numbers and foreign text as a reader should see them; what is undefined becomes a dash."""

import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from sae_core.errors import UserError

DASH = "\N{EM DASH}"
_MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# C0 and C1 controls (white space excepted), lone surrogates and non-characters: HTML forbids
# them, and UTF-8 cannot hold a surrogate, yet a tokenizer's byte tokens produce them.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(chr(plane * 0x10000 + end) for plane in range(1, 17) for end in (0xFFFE, 0xFFFF))
    + "]"
)


def lookup(item: Any, name: str, default: Any = None) -> Any:
    """``item[name]`` of a mapping or ``item.name`` of a record; ``default`` where it is absent."""
    if isinstance(item, Mapping):
        return item.get(name, default)
    return getattr(item, name, default)


def required(item: Any, name: str) -> Any:
    """As ``lookup``, but the field has to be there.

    Raises:
        UserError: the field is absent; names it and the fields that exist.
    """
    value = lookup(item, name, required)
    if value is required:
        found = sorted(item) if isinstance(item, Mapping) else sorted(getattr(item, "__dict__", ()))
        raise UserError(f"Expected a field {name!r} in a record of the report, got {found}.")
    return value


def clean(text: Any) -> str:
    """``str(text)`` with U+FFFD for every character that HTML forbids, and newlines as LF."""
    return _FORBIDDEN.sub("\ufffd", str(text).replace("\r\n", "\n").replace("\r", "\n"))


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def show(value: Any) -> Any:
    """What a template prints: a dash for None and NaN, Markup as it is, cleaned text otherwise."""
    if value is None or (isinstance(value, Real) and not math.isfinite(value)):
        return DASH
    return value if hasattr(value, "__html__") else clean(value)


def number(value: Any, digits: int = 3) -> str:
    """A number with ``digits`` significant digits and thousands separators; an integer whole."""
    if finite(value) is None:
        return DASH
    if isinstance(value, Integral):
        return f"{int(value):,}".replace("-", _MINUS)
    value = float(f"{float(value):.{digits}g}")  # first, so that 999.7 is placed as 1,000
    if value == 0:
        return "0"
    place = math.floor(math.log10(abs(value)))
    if -4 <= place < 9:
        text = f"{value:,.{max(0, digits - 1 - place)}f}"
        return text.replace("-", _MINUS)
    mantissa = f"{value / 10.0**place:.{digits - 1}f}".replace("-", _MINUS)
    return f"{mantissa} × 10{str(place).translate(_SUPERSCRIPT)}"


def percent(value: Any, digits: int = 3) -> str:
    """A fraction as a percentage. A part is never rounded up to 100%: 0.99996 is ``>99.9%``."""
    fraction = finite(value)
    if fraction is None:
        return DASH
    if fraction == 1:
        return "100%"
    if 1 - 0.5 * 10.0**-digits <= fraction < 1:
        return f">{100 - 10.0 ** (2 - digits):.{digits - 2}f}%"
    return number(100 * fraction, digits) + "%"


def duration(seconds: Any) -> str:
    """Seconds as ``3.2 s``, ``8 min 12 s`` or ``1 h 03 min``."""
    value = finite(seconds)
    if value is None:
        return DASH
    if value < 60:
        return number(value, 2) + " s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def memory(n_bytes: Any) -> str:
    """Bytes as MiB or GiB."""
    value = finite(n_bytes)
    if value is None:
        return DASH
    return number(value / 2**30) + " GiB" if value >= 2**30 else number(value / 2**20) + " MiB"


def short(value: float) -> str:
    """An axis label of a few characters: ``0.05``, ``20k``, ``1.5M``, ``10⁻⁴``."""
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-3 <= size < 1e12:
        for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if size >= unit:
                return f"{value / unit:g}{name}".replace("-", _MINUS)
        return f"{value:g}".replace("-", _MINUS)
    place = math.floor(math.log10(size) + 1e-9)
    mantissa = f"{value / 10.0**place:.2g}".replace("-", _MINUS)
    power = f"10{str(place).translate(_SUPERSCRIPT)}"
    return power if mantissa == "1" else f"{mantissa}×{power}"
