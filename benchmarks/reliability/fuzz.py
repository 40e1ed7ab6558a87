"""Change every file that folora parses, thousands of times: ``python -m benchmarks.reliability.fuzz``.

A parser may refuse a changed file with an error of folora's own, or return something; any other exception,
the end of the process, a long wait or much memory is a finding. What is sealed must not come back as
another value, unless the checksum was made right again. Everything is tried in child processes, so that
a crash ends one of these alone. ``--again PARSER NUMBER`` shows one input's end with its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import logging
import multiprocessing
import resource
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.reliability.mutations import mutated
from benchmarks.reliability.parsers import Files, Parser, parsers
from benchmarks.tiny import tiny_task
from folora.compare.tables import Table
from folora.errors import ConfigError, FoLoraError, nearest
from folora.pipeline.run import Run
from folora.runtime.artifacts import software_versions
from folora.runtime.progress import progress
from folora.runtime.storage import write_json

FORMAT = "fuzz/1"
LONGEST_SECONDS = 10.0  # for one file of a few kB, on a machine with much else to do
MOST_BYTES = 2**28  # that the process may grow by for one such file
ROOM = 2**32  # more addresses than that are not given, so that nothing takes the whole machine

Outcome = dict[str, Any]
"""``{"number": n, "is": "refused" | "equal" | "other"}``, or a finding: "is" says what happened, with the
exception and where it was raised."""
FINE = ("refused", "equal", "other")
READY = {"is": "ready"}


def changed_files(parser: Parser, name: str, seed: int, number: int) -> tuple[Files, bool]:
    """The files of a parser with one of them changed, and whether they are resealed."""
    draw = Random(f"{seed} {name} {number}")
    file = draw.choice(list(parser.changed))
    files = {**parser.files, file: mutated(file, parser.files[file], draw)}
    if parser.reseal is None or draw.random() < 0.5:
        return files, False
    mended = parser.reseal(parser.files, files, file)
    return mended, mended != files


def judged(parser: Parser, folder: Path, files: Files, original: str, resealed: bool) -> Outcome:
    """What becomes of files; `original` is `plain` of what the valid ones give."""
    _filled(folder, files)
    before = _peak_bytes()
    try:
        value = plain(parser.parse(folder))
    except FoLoraError as error:
        found = {"is": "refused", "what": str(error)[:300]}  # a message can be made
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}"[:300]
        found = {
            "is": "raises",
            "what": said,
            "where": f"{Path(place.filename).name}:{place.lineno}",
        }
    else:
        found = {"is": "equal" if value == original else "other"}
        if value != original and parser.reseal is not None and not resealed:
            found = {
                "is": "changed",
                "what": "a changed file that was not resealed gave another value",
            }
    if (grown := _peak_bytes() - before) > MOST_BYTES:
        found = {"is": "grows", "what": f"by {grown / 1e6:.0f} MB"}
    return found


def plain(value: Any) -> str:
    """A text that is the same for equal values only: types, order of lists, and every bit of tensors."""
    if isinstance(value, Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {bits.hex()}"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__} {plain(vars(value))}"
    if isinstance(value, Mapping):
        return f"dict {plain(sorted(f'{plain(k)}: {plain(v)}' for k, v in value.items()))}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    return hex(value) if type(value) is int else repr(value)  # repr refuses large ones


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _filled(folder: Path, files: Files) -> Path:
    """The folder, with these files alone in it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fuzz(
    parser: Parser,
    name: str,
    seed: int,
    count: int,
    seconds: float,
    longest: float = LONGEST_SECONDS,
) -> list[Outcome]:
    """What became of the changed files 0, 1, 2, ... of one parser.

    Args:
        parser: What reads them.
        name: Its name, which with the seed and a number gives every change again.
        seed: Of all changes.
        count: Changed files at most.
        seconds: Time at most.
        longest: Seconds that one file may take.

    Raises:
        RuntimeError: The valid files are not read, or cannot be changed.
    """
    found: list[Outcome] = []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:

        def work(to: Connection) -> None:
            original = plain(parser.parse(_filled(Path(folder, "files"), parser.files)))
            to.send_bytes(json.dumps(READY).encode())
            for number in range(len(found), count):
                if time.monotonic() > end:
                    break
                files, resealed = changed_files(parser, name, seed, number)
                outcome = judged(parser, Path(folder, "files"), files, original, resealed)
                to.send_bytes(json.dumps(outcome).encode())
                if outcome["is"] == "grows":  # the peak stays; another child begins below it
                    break

        while len(found) < count and time.monotonic() < end:
            outcomes = in_child(work, longest)
            if (first := next(outcomes)) != READY:
                raise RuntimeError(f"the valid files of {name!r} are not read: {first['what']}")
            for outcome in outcomes:
                found.append({"number": len(found), **outcome})
    return found


def in_child(work: Callable[[Connection], None], longest: float) -> Iterator[Outcome]:
    """What a child process sends, in turn; last may be that it sent nothing for too long, or died."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_bounded, args=(work, theirs))
    child.start()
    theirs.close()
    try:
        while ours.poll(longest):
            yield json.loads(ours.recv_bytes())
        yield {"is": "hangs", "what": f"over {longest:g} s"}
    except EOFError:
        child.join()
        if child.exitcode == 1:  # by an exception of its own, which is on the screen
            raise RuntimeError("a child could not read valid files, or change them") from None
        if child.exitcode:
            yield {"is": "dies", "what": f"exit code {child.exitcode}"}
    finally:
        child.kill()
        child.join()
        ours.close()


def _bounded(work: Callable[[Connection], None], to: Connection) -> None:
    """Work in a child that says nothing, leaves no core and cannot take the whole machine."""
    torch.set_num_threads(1)  # a fork inherits no threads
    faulthandler.disable()  # a crash is told by the parent
    logging.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = psutil.Process().memory_info().vms + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    work(to)


def summed(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """A parser's part of the result: how many of each kind, and every finding."""
    counts = {kind: sum(o["is"] == kind for o in outcomes) for kind in FINE}
    findings = [outcome for outcome in outcomes if outcome["is"] not in FINE]
    return {"tried": len(outcomes), **counts, "findings": findings, "seconds": round(seconds, 1)}


def fuzz_all(known: Mapping[str, Parser], seed: int, count: int, seconds: float) -> dict[str, Any]:
    """All parsers in turn, each for its share of the time that is left."""
    found: dict[str, Any] = {}
    end = time.monotonic() + seconds
    with progress("fuzz", len(known)) as tick:
        for name, parser in known.items():
            began = time.monotonic()
            share = (end - began) / (len(known) - len(found))
            outcomes = fuzz(parser, name, seed, count, share)
            found[name] = summed(outcomes, time.monotonic() - began)
            tick()
    return found


def fuzz_table(result: Mapping[str, Any]) -> Table:
    """A row per parser, and the totals."""
    columns = ("tried", *FINE)
    rows = [
        (
            name,
            *(str(found[c]) for c in columns),
            str(len(found["findings"])),
            f"{found['seconds']:.0f}",
        )
        for name, found in result["parsers"].items()
    ]
    sums = [str(sum(found[c] for found in result["parsers"].values())) for c in columns]
    findings = sum(len(found["findings"]) for found in result["parsers"].values())
    seconds = sum(found["seconds"] for found in result["parsers"].values())
    rows.append(("all", *sums, str(findings), f"{seconds:.0f}"))
    header = (
        "parser",
        "changed files",
        "refused",
        "same value",
        "other value",
        "findings",
        "seconds",
    )
    limits = result["limits"]
    caption = (
        f"Seed {result['seed']}. A finding: any exception that is not folora's own, a crash of the process, "
        f"more than {limits['seconds']:g} s or {limits['bytes'] / 2**20:.0f} MiB for one file, or another "
        "value from a file whose checksums no longer match. Files without a checksum, "
        f"and those whose checksums were recomputed after the change, may give another value. `{result['command']}`"
    )
    return Table(header, tuple(rows), caption)


def finished_run(folder: Path) -> Path:
    """A whole tiny run, made in a folder."""
    run = Run(tiny_task(folder))
    run.run()
    return run.folder


def again(parser: Parser, name: str, seed: int, number: int) -> None:
    """Parse one changed file here and now, so that its traceback is seen."""
    with tempfile.TemporaryDirectory() as folder:
        files, resealed = changed_files(parser, name, seed, number)
        print(f"{name} {number}{', resealed' if resealed else ''}:")
        for path, content in files.items():
            if content != parser.files[path]:
                print(path, content[:2000])
        print(plain(parser.parse(_filled(Path(folder, "files"), files)))[:2000])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if something was found."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _options().parse_args(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        known = parsers(finished_run(Path(folder)))
    for name in (*(options.parsers or ()), *(options.again or ())[:1]):
        if name not in known:
            raise ConfigError(f"no parser {name!r}{nearest(name, known)}; there are {[*known]}")
    if options.again:
        name, number = options.again
        again(known[name], name, options.seed, int(number))
        return 0
    chosen = {name: known[name] for name in options.parsers or known}
    result = {
        "format": FORMAT,
        "command": f"python -m benchmarks.reliability.fuzz {shlex.join(given)}".strip(),
        "versions": software_versions(),
        "seed": options.seed,
        "limits": {"seconds": LONGEST_SECONDS, "bytes": MOST_BYTES},
        "parsers": fuzz_all(chosen, options.seed, options.count, options.seconds),
    }
    if options.output:
        write_json(options.output, result)
    findings = [(name, f) for name, p in result["parsers"].items() for f in p["findings"]]
    for name, finding in findings:
        print(f"{name} {finding['number']}: {finding['is']} {finding['what']}")
    tried = sum(p["tried"] for p in result["parsers"].values())
    print(f"{tried} changed files, {len(findings)} findings")
    return 1 if findings else 0


def _options() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Change every file that folora parses.")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--count", type=int, default=2000, help="changed files a parser")
    found.add_argument("--seconds", type=float, default=300, help="in all; shared by the parsers")
    found.add_argument("--parsers", nargs="+", help="by name; default: all")
    found.add_argument(
        "--again", nargs=2, metavar=("PARSER", "NUMBER"), help="show one input's end"
    )
    found.add_argument("--output", type=Path, help="JSON file")
    return found


if __name__ == "__main__":
    sys.exit(main())
