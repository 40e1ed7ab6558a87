"""Sampling to optimizer in one call, for anyone's own training loop or Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.adapters.coverage import Coverage, check_causal, cover, probe, report
from folora.adapters.initialization import NEED_NULL_BASIS, NEED_WHOLE_BASIS
from folora.calibration.base_file import BaseFile, read_base_file, warn_of_dtype
from folora.calibration.engine import sized
from folora.calibration.moments import Moments, passes, room_for_moments, second_moments
from folora.calibration.sampling import sample
from folora.calibration.stopping import Convergence, watched
from folora.calibration.vllm import engine_of
from folora.config import AdapterConfig, FoLoraConfig, StatisticsConfig
from folora.data.formats import Row
from folora.data.rows import (
    Example,
    batches,
    check_dataset,
    check_fits,
    load_rows,
    prepare_task,
    text_examples,
)
from folora.data.special_tokens import check_same_tokenizer, ending_ids, start_token_id
from folora.errors import ConfigError
from folora.runtime import distributed
from folora.runtime.architecture import check_model
from folora.runtime.fingerprints import model_facts
from folora.runtime.finiteness import check_finite_weights
from folora.runtime.loading import device_of, load_model, load_tokenizer, warn_if_slow
from folora.runtime.progress import progress
from folora.spectral.eigenproblem import BASES
from folora.spectral.groups import InputGroup
from folora.spectral.layers import solve
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
            Processes may share its weights out (transformers' DistributedConfig). Or a Hub name or a
            folder, loaded by the config's device, dtype, revision and the like.
        tokenizer: Of the model; loaded with it by default if the model is given by name.
        dataset: Rows, a `datasets.Dataset`, a local file or a Hub name; ``config.dataset`` by default.
        config: Options; ``FoLoraConfig()`` by default.

    Raises:
        FoLoraError: Bad data, options or weights; cheap checks come first.
    """
    config = config or FoLoraConfig()
    dataset = config.dataset if dataset is None else dataset
    if dataset is None:
        raise ConfigError("prepare needs a dataset: rows, a datasets.Dataset, a file or a Hub name")
    if isinstance(dataset, str):
        check_dataset(dataset)
    model, tokenizer = _loaded(model, tokenizer, config)
    check_model(model)
    warn_if_slow(model.dtype, model.device)
    model.requires_grad_(False)  # before it runs; see load_model
    task = prepare_task(load_rows(dataset, config.data.split), tokenizer, config.data)
    start_id = start_token_id(
        tokenizer,
        config.sampling.start_token,
        model.config,
        getattr(model, "generation_config", None),
    )
    check_fits(task, tokenizer, start_id, **limits_of(model.config))
    covered = coverage_of(model, config.adapter, start_id)
    report(covered)
    groups = covered.groups
    check_finite_weights(model)

    eos_ids = ending_ids(model, tokenizer, config.sampling)
    base = _base_file(model, tokenizer, config)
    engine = None
    if base is None:
        sampler = sampler_of(model, tokenizer, config)
        engine = engine_of(sampler, start_id, eos_ids, config.sampling)
    chosen = task.train[: config.statistics.task_examples]
    on_task = measure(model, groups, chosen, config.statistics, "C_task")
    if base is not None:
        proxies, c_pre = base.proxies, base.moments(groups)
    else:
        assert engine is not None
        enough = convergence(model, groups, on_task.matrices, config)
        proxies = sample(engine, start_id, eos_ids, sized(config.sampling, model), enough=enough)
        pre = enough.pre if enough else None
        if pre is None:
            texts = text_examples(proxies.calibration)
            pre = measure(model, groups, texts, config.statistics, "C_pre")
        c_pre = pre.matrices
    with progress("solving", len(groups)) as tick:
        bases = solve(
            groups,
            c_pre,
            on_task.matrices,
            tau=config.spectrum.tau,
            null_rank=null_rank(config),
            directions=solved_directions(config),
            eigenbasis=BASES[config.spectrum.basis],
            device=model.device,
            on_group=tick,
        )
    return assemble(model, bases, task, proxies, config)


def sampler_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: FoLoraConfig
) -> PreTrainedModel:
    """The model that writes the text: ``sampling.sampler_model`` if there is one and no server.

    Raises:
        FoLoraError: It cannot be loaded, has another tokenizer, or weights that are not finite.
    """
    name = config.sampling.sampler_model
    if name is None:
        return model
    own = replace(config, revision=None, device=str(model.device))
    check_same_tokenizer(tokenizer, load_tokenizer(own, name), name)
    if config.sampling.server is not None:
        return model
    sampler = load_model(own, name)
    distributed.agree(lambda: check_finite_weights(sampler))
    return sampler


def _base_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: FoLoraConfig
) -> BaseFile | None:
    """The file of ``config.base``, if there is one and it is of this model. Raises ArtifactError."""
    if config.base is None:
        return None
    facts = model_facts(model, tokenizer)
    found = read_base_file(Path(config.base), facts)
    warn_of_dtype(found.manifest, facts["dtype"])
    return found


def _check_in_memory(model: PreTrainedModel, config: FoLoraConfig) -> None:
    """Refuse options of loading that a model in memory contradicts; name those that are not used.

    Raises:
        ConfigError: The model lies on another device, or has another dtype or quantization.
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
                f"{name} is {asked!r}, but the model that is given has {is_there!r}; leave the option "
                "out, or give the model by its name"
            )
    unused = sorted({"model", "output", "revision", "shard"} & {*config.differences()})
    if unused:
        logger.warning("prepare with a model in memory does not use %s", ", ".join(unused))


def _loaded(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, config: FoLoraConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, loaded if given by name. Raises ConfigError."""
    if isinstance(model, str):
        tokenizer = load_tokenizer(config, model) if tokenizer is None else tokenizer
        return load_model(config, model), tokenizer
    if tokenizer is None:
        raise ConfigError("prepare needs the tokenizer of a model that is given in memory")
    _check_in_memory(model, config)
    return model, tokenizer


def groups_of(model: PreTrainedModel, adapter: AdapterConfig, start_id: int) -> list[InputGroup]:
    """The shared inputs of the layers to adapt; see `coverage_of`."""
    return coverage_of(model, adapter, start_id).groups


def coverage_of(model: PreTrainedModel, adapter: AdapterConfig, start_id: int) -> Coverage:
    """Which layers of a model in memory are adapted, found on two rows of a few tokens.

    Args:
        model: The base model.
        adapter: Says which layers, which rank, which initialization.
        start_id: The token that rows start with.

    Raises:
        ConfigError: The model is no causal LM, or has an adapter already; nothing is there to adapt,
            or the adapter does not fit.
    """
    check_model(model)
    check_causal(model, start_id)
    return cover(model, adapter, probe(model, start_id))


def limits_of(model_config: Any) -> dict[str, int | None]:
    """The keyword arguments of `check_fits` for a model, None where its config does not say."""
    text = model_config.get_text_config()
    found = {
        "vocabulary": getattr(text, "vocab_size", None),
        "context": getattr(text, "max_position_embeddings", None),
    }
    return {k: v if isinstance(v, int) and v > 0 else None for k, v in found.items()}


def measure(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    examples: Sequence[Example],
    config: StatisticsConfig,
    what: str,
    kept: bool = True,
) -> Moments:
    """`second_moments` over examples, with progress, in as many passes as the memory asks for.

    Args:
        model: The base model.
        groups: From `find_groups`.
        examples: Texts.
        config: Says how much is read at once.
        what: For the progress line.
        kept: Whether this process needs the matrices. After several passes they lie on the host.
    """
    parts = _in_passes(model, groups, config)
    matrices: dict[str, Tensor] = {}
    total = len(parts) * sum(len(e.input_ids) for e in examples)
    with progress(f"measuring {what} (tokens)", total) as tick:
        for part in parts:
            found = second_moments(
                model, part, batches(examples, config.batch_size), lambda n: tick(n, n)
            )
            if kept:
                several = len(parts) > 1
                matrices |= {n: m.cpu() if several else m for n, m in found.matrices.items()}
    return Moments(matrices, found.tokens)


def _in_passes(
    model: PreTrainedModel, groups: Sequence[InputGroup], config: StatisticsConfig
) -> list[list[InputGroup]]:
    """The groups that are measured in one pass over the text, and in the next."""
    return passes(groups, room_for_moments(model.device, config.memory_gb))


def convergence(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    c_task: Mapping[str, Tensor],
    config: FoLoraConfig,
) -> Convergence | None:
    """What tells `sample` when it is enough; None if it never is before the ceiling."""
    tolerance = config.sampling.tolerance
    if tolerance is None or not config.sampling.may_end_early:
        return None
    chosen = watched(groups)

    def measured(sequences: Sequence[list[int]], all_of_them: bool) -> Moments:
        examples = text_examples(sequences)
        texts = batches(examples, config.statistics.batch_size)
        where = groups if all_of_them else chosen
        with progress("looking (tokens)", sum(len(e.input_ids) for e in examples)) as tick:
            return second_moments(model, where, texts, lambda n: tick(n, n), apart=chosen)

    return Convergence(
        measured,
        {group.name: c_task[group.name] for group in chosen},
        config.spectrum.tau,
        config.spectrum.lam,
        config.spectrum.s_min,
        config.directions or config.adapter.r,
        tolerance,
        keeps=len(_in_passes(model, groups, config.statistics)) == 1,
    )


def null_rank(config: FoLoraConfig) -> int:
    """How many of C_pre's smallest eigenvectors the chosen start needs."""
    return config.adapter.r if config.adapter.init in NEED_NULL_BASIS else 0


def solved_directions(config: FoLoraConfig) -> int | None:
    """How many columns of each basis training reads; None for all."""
    return None if config.adapter.init in NEED_WHOLE_BASIS else config.directions
