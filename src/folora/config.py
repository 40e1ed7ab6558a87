"""Every option of folora: a few dataclasses, validated where they are built.

The same names serve in Python, in a YAML file and as command line flags
(``--spectrum.tau 1e-3``). Nothing below this file reads a config inside the mathematics: the
functions there take plain numbers.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from folora.errors import ConfigError, nearest

TAU = 1e-3  # ridge, relative to the mean of C_pre's diagonal
LAMBDA = 1.0  # gamma at which a step is halved
S_MIN = 0.3  # floor of the gate

StepScale = Literal["task", "paper"]
Basis = Literal["generalized", "pretraining", "whitening"]
Init = Literal[
    "eigen",
    "null_space",
    "null_space_zero",
    "kaiming",
    "minor_singular",
    "corda",
    "lora_null",
]

_STRICT = ConfigDict(extra="forbid")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 300  # a path stays whole
LARGEST_FILE = 2**20  # bytes of a config file; a data set given by mistake is not read for minutes
# Sequences, after which it is first asked whether they are enough. Of the 64 that are decoded at once four may be
# rejected before that takes another batch.
FIRST_LOOK = 60
LARGEST_NUMBER = 64  # bits of an integer in a file
SEEDS = 2**32  # numpy takes no larger ones
REMOVED = {
    "spectrum.beyond": "A moves along the first spectrum.directions eigenvectors alone; give more of them to "
    "move it along more",
    "spectrum.storage": "bases are float32 on the device of the model; give fewer spectrum.directions if they "
    "do not fit",
}
"""Options of earlier versions, by dotted name: what holds now, and the remedy."""


def _option(default: Any, help: str) -> Any:
    """A field with the sentence that the command line shows for it."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {_short(value)}, but must {allowed}")


def _check_types(config: Any) -> None:
    """Refuse values of wrong types in a section, and make sections of dicts, as `from_dict` does.

    Raises:
        ConfigError: The option and its value are named.
    """
    section = next((n for n, t in get_type_hints(FoLoraConfig).items() if t is type(config)), None)
    for name, (hint, adapter) in _types(type(config)).items():  # type: ignore[arg-type]
        value, full = getattr(config, name), f"{section}.{name}" if section else name
        if isinstance(value, Mapping) and hasattr(hint, "__dataclass_fields__"):
            found: Any = getattr(FoLoraConfig.from_dict({name: dict(value)}), name)
        else:
            if isinstance(value, bool) and {hint, *get_args(hint)} & {int, float}:
                raise ConfigError(f"{full} is {value!r}, but must be a number")
            try:
                found = adapter.validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ConfigError(f"{full} is {_short(value)}: {reason}") from None
        object.__setattr__(config, name, found)


@cache
def _types(kind: Any) -> dict[str, tuple[Any, TypeAdapter]]:
    """Type and validator of every field of a section."""
    return {name: (hint, TypeAdapter(hint)) for name, hint in get_type_hints(kind).items()}


def _require_json(value: object, name: str) -> None:
    """Requests and results keep options as JSON; YAML also knows dates, sets and bytes."""
    try:
        json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is {_short(value)}, which JSON does not hold: {error}") from None


def _require_seed(seed: int, name: str) -> None:
    _require(0 <= seed < SEEDS, name, seed, f"lie in [0, {SEEDS})")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The proxy set: text that the pretrained model writes itself (paper 3.4, B.4)."""

    __pydantic_config__ = _STRICT
    num_sequences: int = _option(
        2000, "at most so many sequences that pass the filter, held-out ones included"
    )
    tolerance: float | None = _option(
        4.0,
        "end before that if the leading directions found on half of the samples cost at most so much "
        "more on the other half; 'null': never",
    )
    min_new_tokens: int = _option(128, "end-of-sequence is allowed only after so many tokens")
    max_new_tokens: int = _option(256, "a sequence is cut here")
    batch_size: int | None = _option(
        None,
        "sequences decoded at once; changes the sampled set by rounding alone. Default: 64, on an accelerator "
        "up to 256, or 1024 where it never ends early, as the memory allows, and 256 of a server",
    )
    seed: int = _option(0, "seed of the random draws; each sequence has its own stream")
    start_token: str | None = _option(
        None,
        "token to start from: 'eos' or a token's text; default: the tokenizer's BOS, or the model's, or what "
        "separates documents",
    )
    ignore_eos: bool = _option(
        False, "let a sequence run through the end of a document; for models of short documents"
    )
    held_out: float = _option(0.05, "share set aside for the meter (at least 16 sequences)")
    sampler_model: str | None = _option(
        None, "another model, with the same tokenizer, that writes the text"
    )
    server: str | None = _option(
        None,
        "URL of a running 'vllm serve MODEL' that writes it, for example http://localhost:8000",
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.num_sequences >= 32, "sampling.num_sequences", self.num_sequences, "be >= 32")
        _require(
            self.min_new_tokens >= 1, "sampling.min_new_tokens", self.min_new_tokens, "be >= 1"
        )
        _require(
            self.max_new_tokens >= self.min_new_tokens,
            "sampling.max_new_tokens",
            self.max_new_tokens,
            f"be >= sampling.min_new_tokens ({self.min_new_tokens})",
        )
        _require(
            self.max_new_tokens >= 32,
            "sampling.max_new_tokens",
            self.max_new_tokens,
            "be >= 32, since shorter sequences are rejected",
        )
        if self.batch_size is not None:
            _require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "be >= 1")
        _require_seed(self.seed, "sampling.seed")
        if self.tolerance is not None:
            _require(
                0 < self.tolerance < float("inf"),
                "sampling.tolerance", self.tolerance, "be finite and > 0, or null",
            )  # fmt: skip
        _require(0 <= self.held_out < 0.5, "sampling.held_out", self.held_out, "lie in [0, 0.5)")
        if self.server is not None:
            _require(
                re.match(r"https?://[^/\s]", self.server) is not None,
                "sampling.server", self.server, "begin with http:// or https:// and a host",
            )  # fmt: skip

    @property
    def may_end_early(self) -> bool:
        """Whether it is ever asked if there are enough."""
        return self.tolerance is not None and self.num_sequences >= 2 * FIRST_LOOK

    @property
    def num_held_out(self) -> int:
        """Sequences set aside for the meter."""
        return max(16, round(self.held_out * self.num_sequences))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The target task's rows and how they become prompts and responses."""

    __pydantic_config__ = _STRICT
    split: str = _option("train", "split to train on (Hub data sets)")
    prompt_column: str | None = _option(None, "column of the prompt; default: found by its name")
    response_column: str | None = _option(None, "column of the response; likewise")
    chat_template: bool | None = _option(
        None,
        "wrap instruction/response rows in the tokenizer's chat template; default: if it has one",
    )
    max_length: int = _option(1024, "rows are cut after so many tokens")
    eval_rows: int = _option(64, "rows held out for the task loss (at most a tenth of the rows)")
    seed: int = _option(0, "seed of the choice of held-out rows")

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.max_length >= 2, "data.max_length", self.max_length, "be >= 2")
        _require(self.eval_rows >= 0, "data.eval_rows", self.eval_rows, "be >= 0")
        _require_seed(self.seed, "data.seed")


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """The two second moments (B.2)."""

    __pydantic_config__ = _STRICT
    task_examples: int = _option(128, "rows of the task for C_task")
    batch_size: int = _option(8, "sequences a forward pass")
    memory_gb: float | None = _option(
        None,
        "GB that the matrices may take at once; for more layers the texts are read again. Default: half "
        "of what an accelerator has free",
    )

    def __post_init__(self) -> None:
        _check_types(self)
        if self.memory_gb is not None:
            _require(
                0 < self.memory_gb < float("inf"), "statistics.memory_gb", self.memory_gb, "be > 0"
            )
        _require(self.task_examples >= 1, "statistics.task_examples", self.task_examples, "be >= 1")
        _require(self.batch_size >= 1, "statistics.batch_size", self.batch_size, "be >= 1")


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig:
    """Ridge and gate (Eq. 10-17)."""

    __pydantic_config__ = _STRICT
    tau: float = _option(TAU, "ridge, relative to the mean of C_pre's diagonal")
    lam: float = _option(LAMBDA, "lambda: the gamma at which a step is halved")
    s_min: float = _option(S_MIN, "floor of the gate")
    directions: int | Literal["all"] | None = _option(
        None,
        "so many leading directions of each basis are kept, or 'all'; default: adapter.r, the least",
    )
    basis: Basis = _option(
        "generalized",
        "'generalized', or for ablation 'pretraining' (C_pre's own) or 'whitening' (H^(-1/2))",
    )
    step_scale: StepScale = _option(
        "task", "'task': learning rates carry over from LoRA; 'paper': the basis as it is"
    )

    def __post_init__(self) -> None:
        _check_types(self)
        _require(0 <= self.tau < float("inf"), "spectrum.tau", self.tau, "be finite and >= 0")
        _require(0 <= self.lam < float("inf"), "spectrum.lam", self.lam, "be finite and >= 0")
        _require(0 <= self.s_min <= 1, "spectrum.s_min", self.s_min, "lie in [0, 1]")
        if isinstance(self.directions, int):
            _require(self.directions >= 1, "spectrum.directions", self.directions, "be >= 1")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The LoRA adapter and how it starts (B.3)."""

    __pydantic_config__ = _STRICT
    r: int = _option(16, "rank; PEFT's config has twice that where init gives B A other than 0")
    alpha: float | None = _option(None, "PEFT's lora_alpha; default: r, which makes kappa 1")
    target_modules: str | tuple[str, ...] = _option(
        "all-linear", "'all-linear', a list of module names, or a regular expression"
    )
    init: Init = _option(
        "eigen",
        "'eigen' (leading eigenvectors, B = 0), 'null_space' (the paper's), 'kaiming' (LoRA's), "
        "'null_space_zero', 'minor_singular' (MiLoRA), 'corda' or 'lora_null'",
    )
    constraint: Literal["none", "oplora"] = _option(
        "none", "'oplora' keeps the update off each weight's leading singular directions"
    )
    protect: int | None = _option(None, "how many directions OPLoRA protects; default: r")
    freeze_a: bool = _option(False, "train B alone")

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.r >= 1, "adapter.r", self.r, "be >= 1")
        if self.protect is not None:
            _require(self.protect >= 1, "adapter.protect", self.protect, "be >= 1")
        if self.alpha is not None:
            _require(0 < self.alpha < float("inf"), "adapter.alpha", self.alpha, "be > 0")
        _require(
            bool(self.target_modules), "adapter.target_modules", self.target_modules, "not be empty"
        )
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(
                    f"adapter.target_modules is {self.target_modules!r}, which is no regular "
                    f"expression: {error}"
                ) from error

    @property
    def protected(self) -> int:
        """OPLoRA's k, or 0 without the constraint."""
        return 0 if self.constraint == "none" else self.protect or self.r

    @property
    def scaling(self) -> float:
        """kappa, PEFT's `scaling`."""
        return (self.alpha if self.alpha is not None else self.r) / self.r


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What TRL's SFTTrainer is told; `extra` reaches any other of its options."""

    __pydantic_config__ = _STRICT
    optimizer: Literal["sadam", "adamw"] = _option("sadam", "'adamw' gives plain LoRA training")
    learning_rate: float = _option(2e-4, "peak learning rate of A")
    lr_b_ratio: float = _option(1.0, "learning rate of B over that of A")
    weight_decay: float = _option(0.0, "decoupled weight decay")
    num_train_epochs: float = _option(1.0, "passes over the data")
    max_steps: int = _option(-1, "steps; overrides num_train_epochs if > 0")
    batch_size: int = _option(8, "rows a device and step")
    gradient_accumulation_steps: int = _option(1, "backward passes a step")
    warmup_ratio: float = _option(0.03, "share of the steps for warm-up")
    lr_scheduler_type: str = _option("cosine", "any schedule of transformers")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    non_finite: Literal["stop", "skip"] = _option(
        "stop", "at a gradient with NaN or Inf: end with its layer's name, or pass over the step"
    )
    eval_steps: int = _option(0, "run the meter every so many steps; 0: only at the end")
    save_steps: int = _option(200, "steps between checkpoints")
    logging_steps: int = _option(10, "steps between log lines")
    gradient_checkpointing: bool = _option(False, "trade compute for memory")
    bf16: bool = _option(False, "bf16 autocast around the forward pass")
    seed: int = _option(0, "seed of initialization and data order")
    replay: float = _option(0.0, "share of the training rows that are self-samples")
    kl_weight: float = _option(
        0.0, "weight of the KL to the base on self-samples, added to the loss"
    )
    masked_kl_weight: float = _option(
        0.0, "weight of the KL to the base on the task without the target token (Mask-the-Target)"
    )
    extra: dict[str, Any] = _option({}, "any other option of trl.SFTConfig, by its name")

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("learning_rate", "lr_b_ratio"):
            value = getattr(self, name)
            _require(0 < value < float("inf"), f"training.{name}", value, "be finite and > 0")
        for name in ("weight_decay", "kl_weight", "masked_kl_weight", "max_grad_norm"):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), f"training.{name}", value, "be finite and >= 0")
        _require(0 <= self.replay < 1, "training.replay", self.replay, "lie in [0, 1)")
        _require(
            self.max_steps > 0 or 0 < self.num_train_epochs < float("inf"),
            "training.num_train_epochs",
            self.num_train_epochs,
            "be finite and > 0 (or give training.max_steps)",
        )
        _require_json(self.extra, "training.extra")
        _require_seed(self.seed, "training.seed")
        for name in ("batch_size", "gradient_accumulation_steps", "save_steps", "logging_steps"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "be >= 1")
        _require(self.eval_steps >= 0, "training.eval_steps", self.eval_steps, "be >= 0")
        _require(
            0 <= self.warmup_ratio < 1, "training.warmup_ratio", self.warmup_ratio, "lie in [0, 1)"
        )


@dataclass(frozen=True, kw_only=True)
class FoLoraConfig:
    """All sections together, and which model, data set and output folder they are about."""

    __pydantic_config__ = _STRICT
    model: str | None = _option(None, "a Hub name or a folder")
    dataset: str | None = _option(None, "a Hub name or a .json, .jsonl or .parquet file (.gz too)")
    output: str | None = _option(None, "folder that receives everything")
    base: str | None = _option(
        None, "file of 'folora base' with samples and C_pre of this model, instead of making them"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "of the base model; 'auto': the checkpoint's, or float32 on a CPU that has no products of it",
    )
    quantize: Literal["none", "8bit", "4bit"] = _option("none", "load the base by bitsandbytes")
    shard: bool = _option(
        False,
        "with several processes each holds a part of the base's weights (FSDP2), from loading on",
    )
    device: str = _option("auto", "'auto', 'cpu', 'cuda', 'cuda:1', ...")
    revision: str | None = _option(None, "revision of the model on the Hub")
    trust_remote_code: bool = _option(False, "let the model's repository run its own code")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        kept, r = self.directions, self.adapter.r
        _require(
            kept is None or kept >= r or self.adapter.init != "eigen",
            "spectrum.directions", kept, f"be >= adapter.r ({r}): the start spans so many",
        )  # fmt: skip
        _require(
            not self.shard or self.quantize == "none",
            "quantize", self.quantize, "be 'none' with shard: packed weights are not shared out",
        )  # fmt: skip

    @property
    def directions(self) -> int | None:
        """How many leading columns of each basis A is stepped along; None for all."""
        given = self.spectrum.directions
        if given == "all":
            return None
        return self.adapter.r if given is None else int(given)

    @property
    def ends_early(self) -> bool:
        """Whether sampling ends when it is enough for the task, which it then reads."""
        return self.sampling.may_end_early and self.base is None and self.dataset is not None

    @classmethod
    def paper(cls, **changes: Any) -> FoLoraConfig:
        """The settings of arXiv:2606.00132, as far as the paper states them.

        Null-space start, the whole basis, unscaled, lambda 1, s_min .3, 2000 sequences of 128 to 512 tokens,
        256 task examples, cosine schedule with 3 % warm-up, clipping at 1, no decay. `changes` are
        top-level fields such as ``model=...`` or whole sections.
        """
        config = cls(
            sampling=SamplingConfig(max_new_tokens=512, tolerance=None),
            statistics=StatisticsConfig(task_examples=256),
            spectrum=SpectrumConfig(
                tau=1e-3, lam=1.0, s_min=0.3, step_scale="paper", directions="all"
            ),
            adapter=AdapterConfig(r=128, init="null_space"),
        )
        return replace(config, **changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FoLoraConfig:
        """Build a config from nested dicts, as YAML gives them.

        Raises:
            ConfigError: An unknown name (the nearest right one is given), a wrong type, or a value
                outside of its interval.
        """
        _refuse_booleans(values)
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(e, values) for e in error.errors())) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> FoLoraConfig:
        """Read a config file. Raises ConfigError as `from_dict`, or if it is no YAML mapping."""
        return cls.from_dict(read_yaml(path))

    def changed(self, changes: Mapping[str, Any]) -> FoLoraConfig:
        """This config with options changed, by dotted name, and checked again.

        Raises:
            ConfigError: As `from_dict`.
        """
        values = self.to_dict()
        for name, value in changes.items():
            *sections, last = str(name).split(".")
            target = values
            for section in sections:
                target = target.setdefault(section, {})
                if not isinstance(target, dict):  # an option that has no options
                    raise ConfigError(unknown_option(name))
            target[last] = value
        return FoLoraConfig.from_dict(values)

    def differences(self) -> dict[str, Any]:
        """The options that differ from their defaults, by dotted name; `changed` takes them back."""
        defaults = {name: info["default"] for name, info in option_names().items()}
        values = {name: attrgetter(name)(self) for name in defaults}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values, for YAML and JSON."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The text of a config file that `from_yaml` reads back."""
        values = self.to_dict()
        if isinstance(self.adapter.target_modules, tuple):
            values["adapter"]["target_modules"] = list(self.adapter.target_modules)
        return yaml.safe_dump(values, sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError if the file is missing or holds something else."""
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ConfigError("it is a named pipe or a device, but must be a regular file")
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"it has more than {LARGEST_FILE} bytes; is it a data set?")
        values = parse_yaml(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold names and values, not {type(values)}")
    return values


def parse_yaml(text: str) -> Any:
    """A YAML value, without what a config has no use for. Raises ConfigError.

    A name that is given twice would silently lose its first value, and aliases can grow a short text
    beyond all memory.
    """
    try:
        return yaml.load(text, _PlainYaml)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a month 13
        raise ConfigError(str(error)) from error
    except (AttributeError, LookupError, OverflowError, TypeError) as error:  # as of !!bool maybe
        raise ConfigError(f"a value is not what its tag says ({error!r})") from error
    except RecursionError:
        raise ConfigError("brackets are nested too deeply") from None


class _PlainYaml(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in seen:
                problem = f"{key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int:
        """An integer; those that Python does not print are not needed either."""
        number = self.construct_yaml_int(node)
        if number.bit_length() > LARGEST_NUMBER:
            problem = f"an integer of {number.bit_length()} bits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number


_PlainYaml.add_constructor("tag:yaml.org,2002:int", _PlainYaml.construct_number)


def option_names(cls: Any = FoLoraConfig, prefix: str = "") -> dict[str, dict[str, Any]]:
    """All options by dotted name, each with its help text, default and type."""
    names: dict[str, dict[str, Any]] = {}
    hints = get_type_hints(cls)
    instance = cls()
    for name, info in cls.__dataclass_fields__.items():
        if hasattr(hints[name], "__dataclass_fields__"):
            names |= option_names(hints[name], f"{prefix}{name}.")
        else:
            names[prefix + name] = {
                "help": info.metadata["help"],
                "default": getattr(instance, name),
                "type": hints[name],
            }
    return names


def unknown_option(name: str) -> str:
    """The message for a name that is no option, with the nearest one, or the remedy if it was removed."""
    if name in REMOVED:
        return f"option {name!r} was removed; leave it out: {REMOVED[name]}"
    return f"unknown option {name!r}{nearest(name, option_names())}"


def _explain(error: Any, values: dict[str, Any]) -> str:
    """One sentence for one of pydantic's errors."""
    parts = [str(part) for part in error["loc"]]
    # Of a value that may be of several types pydantic adds which one it tried.
    tried = (".".join(parts[:end]) for end in range(1, len(parts)))
    name = next((option for option in tried if option in option_names()), ".".join(parts))
    if name in option_names() and error["type"] == "unexpected_keyword_argument":
        section, _, option = name.partition(".")
        return f"option {name!r} must be nested in a file: {option} under {section}"
    if error["type"] == "unexpected_keyword_argument":
        return unknown_option(name)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    remedy = "; put it in quotes" if error["type"] == "string_type" else ""
    return f"{name} is {_short(error['input'])}: {error['msg']}{remedy}"


def _refuse_booleans(values: dict[str, Any]) -> None:
    """YAML reads yes and on as true, which pydantic would take for 1. Raises ConfigError."""
    for name, info in option_names().items():
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        types = {info["type"], *get_args(info["type"])}
        if isinstance(value, bool) and types & {int, float}:
            raise ConfigError(f"{name} is {value!r}, but must be a number")


def _short(value: object) -> str:
    """A value as Python writes it, cut where it would fill the screen."""
    return _REPR.repr(value)
