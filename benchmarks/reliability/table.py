"""Tables of docs/reliability.md and docs/scaling.md, from the results of the harnesses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.reliability.chaos import KINDS
from folora.compare.tables import Table
from folora.pipeline.stages import KeepMoments
from folora.pipeline.training import Training

ENDS = {0: "done", 2: "refused", 130: "Ctrl-C", 143: "SIGTERM", -9: "killed"}


def disturbance_table(found: Mapping[str, Any]) -> Table:
    """Disturbances of runs, exit of each attempt, and what was lost."""
    rows = []
    for kind in KINDS:
        trials = [t for t in found["trials"] if t["kind"] == kind]
        hits, codes = Counter[str](), Counter[int]()
        for trial in trials:
            hits.update(trial["hits"])
            codes.update({int(code): count for code, count in trial["codes"].items()})
        rows.append(
            (
                kind,
                str(len(trials)),
                ", ".join(f"{stage} {count}" for stage, count in hits.items()),
                ", ".join(f"{ENDS.get(code, code)} {count}" for code, count in codes.most_common()),
                f"{slowest:.1f}"
                if (slowest := max((t["slowest"] for t in trials), default=0))
                else "",
                str(sum(len(t["lost"]) for t in trials)),
            )
        )
    writes = ", ".join(f"{stage} {count}" for stage, count in found["writes"].items())
    caption = (
        f"`{found['command']}`, {found['seconds'] / 60:.0f} minutes beside other work. Lost: files that differ by a "
        "byte from the undisturbed run, finished work that was repeated, tracebacks, errors that do "
        f"not name the file. Python's writes in each stage of the run: {writes}; a run can be killed before each "
        "of them."
    )
    header = (
        "disturbance",
        "runs",
        "at",
        "attempts ended",
        "slowest exit (s)",
        "lost",
    )
    return Table(header, tuple(rows), caption)


def soak_table(found: Mapping[str, Any]) -> Table:
    """Growth over thousands of steps, and differences after many interruptions."""
    readings = found["readings"]
    first, last = readings[len(readings) // 3], readings[-1]
    rows = [
        (
            "memory of the process (MB)",
            f"{first['memory'] / 1e6:.1f}",
            f"{last['memory'] / 1e6:.1f}",
            f"{found['memory_growth'] / 1e6:+.1f}",
        ),
        *(
            (name, str(first[key]), str(last[key]), f"{found['counted_growth'][key]:+d}")
            for name, key in (
                ("open files", "handles"), ("threads", "threads"), ("hooks on the model", "hooks")
            )
        ),
    ]  # fmt: skip
    caption = (
        f"`{found['command']}`: {found['steps']} steps; growth of memory: median of the last third minus that of the second. The "
        f"same training interrupted {found['stops']} times, each time resumed by a new model, optimizer and trainer: of "
        f"{found['compared']} tensors (factors, moments, fingerprints of bases) {len(found['differing'])} differ, and "
        f"{len(found['changed_bases'])} bases differ."
    )
    header = ("", f"after {first['step']} steps", f"after {last['step']}", "growth")
    return Table(header, tuple(rows), caption)


def distributed_table(found: Mapping[str, Any]) -> Table:
    """Several processes against one, and their exits when one is killed or interrupted."""
    rows = [
        (
            f"{n} processes, compared with one",
            "",
            f"{parts[KeepMoments.path]:.1g}",
            f"{parts[Training.path]:.1g}",
            "",
        )
        for n, parts in found["same"].items()
    ]
    rows += [
        (f"{n} by {way}, compared with {n} by DDP", "", "", "exact" if d == 0 else f"{d:.1g}", "")
        for way, counts in found["ways"].items()
        for n, d in counts.items()
    ]
    rows += [
        (
            f"{one['processes']} by {one['way']}, rank {one['victim']} killed, then "
            f"{one['then']} by {one['then_by']}",
            _codes(one["codes"]), "", _weights(one), f"{one['seconds']:.1f}",
        )
        for one in found["killed"]
    ]  # fmt: skip
    rows += [
        (
            f"SIGTERM to {len(one['codes'])} processes, then as many",
            _codes(one["codes"]), "", _weights(one), f"{one['seconds']:.1f}",
        )
        for one in found["interrupted"]
    ]  # fmt: skip
    rows += [
        (f"{name}, 2 processes", _codes(one["codes"]), "", _weights(one), "")
        for name, one in found["launched"].items()
    ]
    rows += [
        (f"rank 1 is given another {what}", "refused", "", "", "") for what in found["refused"]
    ]
    caption = (
        f"`{found['command']}`. Differences: the largest of a tensor divided by its largest value, from a run of one process; *exact*: bitwise "
        "equal to an undisturbed run of as many processes. Samples are bitwise equal in all. Seconds: until all have exited. Kills "
        "came after the first checkpoint."
    )
    header = ("run", "exit by rank", "C_pre", "weights", "seconds")
    return Table(header, tuple(rows), caption)


def _codes(codes: Iterable[int]) -> str:
    ends = ENDS | {2: "error"}
    return ", ".join(ends.get(code, str(code)) for code in codes)


def _weights(one: Mapping[str, Any]) -> str:
    exact = one["allowed"] == one["difference"] == 0
    return "exact" if exact else f"{one['difference']:.1g}"
