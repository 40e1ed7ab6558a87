"""`prepare`: the stages in memory, for any training loop or Trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.calibration.base_file import read_base_manifest, warn_of_dtype
from folora.config import FoLoraConfig
from folora.data.contents import Row
from folora.data.files import check_dataset
from folora.data.rows import check_fits
from folora.errors import ConfigError
from folora.pipeline.context import Context
from folora.pipeline.stages import Solved, share
from folora.pipeline.store import Memory
from folora.runtime.architecture import check_model
from folora.runtime.loading import device_of, load_model, load_tokenizer, warn_if_slow
from folora.training.prepared import Prepared, assemble

logger = logging.getLogger(__name__)


def prepare(
    model: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: str | Dataset | Sequence[Row] | None = None,
    config: FoLoraConfig | None = None,
) -> Prepared:
    """Sample, measure, solve, attach and build the optimizer.

    Args:
        model: A causal LM on its device; it is frozen, and its layers are wrapped in place, as PEFT does.
            Its weights may be sharded (transformers' DistributedConfig). Or a Hub name or folder, loaded
            with the config's device, dtype, revision and related options.
        tokenizer: Of the model; required for a model in memory.
        dataset: Rows, a `datasets.Dataset`, a local file or a Hub name; default is ``config.dataset``.
        config: Options; default is ``FoLoraConfig()``.

    Raises:
        FoLoraError: Invalid data, options or weights; cheap checks run first.
    """
    config = config or FoLoraConfig()
    dataset = config.dataset if dataset is None else dataset
    if dataset is None:
        raise ConfigError("prepare needs a dataset: rows, a datasets.Dataset, a file or a Hub name")
    if isinstance(dataset, str):
        check_dataset(dataset)
    if isinstance(model, str):
        tokenizer = load_tokenizer(config, model) if tokenizer is None else tokenizer
        model = load_model(config, model)
    elif tokenizer is None:
        raise ConfigError("prepare needs the tokenizer of a model that is given in memory")
    else:
        _check_in_memory(model, config)
    check_model(model)
    warn_if_slow(model.dtype, model.device)
    context = Context(config, model=model, tokenizer=tokenizer, dataset=dataset)
    check_fits(context.task, tokenizer, context.start_id, **context.limits)
    _ = context.groups
    engine = None
    if config.base is None:
        engine = context.engine()  # fails early if the model cannot generate
    else:
        warn_of_dtype(read_base_manifest(Path(config.base), context.facts), context.facts["dtype"])
    store = Memory()
    shared = share(context, store, engine)
    spectrum = store.make(Solved(context, shared.keep, shared.task)).load()
    return assemble(model, spectrum, context.task, shared.samples.load(), config)


def _check_in_memory(model: PreTrainedModel, config: FoLoraConfig) -> None:
    """Refuse loading options that a model in memory contradicts; warn of unused ones.

    Raises:
        ConfigError: The model is on another device, or has another dtype or quantization.
    """
    quantized = getattr(model, "quantization_method", None) is not None
    dtype = str(model.dtype).removeprefix("torch.")
    for name, asked, is_there in (
        ("device", config.device != "auto" and device_of(config).type, model.device.type),
        ("dtype", config.dtype != "auto" and not quantized and config.dtype, dtype),
        ("quantize", not quantized and config.quantize != "none" and config.quantize, "none"),
    ):
        if asked and asked != is_there:
            raise ConfigError(
                f"{name} is {asked!r}, but the model in memory has {is_there!r}; leave the option out, or "
                "give the model by name"
            )
    unused = sorted({"model", "output", "revision", "shard"} & {*config.differences()})
    if unused:
        logger.warning("prepare with a model in memory does not use %s", ", ".join(unused))
