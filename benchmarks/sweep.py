"""Which defaults? Trains one model under many settings and reads the meter along the way.

    python -m benchmarks.sweep --model DIR --task word_problems --plan PLAN.yaml --output OUT.jsonl

The model is a folder: SmolLM2 as `demo.model` makes it, or a world of `benchmarks.world.pretrain`. Tasks
are ``word_problems``, a world's own (``shift``, ``instrument``, ``difference``), or a file of rows.
Samples and statistics are made once and kept beside the output. The plan is YAML: a base config, when to
read, and arms, each a name and changes by dotted name. Every arm leaves a line of JSON with its settings
and readings; arms that already have one are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.world import language
from benchmarks.world.score import score_skills
from demo.word_problems import split
from folora.activations import InputGroup
from folora.artifacts import read_artifact, software_versions, write_artifact
from folora.config import FoLoraConfig
from folora.data import Example, Row, load_rows, pad_batch, prepare_task, text_examples
from folora.meter import Meter, total_norm, update_norms
from folora.preparation import (
    attach_configured,
    group_options,
    groups_of,
    measure,
    null_rank,
    param_groups,
)
from folora.sadam import SAdam
from folora.sampling import (
    HuggingFaceEngine,
    ProxySet,
    eos_token_ids,
    sample_to_folder,
    start_token_id,
)
from folora.solving import GroupBasis, solve


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


def rows_of(task: str, world: language.World | None) -> list[Row]:
    """Training rows of a named task or of a file."""
    if task == "word_problems":
        return list(split(600, 64, seed=0)[0])
    if world and task in language.tasks(world):
        train = language.tasks(world)[task].train
        repeated = train * max(1, 300 // len(train))  # facts are few
        return [{**row, "prompt": "<bos>" + row["prompt"]} for row in repeated]
    return load_rows(task)


def train(
    model: Any, optimizer: SAdam, examples: list[Example], config: FoLoraConfig
) -> Iterator[int]:
    """Plain loop with warm-up and constant rate; yields the number of steps taken."""
    training = config.training
    generator = torch.Generator().manual_seed(training.seed)
    order: list[int] = []
    peak = [group["lr"] for group in optimizer.param_groups]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step in range(training.max_steps):
        if len(order) < training.batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        chosen, order = order[: training.batch_size], order[training.batch_size :]
        warm = min(1.0, (step + 1) / max(1.0, training.warmup_ratio * training.max_steps))
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * warm
        model(**pad_batch([examples[i] for i in chosen], 0)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


class Stage:
    """One model and task with everything that all arms share."""

    def __init__(self, model: Path, task: str, base: FoLoraConfig, cache: Path) -> None:
        self.folder, self.base, self.cache = model, base, cache
        world_file = model / "world.json"
        self.world = (
            language.World(json.loads(world_file.read_text())["seed"])
            if world_file.exists()
            else None
        )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.task = prepare_task(rows_of(task, self.world), self.tokenizer, base.data)
        proxies = self._proxies()
        self.groups = self._statistics(proxies)
        self.meter = Meter(proxies.held_out, self.task.held_out)

    def load(self) -> Any:
        """The base model, afresh."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.base.dtype).eval()

    def solve(self, config: FoLoraConfig) -> list[GroupBasis]:
        """The bases for one tau and start."""
        return solve(
            self.groups,
            self.pre,
            self.on_task,
            tau=config.spectrum.tau,
            null_rank=null_rank(config),
        )

    def run(self, config: FoLoraConfig, bases: list[GroupBasis], read_at: list[int]) -> Any:
        """Train one arm; the readings on the way."""
        model = attach_configured(self.load(), bases, config)
        optimizer = SAdam(param_groups(model, bases, **group_options(config)))
        readings = []
        for step in train(model, optimizer, self.task.train, config):
            if step in read_at:
                norm = total_norm(update_norms(model, bases))
                kept = score_skills(model, self.tokenizer, self.world) if self.world else {}
                reading = asdict(self.meter.read(model))
                readings.append({"step": step, **reading, **asdict(norm), "kept": kept})
        return readings

    def _proxies(self) -> ProxySet:
        model = self.load()
        start = start_token_id(self.tokenizer, self.base.sampling.start_token)
        # Documents of a world are shorter than a sample may be, so samples run through many.
        eos = [] if self.world else eos_token_ids(model, self.tokenizer)
        engine = HuggingFaceEngine(model, start, eos, self.base.sampling)
        self.start = start
        facts = {"model": str(self.folder)}
        return sample_to_folder(
            lambda: engine, start, eos, self.base.sampling, facts, self.cache / "samples"
        )

    def _statistics(self, proxies: ProxySet) -> list[InputGroup]:
        path = self.cache / "statistics"
        if not path.exists():
            model = self.load()
            groups = groups_of(model, self.base.adapter.target_modules, self.start)
            texts = text_examples(proxies.calibration)
            rows = self.task.train[: self.base.statistics.task_examples]
            pre = measure(model, groups, texts, 8, "C_pre").matrices
            task = measure(model, groups, rows, 8, "C_task").matrices
            tensors = {f"pre/{k}": v for k, v in pre.items()}
            tensors |= {f"task/{k}": v for k, v in task.items()}
            write_artifact(path, "sweep", tensors, {"groups": [[g.layers, g.d_in] for g in groups]})
        artifact = read_artifact(path, "sweep")
        self.pre, self.on_task = (
            {k.split("/", 1)[1]: v for k, v in artifact.tensors.items() if k.startswith(part)}
            for part in ("pre/", "task/")
        )
        return [InputGroup(tuple(layers), d_in) for layers, d_in in artifact.manifest["groups"]]


def main() -> None:
    """Run every arm of the plan that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--plan", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text())
    base = merged(FoLoraConfig(), plan["base"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    stage = Stage(args.model, args.task, base, args.output.with_suffix(".cache"))
    solved: tuple[Any, list[GroupBasis]] = (None, [])
    for arm in plan["arms"]:
        if arm["name"] in done:
            continue
        config = merged(base, {k: v for k, v in arm.items() if k != "name"})
        key = (config.spectrum.tau, null_rank(config))
        if solved[0] != key:
            solved = (key, stage.solve(config))
        began = time.monotonic()
        readings = stage.run(config, solved[1], plan["read_at"])
        line = {
            "name": arm["name"],
            "task": args.task,
            "arm": arm,
            "readings": readings,
            "seconds": round(time.monotonic() - began),
            "versions": software_versions(),
        }
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = [(r["step"], round(r["task_loss"], 4), round(r["kl"], 5)) for r in readings]
        print(arm["name"], shown, line["seconds"], flush=True)


if __name__ == "__main__":
    main()
