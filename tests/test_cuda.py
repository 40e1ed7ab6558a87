"""GPU results match those of the CPU, and GPU-only code works. Run by ``make gpu``, otherwise skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.closeness import assert_near
from support.references import gradients, moment, orthogonal_and_gate, params, reference

from benchmarks.tiny import make_gpt2, make_llama, make_mistral, make_tokenizer, tiny_config
from folora.calibration.engine import HuggingFaceEngine
from folora.calibration.inputs import find_groups, target_layers
from folora.calibration.moments import add_upper_gram, second_moments
from folora.calibration.sampling import sample_sequences
from folora.config import SamplingConfig
from folora.data.rows import batches, text_examples
from folora.optim.fused import FusedSAdam
from folora.optim.sadam import SAdam
from folora.pipeline.planning import plan
from folora.pipeline.run import Run
from folora.pipeline.training import Training
from folora.runtime.artifacts import TENSORS
from folora.runtime.tensors import full_fp32_matmul
from folora.spectral.groups import InputGroup
from folora.spectral.layers import solve
from folora.spectral.moments import Moments

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # warnings depend on the driver
]
GPU = torch.device("cuda")
ROWS = [[1, *range(4, 4 + n)] for n in (3, 11, 7, 2, 19)]
WIDTHS = (33, 8, 33, 64, 17)


def stepped(device: str, kind: type[SAdam] = FusedSAdam, steps: int = 30) -> list[torch.Tensor]:
    """Float32 parameters of several groups after some steps, on the CPU; the last group has no basis."""
    groups: list[dict[str, Any]] = []
    shapes = [(rows, d) for d in WIDTHS for rows in (4, 6)]
    ps = [torch.nn.Parameter(p.to(device)) for p in params(shapes, torch.float32)]
    for number, d in enumerate(WIDTHS):
        basis, gate = orthogonal_and_gate(d, seed=number)
        basis = basis[:, : max(4, d // 2)].float()
        group: dict[str, Any] = {"params": ps[2 * number : 2 * number + 2]}
        if number < len(WIDTHS) - 1:
            group |= {"basis": basis, "gate": gate[: basis.shape[1]].float()}
        groups.append(group)
    optimizer = kind(groups, lr=1e-2, weight_decay=0.1)
    for step in gradients(shapes, steps):
        for p, g in zip(ps, step, strict=True):
            p.grad = g.to(device, torch.float32)
        optimizer.step()
    return [p.detach().cpu() for p in ps]


def furthest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", [SAdam, FusedSAdam])
def test_steps_match_the_reference_on_the_cpu(kind: type[SAdam]) -> None:
    assert furthest(stepped("cuda", kind), stepped("cpu", SAdam)) < 2e-5


def test_the_step_does_not_use_tf32() -> None:
    plain = stepped("cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        allowed = stepped("cuda")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert all(torch.equal(a, b) for a, b in zip(allowed, plain, strict=True))


def test_float64_matches_the_equations() -> None:
    basis, gate = orthogonal_and_gate(17)
    (a,) = params([(4, 17)])
    expected = reference(a.detach(), [g[0] for g in gradients([(4, 17)], 20)], basis, gate, 1e-2)
    p = torch.nn.Parameter(a.detach().to(GPU))
    optimizer = FusedSAdam([{"params": [p], "basis": basis, "gate": gate}], lr=1e-2)
    for (g,) in gradients([(4, 17)], 20):
        p.grad = g.to(GPU)
        optimizer.step()
    assert_near(p.detach().cpu(), expected, roundings=1e5)


@pytest.mark.parametrize("there", ["cuda", "cpu"])
def test_a_state_resumes_on_the_other_device(there: str) -> None:
    here = "cpu" if there == "cuda" else "cuda"
    basis, gate = orthogonal_and_gate(17)
    steps = gradients([(4, 17)], 10)

    def optimizer_on(device: str, p: torch.Tensor) -> tuple[torch.nn.Parameter, SAdam]:
        kind = FusedSAdam if device == "cuda" else SAdam
        own = torch.nn.Parameter(p.detach().to(device, copy=True))
        return own, kind([{"params": [own], "basis": basis.float(), "gate": gate.float()}])

    def drive(p: torch.nn.Parameter, optimizer: SAdam, some: list[list[torch.Tensor]]) -> None:
        for (g,) in some:
            p.grad = g.to(p.device, p.dtype)
            optimizer.step()

    (start,) = params([(4, 17)], torch.float32)
    whole, optimizer = optimizer_on(here, start)
    drive(whole, optimizer, steps)
    first, optimizer = optimizer_on(here, start)
    drive(first, optimizer, steps[:5])
    second, other = optimizer_on(there, first)
    other.load_state_dict(optimizer.state_dict())
    drive(second, other, steps[5:])
    assert furthest([second.detach().cpu()], [whole.detach().cpu()]) < 2e-5


def test_a_compiled_step_matches_an_eager_one() -> None:
    basis, gate = orthogonal_and_gate(64)
    (a,) = params([(8, 64)], torch.float32)
    found = []
    for compiled in (False, True):
        p = torch.nn.Parameter(a.detach().to(GPU))
        optimizer = FusedSAdam([{"params": [p], "basis": basis.float(), "gate": gate.float()}])
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for (g,) in gradients([(8, 64)], 5):
            p.grad = g.to(GPU, torch.float32)
            step()
        found.append(p.detach().cpu())
    assert furthest(found[1:], found[:1]) < 2e-5


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_moments_match_the_cpu(make: Any) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = make().to(device)
        probe = {"input_ids": torch.tensor([[1, 5]]), "attention_mask": torch.ones(1, 2).long()}
        probe = {k: v.to(device) for k, v in probe.items()}
        groups = find_groups(model, target_layers(model, "all-linear"), probe)
        moments = second_moments(model, groups, batches(text_examples(ROWS), 3)).matrices
        found.append([m.cpu() for m in moments.values()])
    assert furthest(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [33, 64, 576])
def test_half_precision_inputs_accumulate_in_float32(dtype: torch.dtype, d: int) -> None:
    """As close to float64, also where sums are much larger than their terms."""
    generator = torch.Generator(GPU).manual_seed(0)
    total = torch.zeros(d, d, device=GPU)
    expected = total.double()
    for _ in range(4):
        rows = torch.randn(4096, d, generator=generator, device=GPU).add(2).to(dtype)
        with full_fp32_matmul():
            add_upper_gram(total, rows)
        expected += rows.double().T @ rows.double()
    assert furthest([total.triu()], [expected.triu()]) < 5e-6


@pytest.mark.parametrize("directions", [None, 4])
def test_spectra_match_the_cpu(directions: int | None) -> None:
    groups = [InputGroup((f"layer{d}",), d) for d in WIDTHS]
    groups = list({g.name: g for g in groups}.values())
    pre, task = (
        Moments({g.name: moment(g.d_in, seed=at + g.d_in) for g in groups}, 1, tuple(groups))
        for at in (0, 50)
    )
    here = solve(pre, task, tau=1e-3, null_rank=2, directions=directions)
    there = solve(pre, task, tau=1e-3, null_rank=2, directions=directions, device=GPU)
    for a, b in zip(here, there, strict=True):
        assert b.basis.device.type == "cpu"  # the device of C_pre
        assert_near(a.gamma, b.gamma)
        assert_near(a.basis.abs(), b.basis.abs(), roundings=1e3, rtol=1e-3)


CONFIG = SamplingConfig(num_sequences=40, min_new_tokens=32, max_new_tokens=40, batch_size=16)


def test_the_calibration_set_matches_the_cpu_at_any_batch_size() -> None:
    """In float32; rounding may change a sampled token on another device, but not with these seeds."""
    expected = sample_sequences(HuggingFaceEngine(make_llama(), 1, [2], CONFIG), 1, [2], CONFIG)
    for size in (5, 64):
        config = CONFIG.replace(batch_size=size)
        found = sample_sequences(
            HuggingFaceEngine(make_llama().to(GPU), 1, [2], config), 1, [2], config
        )
        assert found == expected


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_mistral])
def test_cuda_graph_decoding_matches_generate(make: Any) -> None:
    """In float32, where both use the same attention; a model that cannot be replayed uses `generate`."""
    model = make().to(GPU)
    replays = HuggingFaceEngine(model, 1, [2], CONFIG)
    generates = HuggingFaceEngine(model, 1, [2], CONFIG)
    assert replays.steps or make is not make_llama
    assert not (replays.steps and make is make_mistral)
    generates.steps = False
    assert replays(range(32)) == generates(range(32))
    before = torch.cuda.memory_allocated()  # includes the libraries' memory for graphs
    replays(range(32))
    assert torch.cuda.memory_allocated() <= before  # cache and graph are freed


def test_sampling_with_too_little_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Sampling runs out of memory and still returns the same set, except for rounding in one sequence."""
    config = CONFIG.replace(num_sequences=1024, batch_size=1024)
    model = make_llama(vocab=20000).to(GPU)
    expected = sample_sequences(HuggingFaceEngine(model, 1, [2], config), 1, [2], config)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    room = torch.cuda.memory_reserved(GPU) + 400 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total, 0)
    try:
        found = sample_sequences(HuggingFaceEngine(model, 1, [2], config), 1, [2], config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        torch.cuda.empty_cache()
    assert "half as many" in caplog.text
    same = sum(a == b for a, b in zip(found.calibration, expected.calibration, strict=True))
    assert same > 0.95 * len(expected.calibration)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / Training.path / TENSORS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "training": {"bf16": True}},
        {"spectrum": {"directions": "all"}},
        {"training": {"gradient_checkpointing": True}, "method": "folora-kl"},
        {"method": {"name": "folora", "init": "null_space"}},
    ],
    ids=str,
)
def test_a_run_matches_the_cpu_and_resumes_exactly(
    changes: dict[str, Any], model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """As on the CPU where the precision is the same; a resumed run is bitwise equal."""
    named = {"model": str(model_folder), "dataset": str(rows_file), "output": str(tmp_path / "gpu")}
    config = tiny_config(**named, **changes).changed({"device": "cuda"})
    Run(config).run()
    found = weights(tmp_path / "gpu")
    assert all(t.device.type == "cpu" and bool(t.isfinite().all()) for t in found.values())

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "gpu", again)
    shutil.rmtree(again / Training.path)
    shutil.rmtree(again / "4-training" / "checkpoint-6")
    Run(config.changed({"output": str(again)})).run()
    resumed = weights(again)
    assert all(torch.equal(resumed[name], found[name]) for name in found)

    # Signs of eigenvectors are arbitrary, and so is an initialization that depends on them.
    if config.dtype == "float32" and config.method.init == "eigen":
        cpu = config.changed({"device": "cpu", "output": str(tmp_path / "cpu")})
        Run(cpu).run()
        assert Run(config).samples() == Run(cpu).samples()
        expected = weights(tmp_path / "cpu")
        assert furthest([found[n] for n in expected], [*expected.values()]) < 5e-2


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_with_a_quantized_base(bits: str, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    named = {"model": str(tmp_path / "model"), "dataset": str(rows_file)}
    config = tiny_config(**named, output=str(tmp_path / "run"), dtype="bfloat16")
    Run(config.changed({"device": "cuda", "quantize": bits})).run()
    assert all(bool(t.isfinite().all()) for t in weights(tmp_path / "run").values())


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_one_process_started_by_a_launcher(
    way: str, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """With NCCL and unmodified Accelerate; two processes would need two GPUs."""
    config = tiny_config(model=str(model_folder), dataset=str(rows_file)).changed(
        {"device": "cuda"}
    )
    Run(config.changed({"output": str(tmp_path / "alone")})).run()
    file = tmp_path / "config.yaml"
    file.write_text(config.changed({"output": str(tmp_path / "launched")}).to_yaml())
    asked = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    } if way == "FSDP2" else {}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1",
         "--standalone", "-m", "folora", "run", "--config", str(file)],
        env=os.environ | asked, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = weights(tmp_path / "launched"), weights(tmp_path / "alone")
    assert furthest([found[n] for n in expected], [*expected.values()]) < 1e-3


def test_a_plan_uses_the_memory_of_the_gpu(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    named = {"model": str(model_folder), "dataset": str(rows_file), "output": str(tmp_path)}
    found = plan(tiny_config(**named).changed({"device": "cuda"}))
    assert 0 < found.free <= torch.cuda.get_device_properties(GPU).total_memory
