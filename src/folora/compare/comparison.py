"""Train many methods on one model and task, from the same samples and moments; one result line per arm.

An arm is one training: a method with a learning rate, a seed and possibly other changed options. It uses
the same Trainer as a run and is evaluated several times during training (each reading is a point of a
frontier). Its result is added to a file at the end. Arms that have a result are skipped, so an interrupted
comparison resumes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from folora.adapters.coverage import check_adapter
from folora.compare.arms import Arm, checked_arm
from folora.compare.compute import tokens_processed
from folora.compare.inputs import Inputs, RealText, adapted_layers
from folora.compare.readings import READ_AT, Reader, Score, no_scores, rounded
from folora.compare.results import FORMAT, Key, ResultFile
from folora.compare.rivals import Rival
from folora.config import FoLoraConfig
from folora.errors import ConfigError, DataError
from folora.pipeline.run import Run
from folora.runtime.artifacts import software_versions
from folora.runtime.progress import progress
from folora.runtime.storage import obstacle
from folora.spectral.moments import Moments
from folora.training.arguments import sft_config
from folora.training.prepared import LORA, assemble
from folora.training.trainer import FoLoraTrainer

# Options that every arm is trained with, beside its own; none changes the result.
HARNESS = {"training.save_strategy": "no", "training.include_num_input_tokens_seen": "non_padding"}


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
        rivals: Methods with an adapter of another kind, beside those of `folora.methods`.
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
        score: Score = no_scores,
        read_at: Sequence[float] = READ_AT,
        score_at: Sequence[float] | None = None,
        scales: Sequence[float] = (),
        real_text: RealText | None = None,
        rivals: Sequence[Rival] = (),
        h_norm: bool = True,
    ) -> None:
        self.run, self.results, self.stage, self.task = run, ResultFile(results), stage, task
        self.command, self.real_text, self.h_norm = command, real_text, h_norm
        self.rivals = {rival.method.name: rival for rival in rivals}
        self.reader = Reader(score, read_at, score_at, scales)
        self.calibration: dict[str, Any] = {}
        self._pre: Moments | None = None

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
        inputs = Inputs(self.run, configs, self._pre, self.real_text, self.h_norm)
        with progress("arms", len(chosen)) as tick:
            for arm, config in zip(chosen, configs, strict=True):
                key, replayed = self.key(arm, config), inputs.replayed(config)
                made_from = inputs.made_from(replayed)
                if key not in self.results.read():
                    result = self._result(arm, config, inputs, replayed)
                    self.results.add({**result, "made_from": made_from})
                yield checked_arm(self.results.read()[key], config, made_from)
                tick()

    def config(self, arm: Arm) -> FoLoraConfig:
        """The full config of an arm. Raises ConfigError."""
        rival = self.rivals.get(arm.method)
        method = rival.method if rival else arm.method
        return self.run.config.changed({"method": method, **arm.changes})

    def key(self, arm: Arm, config: FoLoraConfig) -> Key:
        """The key of the arm's result in the file."""
        return self.task, config.training_seed, self.name(arm)

    def name(self, arm: Arm) -> str:
        """The arm's name, with the calibration if it differs from the run's."""
        return "--".join([arm.name, *(f"{k}={v}" for k, v in self.calibration.items())])

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
            layers = adapted_layers(self.run, config)
            if rival := self.rivals.get(config.method.name):
                rival.check_arm(context.model, layers, config)
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
        inputs: Inputs,
        replayed: Sequence[list[int]] | None,
    ) -> dict[str, Any]:
        """Train an arm; the line of its result."""
        began = time.monotonic()
        context, samples = self.run.context, inputs.shared.samples.load()
        own, rival = inputs.spectrum(config), self.rivals.get(arm.method)
        prepared = assemble(
            context.model,
            own,
            context.task,
            samples,
            config,
            replayed,
            inputs.more,
            rival.kind if rival else LORA,
        )
        try:
            arguments = self._arguments(config.changed(HARNESS))
            trainer = FoLoraTrainer(prepared, arguments, context.tokenizer)
            base = self.reader.base(trainer)
            readings, diverged = self.reader.train(trainer)
            fits = [] if diverged else prepared.budget_fits([1.0])
            if not diverged:
                readings += self.reader.scaled(trainer, fits)
            tokens = tokens_processed(trainer, samples, *inputs.tokens, fits)
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
            "base": base,
            "readings": readings,
            "diverged": diverged,
            "budget": rounded(asdict(fits[0])) if fits else None,
        }

    def _arguments(self, config: FoLoraConfig) -> Any:
        on_cpu = self.run.context.model.device.type == "cpu"
        return sft_config(config, self.results.path.parent, evaluates=False, on_cpu=on_cpu)
