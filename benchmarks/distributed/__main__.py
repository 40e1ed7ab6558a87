"""One process against several, on gloo: ``python -m benchmarks.distributed``, or ``make distributed``.

The same tiny run by 1, 2 and 4 processes must give the same samples to the bit, and statistics, bases and
weights within rounding, also by FSDP2, with a base that is shared out, and of a mixture of sources. A process that is killed ends
the others at once, and the run goes on, with as many processes or another number. Processes that see
different things are refused before the first step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.distributed.launchers import launched
from benchmarks.distributed.runs import ROUNDING, Bench
from benchmarks.distributed.trials import (
    MIXED,
    interrupted,
    killed,
    mixed,
    other_ways,
    refused,
    same_as_one,
)
from benchmarks.tiny import make_llama
from folora.pipeline.training import Training
from folora.runtime.artifacts import software_versions
from folora.runtime.storage import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if something is not as promised."""
    known = argparse.ArgumentParser(prog="benchmarks.distributed", description=__doc__)
    known.add_argument("--output", type=Path, help="JSON file")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = known.parse_args(given)
    torch.set_num_threads(1)  # a fork inherits no threads
    make_llama()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        found = {
            "same": same_as_one(bench, (2, 3, 4)),
            "ways": other_ways(bench, (1, 2, 3, 4)),
            "mixed": mixed(bench, (2, 3)),
            "killed": [
                killed(bench, 2, 1, 2), killed(bench, 2, 0, 1), killed(bench, 3, 1, 2),
                killed(bench, 2, 1, 3), killed(bench, 4, 2, 4),
                *(killed(bench, 2, 1, then, "FSDP2") for then in (2, 1, 3)),
                *(killed(bench, 2, 1, then, "--shard") for then in (2, 1, 3)),
                killed(bench, 2, 1, 2, "--shard", "DDP"),
            ],
            "interrupted": [interrupted(bench, 2), interrupted(bench, 4)],
            "refused": refused(bench),
            "launched": launched(bench),
        }  # fmt: skip
    said = breaches(found)
    print(json.dumps(found, indent=1))
    print("\n".join(said) or "as promised")
    if options.output:
        command = " ".join(["python -m benchmarks.distributed", *given])
        write_json(options.output, {"command": command, **found, "versions": software_versions()})
    return int(bool(said))


def breaches(found: Mapping[str, Any]) -> list[str]:
    """What is not as promised, in words."""
    said = [
        f"{part} of {n} processes differs by {d:g}"
        for n, parts in found["same"].items()
        for part, d in parts.items()
        if d > ROUNDING[part]
    ]
    said += [
        f"weights of {n} processes by {way} differ by {d:g}"
        for way, counts in found["ways"].items()
        for n, d in counts.items()
        if d > ROUNDING[Training.path]
    ]
    said += [
        f"samples of a mixture by {n} differ: {one}"
        for n, one in found["mixed"].items()
        if one["difference"] or one["sequences"] != MIXED
    ]
    for one in [*found["killed"], *found["interrupted"]]:
        if any(one["codes_then"]) or one["difference"] > one["allowed"]:
            said.append(f"did not go on as it should: {one}")
    for one in found["killed"]:
        others = [code for r, code in enumerate(one["codes"]) if r != one["victim"]]
        if set(others) != {2} or len(one["says"]) != len(others) or one["kept_old"]:
            said.append(f"others did not end with a word: {one}")
    said += [
        f"{name}: {one}"
        for name, one in found["launched"].items()
        if any(one["codes"]) or one["difference"] > one["allowed"]
    ]
    said += [f"SIGTERM: {one}" for one in found["interrupted"] if set(one["codes"]) != {143}]
    said += [
        f"{what}: {message}"
        for what, message in found["refused"].items()
        if f"process 1 of 2 has another {what} than process 0" not in message
    ]
    return said


if __name__ == "__main__":
    sys.exit(main())
