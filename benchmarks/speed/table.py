"""Tables of docs/speed.md from what `benchmarks.speed` left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.speed.shapes import SHAPES, Shape
from benchmarks.speed.steps import BASELINE, MODES
from folora.calibration.moments import GRAM_SHARE
from folora.compare.tables import NONE, Table

LARGER = {
    "32B (Qwen3)": Shape(5120, 25600, 64, 8, 128, 64, 32.8e9, 128),
    "70B (LLaMA 3)": Shape(8192, 28672, 64, 8, 128, 80, 70.6e9, 128),
}
STEPS_OF = (4096, 65536)  # tokens a step, to which times are carried over
RANK = 16


def same_forward(mode: str) -> bool:
    """Whether a mode's forward and backward pass are plain LoRA's, and only the optimizer differs."""
    return MODES[mode].start in ("eigen", "kaiming") and not MODES[mode].protect


def step_table(result: Mapping[str, Any]) -> Table:
    """Time and memory of a step by mode, over LoRA's."""
    steps, shape = result["steps"], SHAPES[result["shape"]]
    modes = steps["modes"]
    passes = {m: _passes(modes[m]) for m in modes}
    shared = median(t for m in modes if same_forward(m) for t in passes[m])
    rows = []
    for name, found in modes.items():
        ratios = [
            own / base
            for own, base in zip(
                found["step_seconds"], modes[BASELINE]["step_seconds"], strict=True
            )
        ]
        forward = shared if same_forward(name) else median(passes[name])
        at = [
            _over(forward, found, shared, modes[BASELINE], tokens / steps["tokens"])
            for tokens in STEPS_OF
        ]
        own_bytes = found["peak_bytes"] / modes[BASELINE]["peak_bytes"] - 1
        rows.append(
            (
                MODES[name].about,
                _spread([1000 * s for s in found["optimizer_seconds"]], ".1f"),
                _spread([100 * (r - 1) for r in ratios], "+.1f"),
                *(f"{100 * x:+.2f}" for x in at),
                f"{100 * own_bytes:+.1f}",
                _size(found["basis_bytes"] * shape.blocks / steps["blocks"]),
            )
        )
    carried = [f"at {tokens // 1024}k tokens (%)" for tokens in STEPS_OF]
    header = (
        "mode", "optimizer (ms)", "step over LoRA (%)", *carried, "peak memory over LoRA (%)",
        "bases, whole model",
    )  # fmt: skip
    threads = result["machine"].get("threads")
    on = result["machine"]["device"] + (f", {threads} threads" if threads else "")
    caption = (
        f"{result['shape']}, r {shape.r}, {steps['blocks']} of {shape.blocks} blocks, {steps['tokens']} "
        f"tokens a step, {steps['dtype']}, on {on}. Median (quartiles) of "
        f"{len(modes[BASELINE]['step_seconds'])} rounds, ratios within a round. Carried over: forward and "
        "backward as long as the tokens, the optimizer as measured. Memory: tensors alive at once. "
        f"`{result['command']}`"
    )
    return Table(header, tuple(rows), caption)


def setup_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Statistics beside a forward pass, and PEFT's preprocessing; one block."""
    rows = []
    for result in results:
        setup = result["setup"]
        forward = setup["statistics"]["forward pass"]
        over = [s / f - 1 for s, f in zip(setup["statistics"]["statistics"], forward, strict=True)]
        peers = setup.get("peers", {})
        rows.append(
            (
                _named(result),
                _spread([1e6 * f / setup["tokens"] for f in forward], ".0f"),
                _spread([100 * x for x in over], "+.0f"),
                *(_spread(peers.get(peer, []), ".1f") for peer in ("PEFT's CorDA", "PEFT's OSF")),
            )
        )
    header = (
        "shape", "forward pass (ms / 1000 tokens)", "statistics over it (%)",
        "PEFT's CorDA before training (s)", "PEFT's OSF (s)",
    )  # fmt: skip
    return Table(header, tuple(rows), "One block of each; median (quartiles).")


def solve_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds of a solve by width."""
    rows = [
        (
            str(d),
            str(SHAPES[result["shape"]].r),
            *(_spread(times.get(which, []), ".2f") for which in ("r", "all")),
            f"{median(times['all']) / median(times['r']):.1f}" if "all" in times else NONE,
        )
        for result in results
        for d, times in sorted(result["setup"]["solve"].items(), key=lambda item: int(item[0]))
    ]
    header = ("width", "r", "first r directions (s)", "all (s)", "times")
    return Table(header, tuple(rows), "One shared input, one thread; median (quartiles).")


def sampling_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Tokens a second of sampling, beside generate in a loop."""
    rows = []
    for result in results:
        rates = result["setup"].get("sampling")
        if rates:
            times = [a / b for a, b in zip(rates["folora"], rates["loop"], strict=True)]
            row = (_spread(rates["folora"], ".0f"), _spread(rates["loop"], ".0f"))
            rows.append((_named(result), *row, _spread(times, ".1f")))
    header = ("shape", "folora (tokens/s)", "loop over `generate` (tokens/s)", "times")
    caption = "All blocks and a vocabulary of 49152; the loop decodes one sequence at a time."
    return Table(header, tuple(rows), caption)


def scale_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes by model, from its widths alone, and seconds of the solve by the cube of the width."""
    by_width = {
        which: {
            int(d): median(times[which])
            for result in results
            for d, times in result["setup"]["solve"].items()
            if which in times
        }
        for which in ("r", "all")
    }
    rows = []
    for name, shape in {**SHAPES, **LARGER}.items():
        seconds = [_solve_seconds(shape, times) for times in by_width.values()]
        moments = shape.basis_bytes(4)
        rows.append(
            (
                name,
                _size(shape.basis_bytes(4, RANK)),
                _size(shape.basis_bytes(4, shape.r)),
                _size(moments),
                _size(moments / 2),
                f"{100 * GRAM_SHARE * moments / 4 / shape.parameters:.0f}",
                *(_time(s) for s in seconds),
            )
        )
    header = (
        "model", f"bases, r {RANK}", "bases, r 128 (SmolLM2: 16)", "all",
        "base file", "statistics over forward, operations (%)",
        "solve, r", "solve, all",
    )  # fmt: skip
    caption = (
        "Bytes of the whole model, one basis a shared input; C_pre and C_task take as much as all bases, "
        "each. Solve: on one thread of the machine above, by the times of the widths, and for others by "
        "the cube of the width from the widest that was measured."
    )
    return Table(header, tuple(rows), caption)


def _passes(mode: Mapping[str, Any]) -> list[float]:
    pairs = zip(mode["step_seconds"], mode["optimizer_seconds"], strict=True)
    return [step - optimizer for step, optimizer in pairs]


def _over(
    forward: float,
    mode: Mapping[str, Any],
    base_forward: float,
    base: Mapping[str, Any],
    times: float,
) -> float:
    """Share that a step of so many times the measured tokens takes more than LoRA's."""
    own, lora = (median(m["optimizer_seconds"]) for m in (mode, base))
    return (forward * times + own) / (base_forward * times + lora) - 1


def _solve_seconds(shape: Shape, times: Mapping[int, float]) -> float:
    """All inputs of a model one after the other; widths that were not measured by the cube."""
    widest = max(times)
    widths = (shape.hidden, shape.heads * shape.head, shape.hidden, shape.inner)
    each = (times.get(d, times[widest] * (d / widest) ** 3) for d in widths)
    return shape.blocks * sum(each)


def _named(result: Mapping[str, Any]) -> str:
    return f"{result['shape']}, {result['steps']['dtype']} ({result['machine']['device']})"


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return NONE
    if len(values) == 1:
        return f"{values[0]:{form}}"
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
