"""Time and memory of folora compared with LoRA: ``python -m benchmarks.speed``; no network, no data.

Runs every shape with as many blocks as fit, and writes a JSON file each to ``benchmarks/results/speed``, from
which ``make results`` makes docs/speed.md. Existing results that have all modes are not measured again.
"""

from __future__ import annotations

import argparse
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.setup import peer_times, sampling_rates, solve_times, statistics_times
from benchmarks.speed.shapes import SHAPES, random_model
from benchmarks.speed.steps import MODES, Contender, race, random_batch
from folora.errors import ConfigError, nearest
from folora.runtime.artifacts import software_versions
from folora.runtime.loading import fast_dtype
from folora.runtime.progress import progress
from folora.runtime.storage import read_json, write_json

FORMAT = "speed/1"
LENGTH = 512  # tokens a row
DTYPES = ("bfloat16", "float32")
# Default blocks, tokens per step and rounds.
FITTING = {
    "cpu": {
        "smollm2-135m": (4, 4096, 7),
        "qwen3-1.7b": (1, 2048, 5),
        "llama2-7b": (1, 1024, 3),
    },
    "cuda": {
        "smollm2-135m": (30, 16384, 11),
        "qwen3-1.7b": (28, 8192, 11),
        "llama2-7b": (8, 8192, 11),
    },
}
# Largest width to solve for r eigenvectors, and for all; beyond it a solve takes many minutes.
WIDEST = {"cpu": (4096, 4096), "cuda": (16384, 4096)}
# Sequences, tokens per sequence, and the number of them decoded by the loop.
SAMPLED = {"cpu": (64, 64, 4), "cuda": (1024, 64, 2)}
SAMPLED_VOCABULARY = 49152


def machine(device: torch.device) -> dict[str, Any]:
    """The machine of a measurement."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")),
        platform.processor(),
    )
    return {"device": model, "threads": torch.get_num_threads()}


def measure_steps(
    name: str,
    blocks: int,
    tokens: int,
    rounds: int,
    modes: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Measure steps of all modes on one shape."""
    shape, ids = SHAPES[name], random_batch(tokens, LENGTH, device)
    found: dict[str, dict[str, Any]] = {}
    with progress(f"{name}: memory", len(modes)) as tick:
        for mode in modes:  # one at a time, so that no other is counted
            contender = Contender(MODES[mode], shape, blocks, dtype, device)
            found[mode] = {
                "basis_bytes": contender.basis_bytes,
                "peak_bytes": contender.peak_bytes(ids),
            }
            del contender
            tick()
    contenders = {mode: Contender(MODES[mode], shape, blocks, dtype, device) for mode in modes}
    with progress(f"{name}: rounds", rounds + 1) as tick:
        race(contenders.values(), ids, rounds, tick)
    for mode, contender in contenders.items():
        found[mode] |= {
            "step_seconds": contender.step_seconds,
            "optimizer_seconds": contender.optimizer_seconds,
        }
    kind = str(dtype).removeprefix("torch.")
    return {"blocks": blocks, "tokens": ids.numel(), "dtype": kind, "modes": found}


def measure_setup(
    name: str, tokens: int, rounds: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Measure sampling, second moments and eigenproblems on one block of a shape."""
    shape = SHAPES[name]
    model = random_model(shape, 1, dtype, device)
    widest, widest_whole = WIDEST[device.type]
    found: dict[str, Any] = {
        "tokens": tokens,
        "statistics": statistics_times(model, tokens, rounds),
        "solve": {
            str(d): solve_times(d, shape.r, device, 1 if d > 2048 else 3, d <= widest_whole)
            for d in sorted({shape.hidden, shape.inner})
            if d <= widest
        },
    }
    del model
    if name == "smollm2-135m":
        found["sampling"] = sampling_rates(
            shape,
            SAMPLED_VOCABULARY,
            *SAMPLED[device.type],
            dtype,
            device,
            shape.blocks,
            3,
        )
    if shape.inner <= widest_whole:
        found["peers"] = peer_times(shape, dtype, device, tokens)
    return found


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    found = argparse.ArgumentParser(
        description="Measure time and memory of folora compared with LoRA."
    )
    found.add_argument("--shapes", nargs="+", default=[*SHAPES])
    found.add_argument("--modes", nargs="+", default=[*MODES])
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the base; default: bfloat16, or float32 on a CPU without it",
    )
    found.add_argument("--blocks", type=int, help="default: as many as fit")
    found.add_argument("--tokens", type=int, help="per step; default: by shape and device")
    found.add_argument("--rounds", type=int)
    found.add_argument("--threads", type=int, help="of torch; default: all cores")
    found.add_argument("--skip-setup", action="store_true")
    found.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _check(options.shapes, [*SHAPES])
    _check(options.modes, [*MODES])
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype(torch.bfloat16, device)
    for name in options.shapes:
        path = options.output / f"{device.type}-{name}.json"
        blocks, tokens, rounds = FITTING[device.type][name]
        rounds = options.rounds or rounds
        tokens = options.tokens or tokens
        result = read_json(path) if path.exists() else {}
        if not set(options.modes) <= result.get("steps", {"modes": {}})["modes"].keys():
            result = {
                "format": FORMAT,
                "command": f"python -m benchmarks.speed {shlex.join(given)}".strip(),
                "machine": machine(device),
                "versions": software_versions(),
                "shape": name,
                "steps": measure_steps(
                    name, options.blocks or blocks, tokens, rounds, options.modes, dtype, device
                ),
            }
            write_json(path, result)
        if "setup" not in result and not options.skip_setup:
            same = getattr(torch, result["steps"]["dtype"])
            setup = measure_setup(name, tokens, rounds, same, device)
            write_json(path, {**result, "setup": setup})
        print(path)


def _check(words: Sequence[str], known: Sequence[str]) -> None:
    for word in words:
        if word not in known:
            raise ConfigError(f"unknown {word!r}{nearest(word, known)}; known: {', '.join(known)}")


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    main()
