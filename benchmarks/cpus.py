"""Run the test suite with the kernels of other CPUs: `make cpus`.

PyTorch and its libraries choose their kernels by what the CPU offers, and add up in another order
with each. Environment variables make them choose as a lesser CPU would. Kernels that this CPU lacks
cannot run; their lines are skipped, which is said.

    python -m benchmarks.cpus [--short] [arguments of pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

LIBRARIES = {
    "default": {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
}
"""Settings of MKL and oneDNN for each ATEN_CPU_CAPABILITY, in ascending order."""

CASES = [("default", 1), ("avx2", 2), ("avx512", 1), ("avx512", 2)]
"""Capability and number of threads."""

SHORT = [("default", 2)]
NUMERICS = [
    "tests/calibration/test_moments.py",
    "tests/adapters/test_adapter.py",
    "tests/adapters/test_low_rank.py",
    "tests/metrics/test_meter.py",
    "tests/compare/test_methods.py",
    "tests/optim",
    "tests/spectral",
]
"""Tests of `--short`: those whose results depend on rounding."""


def environment(capability: str, threads: int) -> dict[str, str]:
    """Environment of a process with these kernels and number of threads."""
    return {
        **LIBRARIES[capability],
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": str(threads),
        "FOLORA_TEST_THREADS": str(threads),
    }


def main(arguments: list[str]) -> int:
    """Run the suite once for each case. Returns 1 if one failed."""
    short = "--short" in arguments
    arguments = [a for a in arguments if a != "--short"] + (NUMERICS if short else [])
    names = list(LIBRARIES)
    best = torch.backends.cpu.get_cpu_capability().lower()
    failed, lines = False, []
    for capability, threads in SHORT if short else CASES:
        case = f"{capability}, {threads} thread{'s' * (threads > 1)}"
        if best not in names or names.index(capability) > names.index(best):
            lines.append(f"{case}: skipped, this CPU has {best}")
            continue
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            env={**os.environ, **environment(capability, threads)},
            check=False,
        )
        failed = failed or done.returncode != 0
        outcome = "failed" if done.returncode else "passed"
        lines.append(f"{case}: {outcome} in {time.monotonic() - began:.0f} s")
        print(lines[-1], flush=True)
    print(*lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
