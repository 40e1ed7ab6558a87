"""An SFTTrainer whose checkpoints are complete, verified and never someone else's."""

from __future__ import annotations

import json
import logging
from copy import copy
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from folora.errors import ArtifactError
from folora.runtime import distributed
from folora.runtime.checkpoints import begin_checkpoint, prune, seal_checkpoint
from folora.runtime.extras import needed_by
from folora.runtime.storage import malformed_is_damaged
from folora.runtime.tensors import full_tensor

with needed_by("training", "trl"):
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

logger = logging.getLogger(__name__)

SAVED = ("lora_", ".modules_to_save.")  # in the names of all weights of an adapter


class Resumable(Protocol):
    """A part of the training with a state of JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class SealedTrainer(SFTTrainer):
    """SFTTrainer on a PEFT model; a checkpoint is sealed when complete, see `runtime.checkpoints`.

    Args:
        model: The PEFT model.
        args: Its ``save_total_limit`` counts checkpoints that folora wrote; others are never deleted.
        kwargs: Passed on to SFTTrainer.

    Attributes:
        resumable: Parts whose state checkpoints hold, by file name.
    """

    def __init__(self, model: PeftModel, args: SFTConfig, **kwargs: Any) -> None:
        # Read from the model: the Trainer has this only in later versions of transformers.
        self._loaded_in_parts = getattr(model, "is_distributed_loading_by_transformers", False)
        args = copy(args)
        # The Trainer deletes any folder named like a checkpoint; `prune` only those that folora wrote.
        self._keep, args.save_total_limit = args.save_total_limit, None
        if self._loaded_in_parts:
            # The Trainer refuses to save the optimizer of such a model; see `_save_checkpoint`.
            args.save_only_model = True
        super().__init__(model=model, args=args, **kwargs)
        self.resumable: dict[str, Resumable] = {}
        if self.is_fsdp_enabled:
            # torch.distributed.checkpoint can be read by other numbers of processes. Full state dicts
            # cannot be loaded for an adapter only (Accelerate 1.15 hangs).
            plugin = self.accelerator.state.fsdp_plugin
            plugin.state_dict_config = plugin.optim_state_dict_config = None
            plugin.set_state_dict_type("SHARDED_STATE_DICT")
        elif distributed.asks_for_fsdp(args.fsdp):
            logger.warning(
                "FSDP is requested, but Accelerate supports it on accelerators only; it is not used"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, sealed when complete. Raises ArtifactError."""
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

        def write() -> None:
            try:
                super(SealedTrainer, self)._save_checkpoint(model, trial)
                if self.args.should_save:
                    for name, part in self.resumable.items():
                        (folder / name).write_text(json.dumps(part.state_dict()), "utf-8")
                if self._loaded_in_parts:  # only the base is sharded, not the adapter
                    self._save_optimizer_and_scheduler(str(folder))
                    self._save_rng_state(str(folder))
            except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch.save
                raise ArtifactError(f"cannot write the checkpoint {folder}: {error}") from error

        def finish() -> None:
            seal_checkpoint(folder)
            if self._keep:
                prune(folder.parent, self._keep, self.state.best_model_checkpoint)

        distributed.on_rank_zero(lambda: begin_checkpoint(folder))
        distributed.raise_together(write)  # every process adds a file
        distributed.on_rank_zero(finish)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's, and the state of `resumable` parts. Raises ArtifactError."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_resumable(Path(checkpoint))

    def load_resumable(self, checkpoint: Path) -> None:
        """Restore the state of `resumable` parts. Raises ArtifactError."""
        for name, part in self.resumable.items():
            file = checkpoint / name
            with malformed_is_damaged(file):
                part.load_state_dict(json.loads(file.read_text("utf-8")))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Only for a push to the Hub: SFTTrainer would replace README.md next to the checkpoints."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole adapter as PEFT does, also if FSDP2 has sharded it."""
        if self.is_fsdp_enabled:
            model: Any = self.model
            parts = model.state_dict().items()  # the base's own are not gathered
            self._save(
                output_dir, {n: full_tensor(t) for n, t in parts if any(p in n for p in SAVED)}
            )
        else:
            super().save_model(output_dir, _internal_call)
