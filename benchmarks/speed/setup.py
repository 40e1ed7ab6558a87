"""Time of the set-up: sampling, second moments, eigenproblems, each measured alternately with a baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.speed.shapes import Shape, random_groups, random_model
from benchmarks.speed.steps import random_batch
from folora.calibration.engine import HuggingFaceEngine
from folora.calibration.moments import second_moments
from folora.config import SamplingConfig
from folora.spectral.groups import InputGroup
from folora.spectral.layers import solve
from folora.spectral.moments import Moments

# CorDA matches names before it wraps the layers, and "all-linear" matches none.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

WARM_UP = 2048  # up to this width the first solve is not counted

Times = dict[str, list[float]]
"""Seconds of each piece of work, one per round."""


def alternated(work: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Seconds of each piece of work, forwards in one round and backwards in the next."""
    times: Times = {name: [] for name in work}
    for number in range(rounds):
        names = list(work) if number % 2 == 0 else list(work)[::-1]
        for name in names:
            began = time.perf_counter()
            work[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return times


def statistics_times(model: PreTrainedModel, tokens: int, rounds: int) -> Times:
    """A forward pass over `tokens` tokens, and the same with both second moments."""
    groups = random_groups(model)
    ids = random_batch(tokens, 256, model.device)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)
    ]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch, use_cache=False)

    forward()
    measure = partial(second_moments, model, groups, batches)
    return alternated({"forward pass": forward, "statistics": measure}, rounds)


def solve_times(d: int, r: int, device: torch.device, rounds: int, whole: bool = True) -> Times:
    """Eigenproblem of one input: the first r eigenvectors, and all if `whole`; one thread."""
    generator = torch.Generator(device).manual_seed(0)
    groups = (InputGroup(("layer",), d),)

    def moment() -> Moments:
        x = torch.randn(2 * d, d, generator=generator, device=device)
        x *= torch.logspace(0, -2, d, device=device)[
            torch.randperm(d, generator=generator, device=device)
        ]
        return Moments({"layer": x.T @ x / len(x)}, len(x), groups)

    pre, task = moment(), moment()
    found = partial(solve, pre, task, tau=1e-3)
    kinds = {"r": r, "all": None} if whole else {"r": r}
    for directions in kinds.values() if d <= WARM_UP else ():
        found(directions=directions)
    return alternated({k: partial(found, directions=n) for k, n in kinds.items()}, rounds)


def peer_times(shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int) -> Times:
    """Preprocessing of PEFT's CorDA and OSF, on one block."""
    ids = random_batch(tokens, 256, device)

    def corda() -> None:
        model = random_model(shape, 1, torch.float32, device)
        config = LoraConfig(
            r=shape.r,
            target_modules=LINEAR,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="kpm"),
            task_type="CAUSAL_LM",
        )

        @torch.no_grad()
        def run() -> None:
            for row in ids.split(1):  # it takes no batches
                model(input_ids=row)

        preprocess_corda(model, config, run_model=run)
        get_peft_model(model, config)

    def osf() -> None:
        model = random_model(shape, 1, dtype, device)
        get_peft_model(model, OSFConfig(target_modules=LINEAR, effective_rank=shape.r))

    return alternated({"PEFT's CorDA": corda, "PEFT's OSF": osf}, 1)


def sampling_rates(
    shape: Shape,
    vocabulary: int,
    sequences: int,
    tokens: int,
    few: int,
    dtype: torch.dtype,
    device: torch.device,
    blocks: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Tokens per second of folora's sampling, and of ``generate`` called for one sequence at a time."""
    model = random_model(shape, blocks, dtype, device, vocabulary)
    config = SamplingConfig(
        num_sequences=max(32, sequences), min_new_tokens=tokens, max_new_tokens=tokens
    )
    engine = HuggingFaceEngine(model, 1, [2], config)
    start = torch.ones(1, 1, dtype=torch.long, device=device)
    asked = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip

    @torch.inference_mode()
    def loop() -> None:
        for _ in range(few):
            model.generate(  # type: ignore[operator]
                input_ids=start, attention_mask=torch.ones_like(start), generation_config=asked
            )

    times = alternated({"folora": lambda: engine(range(sequences)), "loop": loop}, rounds)
    count = {"folora": sequences * tokens, "loop": few * tokens}
    return {name: [count[name] / t for t in seconds] for name, seconds in times.items()}
