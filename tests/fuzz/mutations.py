"""Damage to files: what disks, networks, other programs and hostile authors do to them.

Each function takes a `random.Random` and content and returns new content with a few words on what was done. The same
generator in the same state gives the same damage.
"""

import copy
import json
import math
import random
import struct
from pathlib import Path


class Literal(str):
    """A piece of JSON that is written as it stands."""


class Doubled(dict):
    """An object in which one key stands twice; `second` is the later pair."""

    second: tuple


# Values that stand for anything: of the wrong type, size or sign, or with a meaning of their own somewhere.
def odd_value(rng: random.Random, outside: Path):
    numbers = [0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63, 10**8, 10**12, -(10**9), 0.5, -0.25, 1e-300, 1e308]
    literals = [
        "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 4000, "9" * 6000, "[" * 300 + "]" * 300,
        "[" * 5000 + "]" * 5000, '"\\ud800"', '"\\udfff x"', "01", "+1", "0x10",
    ]  # fmt: skip
    texts = [
        "", " ", "\x00", "a\x00b", "\x1b]0;x\x07\x1b[31m", "\u202e\u2066x", "\ufeff", "é日本\U0001f600", "x" * 3000, "NaN", "1e400", "true",
        "null", "0", "-1", "None", "<img src=x onerror=alert(1)>", "%s {0} {x!r}", "=1+1", ".", "..", "/", "~", "a/b", "a\\b",
        "../outside", "../outside/model.safetensors", "../../outside", str(outside), str(outside / "model.safetensors"),
        "/etc/passwd", "/dev/zero", "file:///etc/passwd", "relu", "topk", "float8_e4m3fn", "torch.float32",
    ]  # fmt: skip
    containers = [None, True, False, [], {}, [[]], [None], {"": None}, [1, 2, 3], ["a", "b"], {"a": {"b": 1}}]
    pool = rng.choice([numbers, [Literal(text) for text in literals], texts, texts, containers])
    return copy.deepcopy(rng.choice(pool))


def write_json(value) -> str:
    """JSON text with what `json.dumps` would not write: literals and doubled keys."""
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        pairs = [*value.items(), *([value.second] if isinstance(value, Doubled) else [])]
        return "{" + ", ".join(f"{json.dumps(key)}: {write_json(entry)}" for key, entry in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(write_json(entry) for entry in value) + "]"
    return json.dumps(value)


def _places(value, place=()):
    """Where something stands in a JSON value; of long lists the first few."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()
    for key, entry in items:
        yield from _places(entry, (*place, key))


def _get(value, place):
    for key in place:
        value = value[key]
    return value


def _set(value, place, new):
    if not place:
        return new
    _get(value, place[:-1])[place[-1]] = new
    return value


def _name(place):
    return "/".join(str(key)[:30] for key in place) or "the top"


def _retyped(rng, value):
    """The same value as something else."""
    if isinstance(value, bool):
        return rng.choice([int(value), str(value), [value], float(value)])
    if isinstance(value, int | float):
        return rng.choice(
            [str(value), [value], {"value": value}, bool(value), -value, value + 0.5, float(value), value * 1000]
        )
    if isinstance(value, str):
        return rng.choice(
            [[value], {"text": value}, list(value)[:6], len(value), True, value.encode().hex(), value[::-1]]
        )
    if isinstance(value, list):
        return rng.choice(
            [value[:1], value + value, value[::-1], [value], dict(enumerate(map(str, value))), str(value), value[:-1]]
        )
    if isinstance(value, dict):
        return rng.choice([list(value.items()), list(value), [value], {"x": value}, str(value), {}])
    return rng.choice([0, "None", [], {}, False])


def damage_json(rng: random.Random, text: str, outside: Path) -> tuple[str | bytes, str]:
    """One change to a JSON value, or to the text it stands in."""
    value = json.loads(text)
    places = list(_places(value))
    place = rng.choice(places)
    inner = [p for p in places if p]
    objects = [p for p in places if isinstance(_get(value, p), dict)]
    kind = rng.choices(
        ["replace", "delete", "retype", "twice", "add", "rename", "exchange", "text", "bytes"],
        [34, 14, 16, 5, 8, 4, 5, 6, 8],
    )[0]
    if kind == "bytes":
        return damage_bytes(rng, text.encode())
    if kind == "text":
        return _damage_text(rng, text)
    if kind == "replace":
        new = odd_value(rng, outside)
        return write_json(_set(value, place, new)), f"{_name(place)} = {new!r:.40}"
    if kind == "retype":
        new = _retyped(rng, _get(value, place))
        return write_json(_set(value, place, new)), f"{_name(place)} retyped to {new!r:.40}"
    if kind == "delete" and inner:
        place = rng.choice(inner)
        del _get(value, place[:-1])[place[-1]]
        return write_json(value), f"{_name(place)} deleted"
    if kind == "exchange" and len(inner) > 1:
        one, other = rng.sample(inner, 2)
        if one != other[: len(one)] and other != one[: len(other)]:
            first, second = copy.deepcopy(_get(value, one)), copy.deepcopy(_get(value, other))
            _set(_set(value, one, second), other, first)
            return write_json(value), f"{_name(one)} exchanged with {_name(other)}"
    if kind in ("twice", "add", "rename") and objects:
        place = rng.choice(objects)
        target, new = _get(value, place), odd_value(rng, outside)
        if kind == "add" or not target:
            known = ["auto_map", "quantization_config", "dtype", "architectures", "attn_implementation", "to_dict", "is_sparse",
                     "__class__", "id2label", "num_labels", "return_dict", "sub_configs", "device_map"]  # fmt: skip
            key = rng.choice([*known, "", "x" * 200, "\x1b[1m", "a.b/c"])
            target[key] = new
            return write_json(value), f"{_name(place)}/{key!r:.20} added: {new!r:.30}"
        key = rng.choice(list(target))
        if kind == "rename":
            other = rng.choice([str(key) + " ", str(key).upper(), "", "../outside"])
            return write_json(_set(value, place, {other if k == key else k: v for k, v in target.items()})), (
                f"{_name((*place, key))} renamed to {other!r}"
            )
        doubled = Doubled(target)
        doubled.second = (key, new)
        return write_json(_set(value, place, doubled)), f"{_name((*place, key))} twice, then {new!r:.30}"
    return write_json(odd_value(rng, outside)), "another value in all"


def _damage_text(rng, text):
    changes = {
        "single quotes": text.replace('"', "'"),
        "a comma too many": text.rstrip().removesuffix("}").removesuffix("]") + ",}",
        "a comment": "// made by hand\n" + text,
        "a byte order mark": "\ufeff" + text,
        "a NUL after it": text + "\x00",
        "twice": text + text,
        "Python's words": text.replace("true", "True").replace("null", "None"),
        "no end": text.rstrip()[:-1],
        "nothing": "",
        "deep nesting": "[" * 100_000,
        "deep objects": '{"a":' * 30_000,
        "one long string": '"' + "x" * 2_000_000 + '"',
        "a list around it": "[" + text + "]",
        "null": "null",
        "a number": "3",
        "Windows lines": text.replace("\n", "\r\n"),
    }
    what = rng.choice(list(changes))
    return changes[what], f"text: {what}"


def damage_bytes(rng: random.Random, content: bytes, fixed: int = 0) -> tuple[bytes, str]:
    """One change to bytes, none in the first `fixed`."""
    if len(content) <= fixed:
        return content + b"\x00", "a NUL appended"
    at = rng.randrange(fixed, len(content))
    end = min(len(content), at + rng.randint(1, 256))
    changed = bytearray(content)
    kind = rng.choice(
        [
            "bit",
            "bit",
            "bytes",
            "cut off",
            "cut off",
            "hole",
            "zeros",
            "inserted",
            "appended",
            "empty",
            "twice",
            "utf-16",
            "latin",
        ]
    )
    if kind == "bit":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for _ in range(rng.randint(2, 12)):
            changed[rng.randrange(fixed, len(content))] = rng.randrange(256)
    elif kind == "cut off":
        changed = changed[:at]
    elif kind == "hole":
        changed = changed[:at] + changed[end:]
    elif kind == "zeros":
        changed[at:end] = bytes(end - at)
    elif kind == "inserted":
        changed[at:at] = rng.randbytes(rng.randint(1, 48))
    elif kind == "appended":
        changed += rng.randbytes(rng.randint(1, 64))
    elif kind == "empty":
        changed = changed[:0]
    elif kind == "twice":
        changed *= 2
    elif kind == "utf-16":
        changed = bytearray(content.decode("utf-8", "replace").encode("utf-16"))
    else:
        changed[at:at] = b"\xe9\xff"
    return bytes(changed), f"bytes: {kind} at {at} of {len(content)}"


def damage_lines(rng: random.Random, text: str, outside: Path) -> tuple[str | bytes, str]:
    """One change to JSON lines, or to one of them."""
    lines = text.splitlines()
    if not lines:
        return odd_line(rng, outside), "a line for nothing"
    at = rng.randrange(len(lines))
    kind = rng.choices(
        ["line", "bytes", "drop", "double", "order", "odd", "half", "long"], [50, 14, 6, 6, 4, 10, 6, 4]
    )[0]
    if kind == "bytes":
        return damage_bytes(rng, text.encode())
    if kind == "line":
        new, what = damage_json(rng, lines[at], outside)
        new = new.encode("utf-8", "surrogatepass") if isinstance(new, str) else new
        before, after = ("\n".join(part).encode() for part in (lines[:at], lines[at + 1 :]))
        return b"\n".join(
            part for part in (before, new.replace(b"\n", b" "), after) if part
        ) + b"\n", f"line {at}: {what}"
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "order":
        rng.shuffle(lines)
    elif kind == "odd":
        lines.insert(at, odd_line(rng, outside))
    elif kind == "half":
        lines[at] = lines[at][: len(lines[at]) // 2]
    else:
        lines[at] = json.dumps({"step": 1, "text": "x" * 500_000})
    return "\n".join(lines) + "\n", f"lines: {kind} {at}"


def odd_line(rng, outside):
    return rng.choice(
        [
            "",
            " ",
            "null",
            "[]",
            "3",
            '"x"',
            "{}",
            '{"step": true}',
            '{"step": -1}',
            write_json(odd_value(rng, outside)),
        ]
    )


def damage_plain(rng: random.Random, text: str, outside: Path) -> tuple[str | bytes, str]:
    """One change to text in which lines and words mean something: YAML, CSV, plain text."""
    lines = text.splitlines()
    kind = rng.choice(["word", "word", "word", "line", "drop", "double", "indent", "bytes", "bytes", "odd"])
    if kind == "bytes" or not lines:
        return damage_bytes(rng, text.encode())
    at = rng.randrange(len(lines))
    if kind == "word":
        head, colon, tail = lines[at].partition(": ")
        new = rng.choice([
            str(odd_value(rng, outside)), "[1, 2]", "{a: 1}", "010", "1:30", "0x1f", "yes", "~", "!!int x", "!!python/object:os.system {}",
            "*missing", "&a [*a]", "2001-99-99", "1_000", ".nan", ".inf", "|", '"', "1e3", "- x", "", "true",
        ])  # fmt: skip
        lines[at] = (
            head + colon + new if colon else rng.choice([new, f"{lines[at]},{new}", lines[at].replace(",", ";")])
        )
    elif kind == "line":
        lines.insert(
            at,
            rng.choice(
                [
                    "",
                    "\t",
                    "---",
                    "...",
                    "#",
                    "x",
                    "x: y",
                    "- 1",
                    "%TAG",
                    "<<: *a",
                    ",".join("abc") * 400,
                    "x" * 100_000,
                ]
            ),
        )
    elif kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.append(lines[at])
    elif kind == "indent":
        lines[at] = "  " + lines[at]
    else:
        return rng.choice(
            ["", "\n", "null", "[]", "3", "[" * 20_000, "a: " * 20_000, "{" * 20_000, "\x00", "-" * 100_000]
        ), "odd text in all"
    return "\n".join(lines) + "\n", f"text: {kind} in line {at}"


SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip


def damage_safetensors(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """One change to a safetensors file: in its header, in the bytes of a tensor, or in both so that they fit."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return damage_bytes(rng, content)
    name = rng.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    kind = rng.choices(
        ["value", "cast", "dtype", "shape", "transpose", "offsets", "remove", "extra", "rename", "exchange", "grow", "metadata",
         "length", "header", "bytes"],
        [26, 12, 5, 8, 6, 6, 6, 4, 4, 6, 5, 3, 4, 6, 10],
    )[0]  # fmt: skip
    if kind == "bytes":
        return damage_bytes(rng, content)
    if kind == "header":
        text, what = damage_json(rng, json.dumps(header), Path("/"))
        text = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + body, f"header: {what}"
    if kind == "length":
        length = rng.choice([0, 1, size - 1, size + 1, len(content), 2**32, 2**62, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:], f"header length {length}"
    if kind == "value" and end > begin and entry["dtype"] in ("F64", "F32", "F16", "BF16", "I64"):
        return _odd_numbers(rng, header, body, name)
    what = f"{kind} of {name}"
    if kind in ("cast", "grow"):
        dtype = rng.choice(list(SIZES)) if kind == "cast" else entry["dtype"]
        shape = entry["shape"] if kind == "cast" else [2 * n for n in entry["shape"][:1]] + entry["shape"][1:]
        values = math.prod(shape) * SIZES[dtype]
        header, body = _with_tensor(
            header, body, name, dtype, shape, bytes(values) if dtype == "BOOL" else rng.randbytes(values)
        )
        what += f" to {dtype} {shape}"
    elif kind == "dtype":
        entry["dtype"] = rng.choice([*SIZES, "F4", "X9", "", None, 3])
        what += f" {entry['dtype']}"
    elif kind == "shape":
        entry["shape"] = rng.choice(
            [[], [0], [-1], [2**62, 4], [1], entry["shape"] + [1], [10**9], [1.5], "x", None, [entry["shape"]]]
        )
        what += f" {entry['shape']}"
    elif kind == "transpose":
        entry["shape"] = entry["shape"][::-1] if len(set(entry["shape"])) > 1 else [math.prod(entry["shape"])]
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(
            [
                [begin, end + 4],
                [begin + 4, end],
                [end, begin],
                [0, 0],
                [0, len(body)],
                [-4, end],
                [begin],
                None,
                [0, 2**63],
            ]
        )
        what += f" {entry['data_offsets']}"
    elif kind == "remove":
        header, body = _with_tensor(header, body, name, None, None, b"")
    elif kind == "extra":
        header, body = _with_tensor(header, body, "another", "F32", [2], bytes(8))
    elif kind == "rename":
        other = rng.choice([name + "x", "", name.upper(), "layer." + name, "\x00"])
        header = {other if key == name else key: each for key, each in header.items()}
    elif kind == "exchange" and len(names) > 1:
        other = rng.choice([each for each in names if each != name])
        header[name], header[other] = header[other], header[name]
        what += f" with {other}"
    else:
        header["__metadata__"] = rng.choice([{}, {"format": "tf"}, {"format": 3}, None, [], {"x": "y" * 10_000}, "pt"])
        what = f"metadata {header['__metadata__']!r:.40}"
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body, what


def _odd_numbers(rng, header, body, name):
    """NaN, infinity, huge, zero or flipped numbers, in one place or all."""
    entry = header[name]
    begin, end = entry["data_offsets"]
    width = SIZES[entry["dtype"]]
    patterns = {
        "F64": {"NaN": 0x7FF8 << 48, "infinity": 0x7FF0 << 48, "-infinity": 0xFFF0 << 48, "1e300": 0x7E37E43C8800759C, "zero": 0, "-1": 0xBFF0 << 48},
        "F32": {"NaN": 0x7FC00000, "infinity": 0x7F800000, "-infinity": 0xFF800000, "3e38": 0x7F61B1E6, "zero": 0, "-1": 0xBF800000},
        "F16": {"NaN": 0x7E00, "infinity": 0x7C00, "-infinity": 0xFC00, "65504": 0x7BFF, "zero": 0, "-1": 0xBC00},
        "BF16": {"NaN": 0x7FC0, "infinity": 0x7F80, "-infinity": 0xFF80, "3e38": 0x7F61, "zero": 0, "-1": 0xBF80},
        "I64": {"-1": 2**64 - 1, "largest": 2**63 - 1, "smallest": 2**63, "a million": 10**6, "zero": 0},
    }[entry["dtype"]]  # fmt: skip
    what = rng.choice(list(patterns))
    number = patterns[what].to_bytes(width, "little")
    piece = bytearray(body[begin:end])
    if rng.random() < 0.4:
        piece[:] = number * (len(piece) // width)
        where = "everywhere"
    else:
        at = rng.randrange(len(piece) // width) * width
        piece[at : at + width] = number
        where = f"at {at // width}"
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[:begin] + bytes(piece) + body[end:], f"{name} {what} {where}"


def _with_tensor(header, body, name, dtype, shape, content):
    """Header and body in which one tensor is another, or gone, and everything fits."""
    pieces, new, at = [], {}, 0
    tensors = {
        key: (each["dtype"], each["shape"], body[slice(*each["data_offsets"])])
        for key, each in header.items()
        if key != "__metadata__"
    }
    tensors[name] = (dtype, shape, content)
    for key, (kind, size, piece) in tensors.items():
        if kind is None:
            continue
        new[key] = {"dtype": kind, "shape": size, "data_offsets": [at, at + len(piece)]}
        pieces.append(piece)
        at += len(piece)
    if "__metadata__" in header:
        new["__metadata__"] = header["__metadata__"]
    return new, b"".join(pieces)


def damage_file(rng: random.Random, path: Path, outside: Path) -> str:
    """Damages one file after its kind.

    Returns:
        `str`: what was done.
    """
    content = path.read_bytes()
    if rng.random() < 0.04:
        path.unlink()
        if rng.random() < 0.5:
            return "removed"
        path.mkdir()
        return "a folder of its name"
    if path.suffix == ".safetensors":
        new, what = damage_safetensors(rng, content)
    elif path.suffix == ".json":
        new, what = damage_json(rng, content.decode(), outside)
    elif path.suffix == ".jsonl":
        new, what = damage_lines(rng, content.decode(), outside)
    elif path.suffix in (".yaml", ".yml", ".csv", ".txt"):
        new, what = damage_plain(rng, content.decode(), outside)
    else:
        new, what = damage_bytes(rng, content)
    path.write_bytes(new if isinstance(new, bytes) else new.encode("utf-8", "surrogatepass"))
    return what
