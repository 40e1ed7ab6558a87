"""Tables of docs/reliability.md and docs/scaling.md from what the harnesses left behind."""

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
    """How often runs were disturbed, how the attempts ended, and what was lost."""
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
        "byte from the run that nothing disturbed, finished work that was done again, tracebacks, refusals that do "
        f"not name the file. Writes that Python makes in each stage of the run: {writes}; before each of them a "
        "run can be killed."
    )
    header = (
        "trouble",
        "runs",
        "where it came",
        "how the attempts ended",
        "slowest end (s)",
        "lost",
    )
    return Table(header, tuple(rows), caption)


def soak_table(found: Mapping[str, Any]) -> Table:
    """What grew over thousands of steps, and what differs after many stops."""
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
        f"`{found['command']}`: {found['steps']} steps; of memory the median of the last third over that of the second. The "
        f"same training stopped {found['stops']} times, each time gone on with by a new model, optimizer and trainer: of "
        f"{found['compared']} tensors (factors, moments, sketches of bases) {len(found['differing'])} differ, and "
        f"{len(found['changed_bases'])} bases are not what they were."
    )
    header = ("", f"after {first['step']} steps", f"after {last['step']}", "grew by")
    return Table(header, tuple(rows), caption)


def distributed_table(found: Mapping[str, Any]) -> Table:
    """Several processes against one, and what they do when one is killed or told to stop."""
    rows = [
        (
            f"{n} processes against one",
            "",
            f"{parts[KeepMoments.path]:.1g}",
            f"{parts[Training.path]:.1g}",
            "",
        )
        for n, parts in found["same"].items()
    ]
    rows += [
        (f"{n} by {way} against {n} by DDP", "", "", "exact" if d == 0 else f"{d:.1g}", "")
        for way, counts in found["ways"].items()
        for n, d in counts.items()
    ]
    rows += [
        (
            f"{one['processes']} by {one['way']}, number {one['victim']} killed, then "
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
    rows += [(f"process 1 sees another {what}", "refused", "", "", "") for what in found["refused"]]
    caption = (
        f"`{found['command']}`. Largest difference over the largest value of a tensor, from one process, or *exact*: from as "
        "many processes undisturbed, to the bit. Samples are the same to the bit in all. Seconds: until all have ended. Runs of "
        "so many processes were killed after their first checkpoint."
    )
    header = ("what", "how they ended", "C_pre", "weights", "seconds")
    return Table(header, tuple(rows), caption)


def _codes(codes: Iterable[int]) -> str:
    ends = ENDS | {2: "stopped with a word"}
    return ", ".join(ends.get(code, str(code)) for code in codes)


def _weights(one: Mapping[str, Any]) -> str:
    exact = one["allowed"] == one["difference"] == 0
    return "exact" if exact else f"{one['difference']:.1g}"
