"""Tables of docs/speed.md and its appendix, from the results of `benchmarks.speed`."""

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
STEPS_OF = (4096, 65536)  # tokens per step that times are extrapolated to
RANK = 16


def same_forward(mode: str) -> bool:
    """Whether a mode has plain LoRA's forward and backward pass and differs in the optimizer only."""
    return MODES[mode].start in ("eigen", "kaiming") and not MODES[mode].protect


def step_table(result: Mapping[str, Any]) -> Table:
    """Time and memory of a step by mode, relative to LoRA's."""
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
    extrapolated = [f"at {tokens // 1024}k tokens (%)" for tokens in STEPS_OF]
    header = (
        "mode", "optimizer (ms)", "step over LoRA (%)", *extrapolated, "peak memory over LoRA (%)",
        "eigenvectors, whole model",
    )  # fmt: skip
    threads = result["machine"].get("threads")
    on = result["machine"]["device"] + (f", {threads} threads" if threads else "")
    caption = (
        f"{result['shape']}, r {shape.r}, {steps['blocks']} of {shape.blocks} blocks, {steps['tokens']} "
        f"tokens per step, {steps['dtype']}, on {on}. Median (quartiles) of "
        f"{len(modes[BASELINE]['step_seconds'])} rounds, ratios within a round. Extrapolated to other numbers of tokens: "
        "forward and backward in proportion, the optimizer as measured. Memory: largest sum of tensors alive at once. "
        f"`{result['command']}`"
    )
    return Table(header, tuple(rows), caption)


def cost_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Overhead over LoRA by shape and device: step time and peak memory, by default and with all eigenvectors."""
    rows = []
    for result in results:
        of_mode = dict(zip(result["steps"]["modes"], step_table(result).rows, strict=True))
        rows.append((_named(result), *of_mode["folora"][3:6], *of_mode["folora-all"][3:6]))
    overhead = [*(f"step, {tokens // 1024}k tokens" for tokens in STEPS_OF), "memory"]
    header = ("shape", *overhead, *(f"all: {title}" for title in overhead))
    caption = (
        "Overhead over PEFT's LoRA with fused AdamW, in %: step time at so many tokens per step, and peak memory; by "
        "default (r eigenvectors) and with all eigenvectors."
    )
    return Table(header, tuple(rows), caption)


def setup_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Second moments relative to a forward pass, and PEFT's preprocessing; one block."""
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
        "shape", "forward pass (ms / 1000 tokens)", "second moments over it (%)",
        "PEFT's CorDA before training (s)", "PEFT's OSF (s)",
    )  # fmt: skip
    return Table(header, tuple(rows), "One block of each; median (quartiles).")


def whole_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The set-up as a whole beside an epoch of training, from `benchmarks.speed.whole`."""
    rows = []
    for result in results:
        seconds, device = result["seconds"], result["machine"]["device"]
        parts = [
            seconds["Samples"] + seconds["KeepMoments"],
            seconds["TaskMoments"],
            seconds["Solved"],
        ]
        rows.append(
            (
                f"{result['model']}, {result['target']}, {result['dtype']} ({device})",
                *(f"{part:.0f}" for part in parts),
                f"{result['epoch_seconds']:.0f} ({result['trained_steps']} of {result['epoch_steps']} steps)",
                *(f"{100 * result[share]:.1f}" for share in ("first_share", "next_share")),
            )
        )  # fmt: skip
    header = (
        "model and rows", "samples and C_pre (s)", "C_task (s)", "eigenproblems (s)", "an epoch (s)",
        "first task (% of the epoch)", "next task (%)",
    )  # fmt: skip
    commands = dict.fromkeys(f"`{result['command']}`" for result in results)
    return Table(header, tuple(rows), f"Measured once each. {', '.join(commands)}")


def solve_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds of an eigenproblem by width."""
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
    header = ("width", "r", "r eigenvectors (s)", "all (s)", "ratio")
    return Table(header, tuple(rows), "One shared input, one thread; median (quartiles).")


def sampling_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Tokens per second of sampling, and of `generate` in a loop."""
    rows = []
    for result in results:
        rates = result["setup"].get("sampling")
        if rates:
            times = [a / b for a, b in zip(rates["folora"], rates["loop"], strict=True)]
            row = (_spread(rates["folora"], ".0f"), _spread(rates["loop"], ".0f"))
            rows.append((_named(result), *row, _spread(times, ".1f")))
    header = ("shape", "folora (tokens/s)", "loop over `generate` (tokens/s)", "ratio")
    caption = "All blocks and a vocabulary of 49152; the loop decodes one sequence at a time."
    return Table(header, tuple(rows), caption)


def scale_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes by model, computed from its widths, and seconds of the eigenproblems by the cube of the width."""
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
        "model", f"eigenvectors, r {RANK}", "r 128 (SmolLM2: 16)", "all",
        "base file", "second moments over forward, operations (%)",
        "solve, r", "solve, all",
    )  # fmt: skip
    caption = (
        "Bytes of the whole model, one basis per shared input; C_pre and C_task each take as much as all eigenvectors. "
        "Solve: on one thread of the CPU above, from the measured widths; other widths are extrapolated by "
        "the cube from the widest measured one."
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
    """How much longer than LoRA's a step of `times` the measured tokens takes, as a fraction."""
    own, lora = (median(m["optimizer_seconds"]) for m in (mode, base))
    return (forward * times + own) / (base_forward * times + lora) - 1


def _solve_seconds(shape: Shape, times: Mapping[int, float]) -> float:
    """All inputs of a model one after the other; unmeasured widths are extrapolated by the cube."""
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
