"""The sections of a config: sampling, data, statistics, spectrum, adapter and training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from folora.config.options import Options, short
from folora.config.renamed import removal
from folora.errors import ConfigError, nearest

TAU = 1e-3  # ridge, relative to the mean of C_pre's diagonal
LAMBDA = 1.0  # gamma at which a step is halved
S_MIN = 0.3  # floor of the gate

# Sequences before the first early-stopping check. Of a batch of 64, the filter may reject four before the check
# needs another batch.
FIRST_LOOK = 60
LEAST_SEQUENCES = 32
LEAST_SHARE = 0.05  # of the first sequences three, of which one is held out
SEEDS = 2**32  # numpy takes no larger ones

BOS, CHAT = "bos", "chat"
FILES = ("prompts", "texts")
KNOWN_SOURCES = f"{BOS}, {CHAT}, " + ", ".join(f"{kind}:FILE" for kind in FILES)

Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


class SamplingConfig(Options):
    """The calibration set: text that the pretrained model generates (paper 3.4, B.4)."""

    section: ClassVar[str] = "sampling"
    num_sequences: int = Field(2000, ge=LEAST_SEQUENCES)
    """most sequences that pass the filter, held-out ones included"""
    min_new_tokens: int = Field(128, ge=1)
    """tokens before the end-of-sequence token is allowed"""
    max_new_tokens: int = Field(256, ge=32)
    """tokens after which a sequence is cut"""
    tolerance: float | None = Field(4.0, gt=0)
    """stop sampling early if the leading directions found on half of the samples cost at most this many
    times as much on the other half; null: never"""
    batch_size: int | None = Field(None, ge=1)
    """sequences decoded at once; changes the samples by rounding alone. Default: 64, on an accelerator up
    to 256, or 1024 where sampling never stops early, as the memory allows, and 256 of a server"""
    held_out: float = Field(0.05, ge=0, lt=0.5)
    """share set aside to measure KL on (at least 16 sequences)"""
    start_token: str | None = None
    """token to start from: 'eos' or a token's text; default: the tokenizer's BOS, or the model's, or the
    separator of documents"""
    sampler_model: str | None = None
    """another model, with the same tokenizer, that generates the text"""
    sources: dict[str, float] | None = None
    """what the text is, by share: bos (from the start token), chat (both sides of dialogues), prompts:FILE
    (answered by the model), texts:FILE (as they are); default: half bos, half chat if the tokenizer has a
    chat template, else bos"""
    server: str | None = None
    """URL of a running 'vllm serve MODEL' that generates it, for example http://localhost:8000"""

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        if self.max_new_tokens < self.min_new_tokens:
            raise ConfigError(
                f"sampling.max_new_tokens is {self.max_new_tokens}, but must be >= "
                f"sampling.min_new_tokens ({self.min_new_tokens})"
            )
        if self.server is not None and not re.match(r"https?://[^/\s]", self.server):
            raise ConfigError(
                f"sampling.server is {short(self.server)}, but must begin with http:// or https:// and "
                "a host"
            )
        if self.sources is not None:
            check_shares(self.sources)
        return self

    @property
    def may_end_early(self) -> bool:
        """Whether there is an early-stopping check."""
        return self.tolerance is not None and self.num_sequences >= 2 * FIRST_LOOK

    @property
    def num_held_out(self) -> int:
        """Number of sequences set aside for the meter."""
        return max(16, round(self.held_out * self.num_sequences))


def check_shares(sources: Mapping[str, float]) -> None:
    """Refuse unknown sources, and shares that are no mixture. Raises ConfigError."""
    for name, share in sources.items():
        kind, _, file = name.partition(":")
        if name not in (BOS, CHAT) and not (kind in FILES and file):
            raise ConfigError(
                f"sampling.sources has {short(name)}, but sources are {KNOWN_SOURCES}"
                f"{nearest(name, (BOS, CHAT, *FILES))}"
            )
        if not LEAST_SHARE <= share <= 1:
            raise ConfigError(
                f"sampling.sources gives {name} a share of {share:g}, but it must lie in [{LEAST_SHARE:g}, 1]: of "
                "less text nothing could be held out"
            )
    if abs(sum(sources.values()) - 1) > 1e-6:
        raise ConfigError(
            f"the shares of sampling.sources sum to {sum(sources.values()):g}, but must sum to 1"
        )


class DataConfig(Options):
    """The target task's rows and how they become prompts and responses."""

    section: ClassVar[str] = "data"
    split: str = "train"
    """split to train on (data sets of the Hub)"""
    prompt_column: str | None = None
    """column of the prompt; default: found by its name"""
    response_column: str | None = None
    """column of the response; default: found by its name"""
    chat_template: bool | None = None
    """wrap instruction/response rows in the tokenizer's chat template; default: if it has one"""
    max_length: int = Field(1024, ge=2)
    """tokens after which a row is cut"""
    eval_rows: int = Field(64, ge=0)
    """rows held out for the task loss (at most a tenth of the rows)"""


class StatisticsConfig(Options):
    """The two second moments (B.2)."""

    section: ClassVar[str] = "statistics"
    task_examples: int = Field(128, ge=1)
    """rows of the task for C_task"""
    batch_size: int = Field(8, ge=1)
    """sequences in a forward pass"""
    memory_gb: float | None = Field(None, gt=0)
    """GB that the matrices may take at once; for more layers the texts are read again. Default: half of
    what an accelerator has free"""


class SpectrumConfig(Options):
    """Ridge and gate (Eq. 10-17)."""

    section: ClassVar[str] = "spectrum"
    tau: float = Field(TAU, ge=0)
    """ridge, relative to the mean of C_pre's diagonal"""
    lam: float = Field(LAMBDA, ge=0)
    """lambda: the gamma at which a step is halved"""
    s_min: float = Field(S_MIN, ge=0, le=1)
    """floor of the gate"""
    directions: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """number of leading eigenvectors that A is stepped along, or 'all'; default: adapter.r, the least"""


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class AdapterConfig(Options):
    """The LoRA adapter (B.3)."""

    section: ClassVar[str] = "adapter"
    r: int = Field(16, ge=1)
    """rank; PEFT's config has twice that where the method starts with B A other than 0"""
    alpha: float | None = Field(None, gt=0)
    """PEFT's lora_alpha; default: r, which makes kappa 1"""
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(_tuple)] = "all-linear"
    """'all-linear', a list of module names, or a regular expression"""

    @field_validator("target_modules")
    @classmethod
    def _check_target_modules(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not given:
            raise ConfigError(f"adapter.target_modules is {given!r}, but must not be empty")
        if isinstance(given, str):
            try:
                re.compile(given)
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(
                    f"adapter.target_modules is {short(given)}, which is no regular expression: {error}"
                ) from error
        return given

    @property
    def scaling(self) -> float:
        """kappa, PEFT's `scaling`."""
        return (self.alpha if self.alpha is not None else self.r) / self.r


class TrainingConfig(Options):
    """Options of trl.SFTConfig by their own names.

    The fields are those with another default or an interval here; every other option of SFTConfig may be
    given too, and is in ``model_extra``. `training.sft_options` says what becomes of each.
    """

    model_config = ConfigDict(extra="allow")
    section: ClassVar[str] = "training"
    learning_rate: float = Field(2e-4, gt=0)
    """peak learning rate of A, as usual for LoRA"""
    num_train_epochs: float = Field(1.0, gt=0)
    """passes over the rows"""
    max_steps: int = -1
    """steps; overrides num_train_epochs if > 0"""
    per_device_train_batch_size: int = Field(8, ge=1)
    """rows in a step of a process"""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """backward passes in a step"""
    warmup_steps: float = Field(0.03, ge=0)
    """steps of warm-up, or below 1 their share; 3 % as in the paper"""
    lr_scheduler_type: str = "cosine"
    """any schedule of transformers; the paper's"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay of A and B"""
    max_grad_norm: float = Field(1.0, ge=0)
    """norm that gradients are clipped to"""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """decay of SAdam's first moment"""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """decay of SAdam's second moment"""
    adam_epsilon: float = Field(1e-8, ge=0)
    """epsilon of SAdam"""
    eval_steps: int = Field(0, ge=0)
    """steps between measurements of task loss and KL; 0: at the end alone"""
    save_steps: int = Field(200, ge=1)
    """steps between checkpoints"""
    save_total_limit: int | None = Field(2, ge=1)
    """checkpoints that are kept; null: all"""
    logging_steps: int = Field(10, ge=1)
    """steps between log lines"""
    gradient_checkpointing: bool = False
    """trade compute for memory"""
    bf16: bool = False
    """bf16 autocast of the forward pass; the base keeps its own dtype"""
    seed: Seed | None = None
    """seed of initialization and order of rows; default: the option seed"""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Refuse options that were removed, which would be taken for options of SFTConfig."""
        for name in values if isinstance(values, Mapping) else ():
            if sentence := removal(f"training.{name}"):
                raise ConfigError(sentence)
        return values

    @model_validator(mode="after")
    def _check_extra(self) -> TrainingConfig:
        """Refuse values that JSON, in which requests and results keep options, cannot hold."""
        for name, value in (self.model_extra or {}).items():
            try:
                json.dumps(value, sort_keys=True, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"training.{name} is {short(value)}, which JSON does not hold: {error}"
                ) from None
        return self
