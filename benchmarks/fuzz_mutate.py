"""Hostile variants of good files: bytes, JSON values, headers, lines; all drawn from one seed."""

import json
import struct
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

Rng = np.random.Generator
# Bytes of an element of each type of safetensors.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
         "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
HUGE = 1 << 60
# Values that a reader must survive wherever JSON, YAML or a header may hold one.
VALUES: tuple[Any, ...] = (
    HUGE, -HUGE, 1 << 40, 1 << 31, -1, 0, 1, 1e308, float("nan"), float("inf"), -0.0, True, False,
    None, "", " ", "x", "\x00", "\ud800", "é" * 50, "x" * 5000, "../../../etc/passwd",
    "/etc/passwd", "..", ".", "a/b", "~", "${HOME}", "$(id)", "{}", "{0.__class__}", "%s%n",
    "<script>alert(1)</script>", "'; DROP TABLE x; --", "!!python/object/apply:os.system ['id']",
    [], {}, [[]], [None], [1, "a", None], {"a": {"b": {}}}, "2026-01-01", "1e5", "0x10", "NaN",
    [HUGE, HUGE], [1 << 31, 1 << 31], [-1, 4], "F64", "I8", "BF16", "float16",
)  # fmt: skip
TOKENS: tuple[bytes, ...] = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b",", b'"', b"'", b"{", b"}", b"[", b"]",
    b"null", b"NaN", b"-1", b"1e999", b"\\u0000", b"\\ud800", b"<!--", b"</script>", b"\t", b";",
    b"9" * 40, b"PAR1", b"GGUF", b"\x93NUMPY", b"&a [*a]", b"!!python/name:os.system", b": ",
)  # fmt: skip


def pick(rng: Rng, choices: Any) -> Any:
    """One of them."""
    return choices[int(rng.integers(len(choices)))]


def mutate_bytes(content: bytes, rng: Rng) -> bytes:
    """One to four changes anywhere: bits, tokens, copies, cuts, sizes."""
    found = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        size = len(found)
        place = int(rng.integers(size + 1))
        end = min(size, place + int(rng.integers(1, 64)))
        what = int(rng.integers(7))
        if what == 0 and size:
            found[min(place, size - 1)] ^= 1 << int(rng.integers(8))
        elif what == 1:
            found[place:place] = pick(rng, TOKENS)
        elif what == 2:
            del found[place:end]
        elif what == 3:
            found[place:place] = found[place:end] * int(rng.integers(1, 5))
        elif what == 4:
            del found[place:]
        elif what == 5:
            number = pick(rng, (0, 1, 255, 1 << 31, (1 << 32) - 1, HUGE, (1 << 63) - 1))
            found[place : place + 8] = struct.pack("<Q", number)
        else:
            found[place:end] = rng.bytes(end - place)
    return bytes(found)


def mutate_json(value: Any, rng: Rng) -> Any:
    """The value with one node replaced, removed, doubled, renamed or buried."""
    paths = _paths(value)
    path = pick(rng, paths)
    what = int(rng.integers(6))
    if what == 0 and path:
        return _edited(value, path, lambda _: None, drop=True)
    if what == 1:
        depth = int(rng.integers(1, 40)) if rng.random() < 0.9 else 3000

        def bury(old: Any) -> Any:
            for _ in range(depth):
                old = [old]
            return old

        return _edited(value, path, bury)
    if what == 2:
        other = pick(rng, paths)
        return _edited(value, path, lambda _: _at(value, other))
    if what == 3:
        return _edited(value, path, _other_number)
    return _edited(value, path, lambda _: pick(rng, VALUES))


def _other_number(old: Any) -> Any:
    return -old if isinstance(old, int | float) and old else HUGE


def _paths(value: Any, limit: int = 400) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = [()]
    queue: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while queue and len(found) < limit:
        node, path = queue.pop(0)
        items = node.items() if isinstance(node, dict) else ()
        items = enumerate(node) if isinstance(node, list) else items
        for key, child in items:
            found.append((*path, key))
            queue.append((child, (*path, key)))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _edited(
    value: Any, path: tuple[Any, ...], change: Callable[[Any], Any], *, drop: bool = False
) -> Any:
    if not path:
        return change(value)
    head, rest = path[0], path[1:]
    copy = dict(value) if isinstance(value, dict) else list(value)
    if drop and not rest:
        del copy[head]
    else:
        copy[head] = _edited(copy[head], rest, change, drop=drop)
    return copy


def dumps(value: Any) -> bytes:
    """JSON as a careless program writes it: NaN, infinity and lone surrogates included."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 3000 + b"]" * 3000


def mutate_json_file(content: bytes, rng: Rng) -> bytes:
    """A JSON document with a changed node, or changed bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(content, rng)
    return dumps(mutate_json(json.loads(content), rng))


def mutate_lines(content: bytes, rng: Rng) -> bytes:
    """JSON lines: a changed record, or changed bytes."""
    lines = content.splitlines()
    if rng.random() < 0.3 or not lines:
        return mutate_bytes(content, rng)
    i = int(rng.integers(len(lines)))
    lines[i] = dumps(mutate_json(json.loads(lines[i]), rng))
    return b"\n".join(lines) + b"\n"


def mutate_safetensors(content: bytes, rng: Rng) -> bytes:
    """A changed header (shapes, offsets, types, names), its length, or changed bytes."""
    what = int(rng.integers(5))
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if what == 0:
        return mutate_bytes(content, rng)
    if what == 1:
        wrong = pick(rng, (0, 1, length - 1, length + 1, 1 << 31, HUGE, (1 << 64) - 1))
        return struct.pack("<Q", wrong) + content[8:]
    if what == 2:  # values that no computation gives, in a file that is whole
        found = bytearray(data)
        for _ in range(8):
            place = 4 * int(rng.integers(max(1, len(data) // 4)))
            bits = pick(rng, (0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000, 0xFFFFFFFF, 0))
            found[place : place + 4] = struct.pack("<I", bits)[: len(found) - place]
        return content[: 8 + length] + bytes(found)
    text = dumps(_other_types(header, rng) if what == 3 else mutate_json(header, rng))
    return struct.pack("<Q", len(text)) + text + data


def _other_types(header: dict[str, Any], rng: Rng) -> dict[str, Any]:
    """The same bytes under other types; the last axis becomes as long as they need."""
    found = json.loads(json.dumps(header))
    for name in (name for name in found if name != "__metadata__"):
        if rng.random() < 0.5:
            continue
        entry, (start, stop) = found[name], found[name]["data_offsets"]
        dtype, size = pick(rng, tuple(SIZES.items()))
        *rows, _ = entry["shape"] or [1]
        last, rest = divmod(stop - start, size * max(1, prod(rows)))
        if not rest:
            found[name] = entry | {"dtype": dtype, "shape": [*rows, last]}
    return found


def mutate_npy(content: bytes, rng: Rng) -> bytes:
    """A changed shape or type in the header, or changed bytes."""
    end = content.index(b"\n")
    wrong: bytes = pick(rng, (
        b"(1152921504606846976,)", b"(-1,)", b"()", b"(4, 4)", b"(17179869184,)", b"(True,)",
    ))  # fmt: skip
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    head = content[:end]
    start, stop = head.index(b"'shape': ") + 9, head.index(b")", head.index(b"'shape': ")) + 1
    changed = head[:start] + wrong + head[stop:]
    if rng.random() < 0.3:
        changed = changed.replace(b"<f4", b"|O").replace(b"<i4", b"|O").replace(b"<i8", b"|O")
    body = changed[10:].rstrip() + b" " * 64
    return content[:8] + struct.pack("<H", len(body) + 1) + body + content[end:]


def mutator(name: str) -> Callable[[bytes, Rng], bytes]:
    """What suits a file of this name."""
    for suffix, found in (
        (".safetensors", mutate_safetensors), (".json", mutate_json_file),
        (".geojson", mutate_json_file), (".jsonl", mutate_lines), (".npy", mutate_npy),
    ):  # fmt: skip
        if name.endswith(suffix):
            return found
    return mutate_bytes
