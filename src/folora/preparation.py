"""Sampling to optimizer in one call, for anyone's own training loop or Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora import ranks
from folora.activations import (
    InputGroup,
    Moments,
    passes,
    room_for_moments,
    second_moments,
)
from folora.adapter import ExportReport, attach, export_adapter
from folora.architecture import check_model
from folora.basefile import BaseFile, read_base_file, warn_of_dtype
from folora.config import AdapterConfig, FoLoraConfig, StatisticsConfig
from folora.constraint import keep_off
from folora.convergence import Convergence, watched
from folora.coverage import Coverage, check_causal, cover, probe, report
from folora.data import (
    Example,
    TaskData,
    batches,
    check_dataset,
    check_fits,
    load_rows,
    prepare_task,
    text_examples,
)
from folora.engine import sized
from folora.errors import ConfigError
from folora.fingerprints import model_facts
from folora.finiteness import check_finite_weights
from folora.formats import Row
from folora.hyperparameters import adam_options
from folora.initialization import NEED_NULL_BASIS, NEED_WHOLE_BASIS
from folora.loading import device_of, load_model, load_tokenizer, warn_if_slow
from folora.meter import Meter, warn_if_not_stepped
from folora.progress import progress
from folora.proxies import ProxySet
from folora.sadam import Complement, SAdam
from folora.sampling import sample
from folora.serving import engine_of
from folora.solving import GroupBasis, solve
from folora.special_tokens import check_same_tokenizer, ending_ids, start_token_id
from folora.spectrum import BASES, complement_frame, spectral_gate, step_scale

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained without forgetting.

    Attributes:
        model: A PEFT model; its logits are the base model's until the first step.
        optimizer: `SAdam` over A (in the basis) and B (plain AdamW).
        bases: The solved spectrum of every shared input.
        task: The tokenized rows: ``task.train`` and ``task.held_out``.
        samples: What the base model wrote: ``samples.calibration`` and ``samples.held_out``.
        meter: Reads what is learned and kept.
        config: What it was prepared with.
    """

    model: PeftModel
    optimizer: SAdam
    bases: list[GroupBasis]
    task: TaskData
    samples: ProxySet
    meter: Meter
    config: FoLoraConfig

    def param_groups(self, **changes: Any) -> list[dict[str, Any]]:
        """Groups for `SAdam`; `changes` as in `param_groups`, for example ``lr=1e-3``."""
        return param_groups(self.model, self.bases, **(group_options(self.config) | changes))

    def train_dataset(self) -> Dataset:
        """Rows to train on, ``input_ids`` and ``labels``, as TRL and Transformers take them.

        With ``training.replay`` that share of them are self-samples, taken in turn.
        """
        share = self.config.training.replay
        texts = text_examples(self.samples.calibration)
        replayed = round(share / (1 - share) * len(self.task.train))
        return to_dataset([*self.task.train, *islice(cycle(texts), replayed)])

    def export(self, path: str | Path, rank: int | None = None) -> ExportReport:
        """Write an ordinary LoRA adapter; see `export_adapter`.

        Warns of an adapter that another optimizer than `SAdam` has trained.
        """
        self.meter.check()
        return export_adapter(self.model, path, rank=rank)


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
    ranks.agree(lambda: check_finite_weights(sampler))
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


def assemble(
    model: PreTrainedModel,
    bases: list[GroupBasis],
    task: TaskData,
    samples: ProxySet,
    config: FoLoraConfig,
) -> Prepared:
    """Adapter, optimizer and meter from what the first three stages found."""
    peft_model = attach_configured(model, bases, config)
    groups = param_groups(peft_model, bases, **group_options(config))
    optimizer = SAdam(groups, **adam_options(config.training))
    keep_off(optimizer, peft_model)
    check = partial(warn_if_not_stepped, optimizer, peft_model, bases)
    meter = Meter(samples.held_out, task.held_out, config.statistics.batch_size, check)
    return Prepared(peft_model, optimizer, bases, task, samples, meter, config)


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


def attach_configured(
    model: PreTrainedModel, bases: Sequence[GroupBasis], config: FoLoraConfig
) -> PeftModel:
    """`attach` with the adapter section of a config."""
    adapter = config.adapter
    peft_model = attach(
        model,
        bases,
        r=adapter.r,
        alpha=adapter.alpha,
        init=adapter.init,
        protect=adapter.protected,
        seed=config.training.seed,
    )
    if adapter.freeze_a:
        for b in bases:
            for name in b.group.layers:
                layer: Any = peft_model.get_base_model().get_submodule(name)
                layer.lora_A.requires_grad_(False)
    return peft_model


def null_rank(config: FoLoraConfig) -> int:
    """How many of C_pre's smallest eigenvectors the chosen start needs."""
    return config.adapter.r if config.adapter.init in NEED_NULL_BASIS else 0


def solved_directions(config: FoLoraConfig) -> int | None:
    """How many columns of each basis training reads; None for all."""
    whole = config.adapter.init in NEED_WHOLE_BASIS or config.spectrum.beyond == "floor"
    return None if whole else config.directions


def param_groups(
    model: PeftModel,
    bases: Iterable[GroupBasis],
    *,
    lr: float,
    lr_b_ratio: float = 1.0,
    weight_decay: float = 0.0,
    lam: float = 1.0,
    s_min: float = 0.3,
    directions: int | None = None,
    beyond: str = "closed",
    step_scale: str = "task",
    storage: str = "float32",
    spectral: bool = True,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Parameter groups for `SAdam`: one a shared input for A, one for all B.

    Args:
        model: From `attach`.
        bases: From `solve`.
        lr: Learning rate of A.
        lr_b_ratio: Learning rate of B over that of A.
        weight_decay: For both.
        lam: Gate's lambda.
        s_min: Gate's floor.
        directions: Only so many leading directions are kept; None for all.
        beyond: What happens along the others, ``"closed"`` or ``"floor"``.
        step_scale: ``"task"`` or ``"paper"``.
        storage: Of the bases: ``"float32"``, ``"bfloat16"``, ``"host"`` or ``"sharded"``.
        spectral: False leaves bases out, which makes it plain AdamW on LoRA.
        adapter_name: Which adapter.
    """
    base = model.get_base_model()
    groups: list[dict[str, Any]] = []
    b_params = []
    for b in bases:
        layers = [base.get_submodule(name) for name in b.group.layers]
        assert all(isinstance(layer, LoraLayer) for layer in layers)
        a_params = [layer.lora_A[adapter_name].weight for layer in layers]  # type: ignore[union-attr,index]
        b_params += [layer.lora_B[adapter_name].weight for layer in layers]  # type: ignore[union-attr,index]
        if not a_params[0].requires_grad:
            continue
        group: dict[str, Any] = {"params": a_params, "lr": lr, "weight_decay": weight_decay}
        if spectral:
            floor = s_min if beyond == "floor" else None
            group |= gated_basis(b, lam, s_min, directions, floor, step_scale)
            group |= stored(group["basis"], storage, a_params[0].device)
        groups.append(group)
    groups.append({"params": b_params, "lr": lr * lr_b_ratio, "weight_decay": weight_decay})
    return groups


def gated_basis(
    b: GroupBasis,
    lam: float,
    s_min: float,
    directions: int | None,
    floor: float | None,
    step_scaling: str,
) -> dict[str, Any]:
    """What `SAdam` is told of a basis: its leading columns, their gate, scale, and what lies beyond.

    Args:
        b: The solved basis; all of it if a floor is given and some directions are not kept.
        lam: Gate's lambda.
        s_min: Gate's floor.
        directions: How many columns are kept; None for all.
        floor: Gate of what lies beyond them, as one; None closes it.
        step_scaling: ``"task"`` or ``"paper"``.
    """
    columns = b.basis[:, :directions].contiguous()
    gamma, k = b.gamma[:directions], columns.shape[1]
    gate = spectral_gate(gamma, lam, s_min)
    complement, moved = None, 0.0
    if floor is not None and k < b.group.d_in:
        dual, weight = complement_frame(b.basis, k)
        complement = Complement(dual.float(), weight.float(), floor)
        moved = floor**2 * (b.rest + float(b.gamma[k:].sum()))
    paper = step_scaling == "paper"
    scale = 1.0 if paper else step_scale(gamma, gate, b.task_trace, moved)
    return {"basis": columns, "gate": gate, "scale": scale, "complement": complement}


def stored(basis: Tensor, storage: str, device: torch.device) -> dict[str, Any]:
    """The keys of a group of `SAdam` on a device that keep its basis as asked for; see `param_groups`."""
    if storage == "sharded":
        return {"basis": ranks.sharded(basis.to(device))}
    if storage == "bfloat16":
        return {"basis": basis.to(torch.bfloat16)}
    if storage == "host":
        kept = basis.cpu()
        return {
            "basis": kept.pin_memory() if torch.cuda.is_available() else kept,
            "on_host": True,
        }
    return {"basis": basis}


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Tokenized examples as a `datasets.Dataset` of ``input_ids`` and ``labels``."""
    return Dataset.from_dict(
        {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    )


def group_options(config: FoLoraConfig) -> dict[str, Any]:
    """The keyword arguments of `param_groups` that a config stands for."""
    spectrum, training = config.spectrum, config.training
    return {
        "lr": training.learning_rate,
        "lr_b_ratio": training.lr_b_ratio,
        "weight_decay": training.weight_decay,
        "lam": spectrum.lam,
        "s_min": spectrum.s_min,
        "directions": config.directions,
        "beyond": spectrum.beyond,
        "step_scale": spectrum.step_scale,
        "storage": spectrum.storage,
        "spectral": training.optimizer == "sadam",
    }
