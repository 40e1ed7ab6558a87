"""Inputs of all stages: options, model, tokenizer, rows and the layers to adapt.

Each is loaded or computed on first access, from the config and the constructor's arguments only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.adapters.coverage import Coverage, check_causal, cover, cover_config, probe, report
from folora.calibration.engine import Engine
from folora.calibration.source_files import mixture_of
from folora.calibration.sources import Mixture
from folora.calibration.vllm import engine_of
from folora.config import FoLoraConfig
from folora.data.contents import Row
from folora.data.files import load_rows
from folora.data.rows import TaskData, prepare_task
from folora.data.special_tokens import check_same_tokenizer, ending_ids, start_token_id
from folora.runtime import distributed
from folora.runtime.architecture import check_model, size_limits
from folora.runtime.fingerprints import model_facts
from folora.runtime.finiteness import check_finite_weights
from folora.runtime.loading import (
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    required,
)
from folora.spectral.groups import InputGroup


class Context:
    """Model, tokenizer, rows and layers of one run.

    Args:
        config: Options.
        model: The base model; default is to load ``config.model``.
        tokenizer: Of the model; default is to load it.
        dataset: Rows, a `datasets.Dataset`, a file or a Hub name; default is ``config.dataset``.

    Attributes:
        given: The model that was given, as it is; None if it is loaded by its name.
        given_tokenizer: The tokenizer that was given, or None.
    """

    def __init__(
        self,
        config: FoLoraConfig,
        *,
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: str | Dataset | Sequence[Row] | None = None,
    ) -> None:
        self.config = config
        self._name = model if isinstance(model, str) else config.model
        self.given = None if isinstance(model, str) else model
        self.given_tokenizer = tokenizer
        self.dataset = config.dataset if dataset is None else dataset

    @property
    def name(self) -> str:
        """Hub name or folder of the model. Raises ConfigError if it is not given."""
        return required(self._name, "model")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base model, frozen. Raises FoLoraError if it cannot be loaded, or a weight is not finite."""
        model = self.given if self.given is not None else load_model(self.config, self.name)
        model.requires_grad_(False)  # before it runs; see load_model
        distributed.raise_together(lambda: check_finite_weights(model))
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        return load_tokenizer(self.config, self.name)

    @cached_property
    def model_config(self) -> Any:
        """The transformers config of the model; weights are not loaded."""
        if self.given is not None:
            return self.given.config
        return load_config(self.config, self.name)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Fingerprints of model and tokenizer, for manifests."""
        return model_facts(self.model, self.tokenizer)

    @cached_property
    def limits(self) -> dict[str, int | None]:
        """See `size_limits`."""
        return size_limits(self.model_config)

    @cached_property
    def start_id(self) -> int:
        """The start token of sampling."""
        if self.given is not None:
            generation = getattr(self.given, "generation_config", None)
        else:
            generation = load_generation_config(self.config, self.name)
        chosen = self.config.sampling.start_token
        return start_token_id(self.tokenizer, chosen, self.model_config, generation)

    @cached_property
    def mixture(self) -> Mixture:
        """The sources of the calibration set. Raises FoLoraError if one cannot be used."""
        return mixture_of(self.config.sampling, self.tokenizer, self.start_id, **self.limits)

    @cached_property
    def eos_ids(self) -> list[int]:
        """The tokens that end a sampled sequence."""
        return ending_ids(self.model, self.tokenizer, self.mixture.turn_ends)

    @cached_property
    def task(self) -> TaskData:
        """The tokenized rows. Raises ConfigError if there is no dataset, DataError if it is invalid."""
        dataset = required(None, "dataset") if self.dataset is None else self.dataset
        rows = load_rows(dataset, self.config.data.split)
        return prepare_task(rows, self.tokenizer, self.config.data, self.config.seed)

    @property
    def ends_early(self) -> bool:
        """Whether sampling may stop early, which requires the task rows."""
        wanted = self.config.sampling.may_end_early and self.config.base is None
        return wanted and self.dataset is not None

    @property
    def task_is_read(self) -> bool:
        """Whether the rows have been read already."""
        return "task" in vars(self)

    @cached_property
    def outline(self) -> Coverage:
        """Which layers are adapted, found from the model's config without weights."""
        return cover_config(self.config, self.model_config)[1]

    @cached_property
    def groups(self) -> list[InputGroup]:
        """The shared inputs of the layers to adapt, found on the loaded model.

        The report is logged if `outline` has not logged the same, as with quantized layers.
        """
        found = coverage_of(self.model, self.config, self.start_id)
        if "outline" not in vars(self) or found.groups != self.outline.groups:
            report(found)
        return found.groups

    @cached_property
    def own_engine(self) -> Engine | None:
        """The engine on the model itself; None if a server or ``sampling.sampler_model`` generates.

        Raises:
            ConfigError: The model cannot generate; two tokens are decoded to find out.
        """
        sampling = self.config.sampling
        if sampling.server is not None or sampling.sampler_model is not None:
            return None
        return engine_of(self.model, self.mixture, self.eos_ids, sampling, self.config.seed)

    def engine(self, seed: int | None = None) -> Engine:
        """The engine that generates the calibration set: the model, ``sampling.sampler_model``, or a server.

        Another `seed` than the config's gives other text.

        Raises:
            FoLoraError: It cannot be loaded or reached, or has another tokenizer.
        """
        if seed is None:
            seed = self.config.seed
            if self.own_engine is not None:
                return self.own_engine
        sampling, sampler = self.config.sampling, self.model
        if name := sampling.sampler_model:
            own = self.config.replace(revision=None, device=str(self.model.device))
            check_same_tokenizer(self.tokenizer, load_tokenizer(own, name), name)
            if sampling.server is None:
                sampler = load_model(own, name)
                distributed.raise_together(lambda: check_finite_weights(sampler))
        return engine_of(sampler, self.mixture, self.eos_ids, sampling, seed)


def coverage_of(model: PreTrainedModel, config: FoLoraConfig, start_id: int) -> Coverage:
    """Which layers of a model in memory are adapted, found by a forward pass over two short rows.

    Raises:
        ConfigError: The model is not a causal LM or already has an adapter, no layer can be adapted, or
            the adapter does not fit.
    """
    check_model(model)
    check_causal(model, start_id)
    return cover(model, config, probe(model, start_id))
