"""Which defaults? Trains one model under many settings and reads the meter along the way.

    python -m benchmarks.sweep --model DIR --rows FILE --plan PLAN.yaml --output OUT.jsonl

Samples and statistics are made once and kept beside the output. The plan is a YAML list of arms; an
arm is a name and changes to the base config (``spectrum.tau: 1.0e-4``). Every arm leaves a line of
JSON with its settings and its readings; arms that already have one are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.world.language import World
from benchmarks.world.score import score_skills
from folora.config import FoLoraConfig
from folora.data import load_rows, pad_batch, prepare_task, text_examples
from folora.meter import Meter, total_norm, update_norms
from folora.preparation import (
    attach_configured,
    group_options,
    groups_of,
    measure,
    param_groups,
)
from folora.sadam import SAdam
from folora.sampling import HuggingFaceEngine, eos_token_ids, sample, start_token_id
from folora.solving import solve


def merged(config: FoLoraConfig, changes: dict[str, Any]) -> FoLoraConfig:
    """A config with dotted names changed."""
    values = config.to_dict()
    for name, value in changes.items():
        *sections, last = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[last] = value
    return FoLoraConfig.from_dict(values)


def train(model: Any, optimizer: SAdam, examples: list[Any], config: FoLoraConfig) -> Any:
    """Yield the step number after each step of a plain loop with warm-up and constant rate."""
    training = config.training
    generator = torch.Generator().manual_seed(training.seed)
    order: list[int] = []
    peak = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(training.max_steps):
        if len(order) < training.batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        chosen, order = order[: training.batch_size], order[training.batch_size :]
        warm = min(1.0, (step + 1) / max(1.0, training.warmup_ratio * training.max_steps))
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * warm
        loss = model(**pad_batch([examples[i] for i in chosen], 0)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], training.max_grad_norm
        )
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def main() -> None:
    """Run every arm of the plan that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    plan = yaml.safe_load(Path(args.plan).read_text())
    base = merged(FoLoraConfig(), plan["base"])
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = (
        {json.loads(line)["name"] for line in output.read_text().splitlines()}
        if output.exists()
        else set()
    )

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task = prepare_task(load_rows(args.rows), tokenizer, base.data)

    world_file = Path(args.model) / "world.json"
    world = World(json.loads(world_file.read_text())["seed"]) if world_file.exists() else None

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=base.dtype).eval()

    cache = output.with_suffix(".stats.pt")
    if cache.exists():
        groups, pre, on_task, held_out = torch.load(cache, weights_only=False)
    else:
        model = load()
        start = start_token_id(tokenizer, base.sampling.start_token)
        # Documents of the world are shorter than a sample may be, so samples run through many.
        eos = [] if world else eos_token_ids(model, tokenizer)
        began = time.time()
        proxies = sample(
            HuggingFaceEngine(model, start, eos, base.sampling), start, eos, base.sampling
        )
        print("sampled", time.time() - began, proxies.rejected, flush=True)
        groups = groups_of(model, base.adapter.target_modules, start)
        pre = measure(model, groups, text_examples(proxies.calibration), 8, "C_pre").matrices
        chosen = task.train[: base.statistics.task_examples]
        on_task = measure(model, groups, chosen, 8, "C_task").matrices
        print("measured", time.time() - began, flush=True)
        held_out = proxies.held_out
        torch.save((groups, pre, on_task, held_out), cache)
    meter = Meter(held_out, task.held_out)
    solved: dict[Any, Any] = {}
    for arm in plan["arms"]:
        if arm["name"] in done:
            continue
        config = merged(base, {k: v for k, v in arm.items() if k != "name"})
        key = (config.spectrum.tau, config.adapter.r if config.adapter.init == "null_space" else 0)
        began = time.time()
        if key not in solved:
            solved.clear()
            solved[key] = solve(groups, pre, on_task, tau=key[0], null_rank=key[1])
        solving = time.time() - began
        model = attach_configured(load(), solved[key], config)
        optimizer = SAdam(param_groups(model, solved[key], **group_options(config)))
        readings = []
        began = time.time()
        for step in train(model, optimizer, task.train, config):
            if step in plan["read_at"]:
                norm = total_norm(update_norms(model, solved[key]))
                kept = score_skills(model, tokenizer, world) if world else {}
                readings.append(
                    {"step": step, **asdict(meter.read(model)), **asdict(norm), "kept": kept}
                )
                model.train()
        line = {
            "name": arm["name"],
            "arm": arm,
            "readings": readings,
            "solve_s": solving,
            "train_s": time.time() - began,
        }
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            arm["name"],
            [(r["step"], round(r["task_loss"], 4), round(r["kl"], 5)) for r in readings],
            round(time.time() - began),
            flush=True,
        )


if __name__ == "__main__":
    main()
