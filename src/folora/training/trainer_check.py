"""Check TRL's arguments before sampling starts, by building a Trainer on a tiny model.

TRL and transformers refuse much only when a Trainer is built: missing logger packages, combinations of
options, arguments of schedules and data loaders.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from copy import copy
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_liger_kernel_available

from folora.data.contents import Example
from folora.errors import ConfigError
from folora.runtime.extras import needed_by
from folora.training.prepared import to_dataset

with needed_by("training", "trl"):
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

STEPS = 10
ROW = Example([0, 1, 2, 3], [0, 1, 2, 3])
ROWS = 8


def check_trainer(
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    model_config: Any,
) -> None:
    """Build a Trainer with its data loader, optimizer and schedule.

    Args:
        args: From `sft_config`.
        tokenizer: Of the model.
        examples: Rows; the first few are used, or a dummy row if there are none.
        model_config: The transformers config of the model.

    Raises:
        ConfigError: TRL or transformers refuses the arguments, or a package is missing.
    """
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("training.use_liger_kernel needs the package liger-kernel")
    if args.activation_offloading and args.device.type == "cpu":
        raise ConfigError("training.activation_offloading needs an accelerator")
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if coefficient and not hasattr(model_config.get_text_config(), "output_router_logits"):
        raise ConfigError(
            "training.router_aux_loss_coef needs a mixture-of-experts model with a router loss"
        )
    args = copy(args)
    args.full_determinism = False  # it would affect the whole process
    args.router_aux_loss_coef = None
    tiny = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args.output_dir = place
            trainer = SFTTrainer(
                model=LlamaForCausalLM(tiny),
                args=args,
                train_dataset=to_dataset(list(examples[:ROWS]) or [ROW]),
                eval_dataset=to_dataset([ROW]) if args.eval_strategy != "no" else None,
                processing_class=tokenizer,
            )
            trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(STEPS)
    except Exception as error:  # also missing packages
        raise ConfigError(f"training: {' '.join(str(error).split())}") from error
