"""`prepare`: the stages in memory, for any training loop or Trainer."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.config import FoLoraConfig
from folora.data.contents import Row
from folora.pipeline.checks import check_in_memory
from folora.pipeline.context import Context
from folora.pipeline.further_text import further_text
from folora.pipeline.stages import Solved, share
from folora.pipeline.store import Memory
from folora.training.prepared import Prepared, assemble


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
    context = Context(config or FoLoraConfig(), model=model, tokenizer=tokenizer, dataset=dataset)
    engine = check_in_memory(context)
    store = Memory()
    shared = share(context, store, engine)
    spectrum = store.make(Solved(context, shared.keep, shared.task)).load()
    samples = shared.samples.load()
    more = further_text(context, samples)
    return assemble(context.model, spectrum, context.task, samples, context.config, more=more)
