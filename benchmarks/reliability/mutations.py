"""Damage by number: files changed a little or oddly, by their bytes or by what these mean.

Every change is drawn from a `random.Random`, so that a seed and a number give it again. JSON and YAML are
also taken apart and put together with one value lost, doubled, renamed or replaced by an odd one;
safetensors with another header, other names, types, shapes or numbers.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import PurePath
from random import Random
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

PLACE = "MUTATED"  # stands for a value until the file is text, and is then replaced by an odd text
NESTED = ("[" * 10**5 + "]" * 10**5, *("[" * depth + "]" * depth for depth in (20, 400, 900, 960)))
ODD_JSON = (
    "null", "true", "false", "0", "-1", "1", "7", "1.5", "1e999", "-1e999", "NaN", "-Infinity", "1e-400",
    "-0.0", str(2**31), str(2**63), str(2**64), str(-(2**63) - 1), "9" * 400, "9" * 5000,
    '""', '"x"', '"0"', '"\\u0000"', '"\\ud800"', '"../../x"', '"/"', '"' + "x" * 10**5 + '"', '"١"',
    "[]", "{}", "[[]]", "[null]", "[0, -1]", '{"": null}', '{"x": {"x": 0}}', '["x", "x"]',
    '{"role": "assistant", "content": "\\udfff"}', *NESTED,
)  # fmt: skip
ODD_YAML = (
    *ODD_JSON, "~", "yes", "0x" + "f" * 5000, "0b" + "1" * 20000, "1:59:59", "0777", ".inf", ".nan", "1_000",
    "2001-02-03", "2001-13-03", "2001-12-14t21:59:43.10-05:00", "0001-01-01 00:00:00 +23:59",
    "!!int ''", "!!int '+'", "!!int '0x'", "!!float ''", "!!float '-'", "!!float '1:x'", "!!bool x", "!!bool ''",
    "!!timestamp x", "!!timestamp ''", "!!binary '*'", "!!binary 'YQ=='", "!!set {a, b}", "!!omap [a: 1]",
    "!!pairs [a]", "!!null x", "!!str {}", "!!map x", "!!seq x", "!!python/object:os.system x", "!x y",
    "&a [1]", "*a", "{<<: {r: 1}}", "{<<: 1}", "{? [a] : 1}", "{? {a: 1} : 1}", "{1: 2}", "{null: 1, 1.5: 2}",
    "=", "{=: 1}", "'('", "'a{99999999999}'", "'" + "(" * 5000 + ")" * 5000 + "'", "'(a*)*b'", '"\\xff"', '"\\0"',
)  # fmt: skip
ODD_BYTES = (
    b"", b"\0", b"\0" * 64, b"\xff" * 8, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\n\n",
    b"{", b"}", b"[", b'"', b"\\", b"\\u", b",", b":", b"null", b"#", b"---\n", b"...\n", b"\x1f\x8b\x08", b"PAR1",
    *(n.to_bytes(8, "little") for n in (0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)),
)  # fmt: skip
ODD_NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e38, 2.0**62)
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip


def mutated(name: str, content: bytes, draw: Random) -> bytes:
    """The content of a file, changed in a way that its kind allows, by its name's ending."""
    if draw.random() < 0.4:
        return damaged(content, draw)
    change = BY_MEANING.get(PurePath(name).suffix, damaged)
    return change(content, draw)


def damaged(content: bytes, draw: Random) -> bytes:
    """Up to three changes of bits and ranges of bytes."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randint(0, len(content))
        end = min(len(content), start + int(2 ** draw.uniform(0, 10)))
        content = draw.choice(BY_BYTES)(content, start, end, draw)
    return content


def _flip(content: bytes, start: int, end: int, draw: Random) -> bytes:
    if start == len(content):
        return content
    return content[:start] + bytes([content[start] ^ 1 << draw.randrange(8)]) + content[start + 1 :]


def _noise(content: bytes, start: int, end: int, draw: Random) -> bytes:
    return content[:start] + draw.randbytes(end - start) + content[end:]


def _delete(content: bytes, start: int, end: int, draw: Random) -> bytes:
    return content[:start] + content[end:]


def _double(content: bytes, start: int, end: int, draw: Random) -> bytes:
    return content[:end] + content[start:]


def _move(content: bytes, start: int, end: int, draw: Random) -> bytes:
    rest = content[:start] + content[end:]
    to = draw.randint(0, len(rest))
    return rest[:to] + content[start:end] + rest[to:]


def _truncate(content: bytes, start: int, end: int, draw: Random) -> bytes:
    return content[:start]


def _splice(content: bytes, start: int, end: int, draw: Random) -> bytes:
    token = draw.choice((*ODD_BYTES, *(text.encode() for text in ODD_YAML)))
    return content[:start] + token + content[draw.choice((start, end)) :]


BY_BYTES = (_flip, _flip, _noise, _delete, _double, _move, _truncate, _splice, _splice)


def altered(value: Any, draw: Random) -> Any:
    """A value of JSON or YAML with one of its parts replaced by `PLACE`, lost, doubled or renamed."""
    whole = {"": deepcopy(value)}
    holder, key = draw.choice(list(_places(whole)))
    change = draw.random()
    if change < 0.6:
        holder[key] = PLACE
    elif change < 0.7 and holder is not whole:
        del holder[key]
    elif change < 0.8:
        holder[key] = draw.choice(([holder[key]], {"x": holder[key]}, str(holder[key])))
    elif change < 0.9 and isinstance(holder, dict) and holder is not whole:
        holder[draw.choice((PLACE, "x", "", str(key) + "s"))] = holder.pop(key)
    elif isinstance(holder, list):
        holder.insert(draw.randint(0, len(holder)), deepcopy(holder[key]))
    else:  # a value of somewhere else
        other, there = draw.choice(list(_places(whole)))
        holder[key] = deepcopy(other[there])
    return whole[""]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items):
        yield holder, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _json(content: bytes, draw: Random) -> bytes:
    text = json.dumps(altered(json.loads(content), draw), indent=draw.choice((None, 1)))
    return text.replace(f'"{PLACE}"', draw.choice(ODD_JSON)).encode()


def _json_lines(content: bytes, draw: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    return b"".join([*lines[:number], _json(lines[number], draw), b"\n", *lines[number + 1 :]])


def _yaml(content: bytes, draw: Random) -> bytes:
    text = yaml.safe_dump(altered(_yaml_value(content), draw), sort_keys=False)
    return text.replace(PLACE, draw.choice(ODD_YAML)).encode()


@lru_cache
def _yaml_value(content: bytes) -> Any:
    return yaml.safe_load(content)  # which takes longer than all the rest


def _gzip(content: bytes, draw: Random) -> bytes:
    inner = gzip.decompress(content)
    return gzip.compress(draw.choice((damaged, _json_lines))(inner, draw), compresslevel=1, mtime=0)


def _safetensors(content: bytes, draw: Random) -> bytes:
    return draw.choice((_header, _metadata, _tensors))(content, draw)


def _header(content: bytes, draw: Random) -> bytes:
    header, body = parts_of(content)
    return _with_header(_json(json.dumps(header).encode(), draw), body)


def _metadata(content: bytes, draw: Random) -> bytes:
    """One of the texts beside the tensors changed, by its meaning if it is JSON itself."""
    header, body = parts_of(content)
    texts = header.get("__metadata__")
    if not texts:
        return _header(content, draw)
    name = draw.choice(sorted(texts))
    change = _json if texts[name].startswith("{") else damaged
    texts[name] = change(texts[name].encode(), draw).decode(errors="replace")
    return _with_header(json.dumps(header).encode(), body)


def _tensors(content: bytes, draw: Random) -> bytes:
    tensors = altered_tensors(load(content), draw)
    return save(tensors, parts_of(content)[0].get("__metadata__"))


def parts_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of safetensors. Raises ValueError."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def with_metadata(content: bytes, texts: Mapping[str, str]) -> bytes:
    """Safetensors with other texts beside the tensors. Raises ValueError."""
    header, body = parts_of(content)
    return _with_header(json.dumps({**header, "__metadata__": texts}).encode(), body)


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """The tensors of safetensors. Raises ValueError."""
    try:
        return load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that torch does not have
        raise ValueError(str(error)) from error


def altered_tensors(tensors: Mapping[str, Tensor], draw: Random) -> dict[str, Tensor]:
    """Tensors of which one is lost, renamed, doubled, or of another type or shape, or with odd values."""
    found = dict(tensors)
    name = draw.choice(sorted(found))
    old = found.pop(name)
    change = draw.choice(("lose", "rename", "double", "values", *BY_SHAPE))
    if change == "rename":
        found[draw.choice(("x", "", f"{name}/basis", name[:-1]))] = old
    elif change == "double":
        found |= {name: old, draw.choice((*sorted(found), "x")): old.clone()}
    elif change == "values":
        found[name] = old.clone()
        value = draw.choice(ODD_NUMBERS)
        if not old.is_floating_point():
            value = draw.choice((-1, 0, 2**62, -(2**62)))
        found[name].view(-1)[draw.randrange(old.numel())] = value
    elif change != "lose":
        found[name] = BY_SHAPE[change](old, draw).contiguous()
    return found


BY_SHAPE: dict[str, Callable[[Tensor, Random], Tensor]] = {
    "cast": lambda old, draw: old.to(draw.choice(DTYPES)),
    "flat": lambda old, _: old.reshape(-1),
    "scalar": lambda old, _: old.reshape(-1)[0].clone(),
    "wrapped": lambda old, _: old[None],
    "turned": lambda old, _: old.mT.clone() if old.ndim > 1 else old.flip(0),
    "empty": lambda old, _: old[:0],
    "cut": lambda old, draw: old[: draw.randint(0, len(old))],
    "narrow": lambda old, draw: old[..., : draw.randint(0, old.shape[-1])].clone(),
    "longer": lambda old, _: torch.cat([old, old]),
}

BY_MEANING: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".gz": _gzip,
    ".safetensors": _safetensors,
}
