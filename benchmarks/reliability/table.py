"""Tables of docs/reliability.md from what chaos and soak left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.reliability.chaos import KINDS
from folora.report import Table

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
