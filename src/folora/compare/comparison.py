"""Train many methods on one model and task, from the same samples and moments; one result line per arm.

An arm is one training: a method with a learning rate, a seed and possibly other changed options. It uses
the same Trainer as a run and is evaluated several times during training (each reading is a point of a
frontier). Its result is added to a file at the end. Arms that have a result are skipped, so an interrupted
comparison resumes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import TrainerControl, TrainerState

from folora.adapters.coverage import check_adapter
from folora.calibration.base_file import tensors_sha256
from folora.calibration.inputs import target_layers
from folora.compare.compute import tokens_processed
from folora.compare.results import FORMAT, REMEDY, Key, Line, ResultFile
from folora.config import BOS, FoLoraConfig
from folora.errors import ArtifactError, ConfigError, DataError, MismatchError
from folora.metrics.meter import total_norm
from folora.pipeline.run import Run
from folora.pipeline.stages import Shared, solve_all, solve_options
from folora.runtime.artifacts import software_versions
from folora.runtime.fingerprints import tokens_fingerprint
from folora.runtime.progress import progress
from folora.runtime.storage import obstacle
from folora.spectral.layers import Spectrum
from folora.spectral.moments import Moments
from folora.training.arguments import sft_config
from folora.training.callbacks import AfterStep
from folora.training.prepared import assemble
from folora.training.trainer import FoLoraTrainer

READ_AT = (1 / 4, 1 / 2, 3 / 4, 1.0)
# Options that every arm is trained with, beside its own; none changes the result.
HARNESS = {"training.save_strategy": "no", "training.include_num_input_tokens_seen": "non_padding"}
EARLIER = {"sampling.sources": {BOS: 1.0}}

Scores = dict[str, dict[str, float]]
"""``{"task": {name: score}, "kept": {name: score}}``, every score in [0, 1].

``"other"`` may hold further metrics on any scale, ``"flips"`` numbers of questions whose answer changed."""

Score = Callable[[PeftModel], Scores]


@dataclass(frozen=True)
class Arm:
    """One training: a method, and changed options by dotted name."""

    method: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method and all changes."""
        parts = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.changes.items()]
        return "--".join([self.method, *parts]).replace("/", "_")


def arms(
    methods: Sequence[str], learning_rates: Sequence[float], **knobs: Sequence[Any]
) -> list[Arm]:
    """Every combination of methods, learning rates and further options, as ``**{"training.seed": (0, 1)}``."""
    names = ("training.learning_rate", *knobs)
    values = list(product(learning_rates, *knobs.values()))
    return [Arm(name, dict(zip(names, v, strict=True))) for name in methods for v in values]


@dataclass(frozen=True)
class RealText:
    """Text of the kind that the model was pretrained on, for methods that replay it.

    Attributes:
        source: Name of the text.
        texts: Gives the first so many token sequences.
    """

    source: str
    texts: Callable[[int], Sequence[list[int]]]


class Comparison:
    """One model and task, with the samples and moments that all arms share.

    Args:
        run: The run whose first two stages are used; missing ones are computed. Arms change its config.
        results: JSONL file of results; other comparisons may use the same file.
        stage: Name of the model in tables, with its seed if models differ by seed.
        task: Name of the task.
        command: The command line, recorded with the results.
        score: Computes task and kept scores of a model; by default only the meter is read.
        read_at: Fractions of training after which the meter is read.
        score_at: Those at which `score` is called too, if it is expensive; default is all.
        scales: Factors of the trained update at which readings are taken too: every method's frontier then
            has what scaling the adapter after training gives.
        real_text: For methods with ``replay_text="real"``.
        h_norm: Whether readings have the H-norm of updates outside the span of the leading eigenvectors, such
            as LoRA's. It needs all eigenvectors of every input, which takes minutes on wide inputs.
    """

    def __init__(
        self,
        run: Run,
        results: Path,
        *,
        stage: str,
        task: str,
        command: str,
        score: Score = lambda _: {"task": {}, "kept": {}},
        read_at: Sequence[float] = READ_AT,
        score_at: Sequence[float] | None = None,
        scales: Sequence[float] = (),
        real_text: RealText | None = None,
        h_norm: bool = True,
    ) -> None:
        self.run, self.results, self.stage, self.task = run, ResultFile(results), stage, task
        self.command, self.score, self.read_at = command, score, tuple(read_at)
        self.score_at = self.read_at if score_at is None else tuple(score_at)
        self.scales, self.real_text, self.h_norm = tuple(scales), real_text, h_norm
        self.calibration: dict[str, Any] = {}
        self._pre: Moments | None = None
        self._base: dict[str, Any] = {}

    def calibrated(self, calibration: dict[str, Any], pre: Moments) -> Comparison:
        """The same comparison with another C_pre; `calibration` describes its data in names and tables."""
        other = copy(self)
        other.calibration, other._pre = calibration, pre
        return other

    def run_all(self, chosen: Sequence[Arm]) -> Iterator[dict[str, Any]]:
        """Run the arms that have no result yet, and yield every arm's result in turn.

        Raises:
            ConfigError: An arm is invalid; all are checked before the first one starts.
        """
        configs = self.check(chosen)
        # One solve for all initializations, with the most eigenvectors that any arm needs.
        needed = [solve_options(config) for config in configs]
        null_rank = max(options["null_rank"] for options in needed)
        counts = [options["directions"] for options in needed]
        directions = None if self.h_norm or None in counts else max(counts)
        shared = self.run.share()
        shared_facts = self._made_from(shared)

        @lru_cache(maxsize=1)
        def solved(options: frozenset[tuple[str, Any]]) -> Spectrum:
            keep = self._pre or shared.keep.load()
            return solve_all(self.run.context, keep, shared.task.load(), **dict(options))

        with progress("arms", len(chosen)) as tick:
            for arm, config in zip(chosen, configs, strict=True):
                key, replay = self.key(arm, config), self._replay(config)
                made_from = shared_facts
                if replay is not None and self.real_text is not None:
                    found = [self.real_text.source, tokens_fingerprint(replay)]
                    made_from = {**shared_facts, "replayed_text": found}
                if key not in self.results.read():
                    options = {"null_rank": null_rank, "directions": directions}
                    spectrum = solved(frozenset({**solve_options(config), **options}.items()))
                    result = self._result(arm, config, spectrum, shared, replay)
                    self.results.add({**result, "made_from": made_from})
                yield checked_arm(self.results.read()[key], config, made_from)
                tick()

    def config(self, arm: Arm) -> FoLoraConfig:
        """The full config of an arm. Raises ConfigError."""
        return self.run.config.changed({"method": arm.method, **arm.changes})

    def key(self, arm: Arm, config: FoLoraConfig) -> Key:
        """The key of the arm's result in the file."""
        return self.task, config.training_seed, self.name(arm)

    def name(self, arm: Arm) -> str:
        """The arm's name, with the calibration if it differs from the run's."""
        return "--".join([arm.name, *(f"{k}={v}" for k, v in self.calibration.items())])

    def _made_from(self, shared: Shared) -> dict[str, Any]:
        """Fingerprints of the model, data, samples and moments that an arm uses."""
        keep = shared.keep.manifest["sha256"]
        if self._pre is not None:
            keep = tensors_sha256({name: m.cpu() for name, m in self._pre.matrices.items()})
        return {
            **self.run.context.facts,
            "data": self.run.context.task.fingerprint,
            "samples": shared.samples.manifest["fingerprint"],
            "statistics": [keep, shared.task.manifest["sha256"]],
        }

    def check(self, chosen: Sequence[Arm]) -> list[FoLoraConfig]:
        """The configs of the arms, after checking all of them.

        Raises:
            FoLoraError: An arm is invalid, or no rows are held out for the task loss.
        """
        configs = [self.config(arm) for arm in chosen]
        context = self.run.context
        for config in configs:
            self._arguments(config)
            check_adapter(context.model, context.groups, config)
            self._layers(config)
            if config.method.replay_text == "real" and self.real_text is None:
                raise ConfigError(
                    f"method {config.method.name} replays real text, but the comparison has none; name its source "
                    "in the plan (replay: SOURCE)"
                )
        # Results made from another model or other rows are detected before sampling starts.
        self.check_results(chosen, {**context.facts, "data": context.task.fingerprint})
        if not context.task.held_out:
            raise DataError(
                "a comparison needs held-out rows for the task loss, but none of the "
                f"{len(context.task.train)} rows are held out. Give at least 10 rows, and data.eval_rows > 0."
            )
        return configs

    def _layers(self, config: FoLoraConfig) -> set[str]:
        """The layers that an arm adapts. Raises ConfigError if they are not among the run's."""
        measured = {name for group in self.run.context.groups for name in group.layers}
        asked = config.adapter.target_modules
        if asked == self.run.config.adapter.target_modules:
            return measured
        wanted = {*target_layers(self.run.context.model, asked)}
        if other := sorted(wanted - measured):
            raise ConfigError(
                f"adapter.target_modules is {asked!r}, which adapts {other[0]}, but arms share second moments, which the "
                "comparison measures for its own adapter.target_modules alone; these must include an arm's"
            )
        return wanted

    def _replay(self, config: FoLoraConfig) -> Sequence[list[int]] | None:
        """The real texts that an arm replays; None if it replays none."""
        share, rows = config.method.replay, len(self.run.context.task.train)
        if config.method.replay_text != "real" or self.real_text is None:
            return None
        return self.real_text.texts(math.ceil(share / (1 - share) * rows))

    def check_results(
        self, chosen: Sequence[Arm], made_from: Mapping[str, Any] | None = None
    ) -> None:
        """Check the file of results; without `made_from` before the model is loaded.

        Raises:
            FoLoraError: It has a result of one of these arms with other options or inputs, is damaged, or
                is not a regular file.
        """
        if why := obstacle(self.results.path):
            raise ConfigError(
                f"{self.results.path} {why}, but must be a file of results; move it away"
            )
        done = self.results.read()
        for arm in chosen:
            config = self.config(arm)
            if line := done.get(self.key(arm, config)):
                checked_arm(line, config, made_from)

    def _result(
        self,
        arm: Arm,
        config: FoLoraConfig,
        spectrum: Spectrum,
        shared: Shared,
        replay: Sequence[list[int]] | None,
    ) -> dict[str, Any]:
        began = time.monotonic()
        context, samples = self.run.context, shared.samples.load()
        own = spectrum.of_layers(self._layers(config))
        prepared = assemble(context.model, own, context.task, samples, config, replay)
        try:
            arguments = self._arguments(config.changed(HARNESS))
            trainer = FoLoraTrainer(prepared, arguments, context.tokenizer)
            if not self._base:  # the same for every arm, whose update is zero before the first step
                self._base = {**self._read(trainer, 0), "frobenius": 0.0, "h_norm": 0.0}
            readings, diverged = _train(trainer, self.read_at, partial(self._read, trainer))
            fits = [] if diverged else prepared.budget_fits([1.0])
            if not diverged:
                readings += self._scaled(trainer, [*self.scales, *(fit.scale for fit in fits)])
            pre = self._pre.tokens if self._pre else shared.keep.manifest["tokens"]
            c_task = shared.task.manifest["tokens"]
            tokens = tokens_processed(trainer, samples, pre, c_task, fits)
        finally:
            prepared.model.unload()
            vars(context.model).pop("forward", None)  # TRL wraps it again for every arm
        return {
            "format": FORMAT,
            "stage": self.stage,
            "task": self.task,
            "seed": config.training_seed,
            "name": self.name(arm),
            "method": arm.method,
            "title": config.method.title,
            "changes": arm.changes,
            "calibration": self.calibration,
            "command": self.command,
            "config": config.differences(),
            "versions": software_versions(),
            "seconds": round(time.monotonic() - began, 1),
            "tokens": tokens,
            "base": self._base,
            "readings": readings,
            "diverged": diverged,
        }

    def _scaled(self, trainer: FoLoraTrainer, scales: Sequence[float]) -> list[dict[str, Any]]:
        """Readings of the trained update scaled by each of `scales`."""
        prepared, last = trainer.prepared, trainer.state.global_step
        found = []
        for scale in scales:
            with rescale_adapter_scale(prepared.model, scale):
                found.append({**self._read(trainer, last), "scale": rounded(scale)})
        return found

    def _arguments(self, config: FoLoraConfig) -> Any:
        on_cpu = self.run.context.model.device.type == "cpu"
        return sft_config(config, self.results.path.parent, evaluates=False, on_cpu=on_cpu)

    def _read(self, trainer: FoLoraTrainer, step: int) -> dict[str, Any]:
        """A reading of the meter, with scores if they are due and the model has not diverged."""
        reading, norms = trainer.read()
        due = step in {0, *steps_at(self.score_at, trainer.state.max_steps)}
        scored = (due or trainer.ended_early is not None) and math.isfinite(reading.kl)
        scores = self.score(trainer.prepared.model) if scored else {"task": {}, "kept": {}}
        return rounded({"step": step, **asdict(reading), **asdict(total_norm(norms)), **scores})


def _train(
    trainer: FoLoraTrainer, read_at: Sequence[float], read: Callable[[int], dict[str, Any]]
) -> tuple[list[dict[str, Any]], bool]:
    """Readings at fractions of training, and whether training diverged, which ends it."""
    readings: list[dict[str, Any]] = []
    # A uniform distribution has at most this KL to the base.
    uniform = math.log(trainer.prepared.model.get_input_embeddings().num_embeddings)

    def diverged() -> bool:
        kl = readings[-1]["kl"]
        return kl is None or kl > uniform

    def after_step(state: TrainerState, control: TrainerControl) -> None:
        if state.global_step in steps_at(read_at, state.max_steps):
            readings.append(read(state.global_step))
            control.should_training_stop |= diverged()

    trainer.add_callback(AfterStep(after_step))
    trainer.train()
    if (step := trainer.state.global_step) not in {reading["step"] for reading in readings}:
        readings.append(read(step))  # training ended early
    return readings, diverged()


def checked_arm(
    line: Line, config: FoLoraConfig, made_from: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The result in a line, after checking that it has this config and these fingerprints of its inputs.

    Raises:
        ArtifactError: It has other options.
        MismatchError: It was made from another model, dataset, samples or moments.
    """
    result, wanted = line.values, json.loads(json.dumps(config.differences()))
    found = result.get("config")
    found = found if isinstance(found, dict) else {}
    # Earlier results name no sources; `made_from` tells samples of other sources apart.
    found, wanted = {**EARLIER, **found}, {**EARLIER, **wanted}
    if found != wanted:
        other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        raise ArtifactError(f"{line.place} has other options ({', '.join(other)}); {REMEDY}")
    stated = result.get("made_from")
    stated = stated if isinstance(stated, dict) else {}
    for name, value in (made_from or {}).items():
        if stated.get(name) != value:
            raise MismatchError(
                f"{line.place} was made with a different {name.replace('_', ' ')} than this comparison; "
                f"{REMEDY}, or give another output folder"
            )
    return result


def steps_at(shares: Sequence[float], steps: int) -> set[int]:
    """The steps at which the given fractions of `steps` are complete."""
    return {max(1, round(share * steps)) for share in shares}


def rounded(value: Any) -> Any:
    """All floats in a value to six significant digits; those that are not finite become None."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
