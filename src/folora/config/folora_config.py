"""All sections together, from Python, nested dicts, a YAML file or dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from folora.config.options import Options, allowed, check_keys, explained, short, unknown
from folora.config.sections import (
    BOS,
    AdapterConfig,
    DataConfig,
    SamplingConfig,
    Seed,
    SpectrumConfig,
    StatisticsConfig,
    TrainingConfig,
)
from folora.config.yaml_files import read_yaml, to_yaml
from folora.errors import ConfigError
from folora.methods import METHODS, Method, method

ANCHOR = 0.08  # share of a step's tokens


def as_method(value: Any) -> Method:
    """A method from its name, or from a mapping of its name and the ingredients that differ.

    A mapping with a new name needs a title; it starts from the defaults.

    Raises:
        ConfigError: There is no such method or ingredient, or a value is outside of its interval.
    """
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return method(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"method is {short(value)}, but must be a name, or a mapping with a name and ingredients"
        )
    known = {"about": ""} if "title" in value else dict(method(value["name"]))
    try:
        return Method(**{**known, **dict(METHODS.get(value["name"], {})), **value})
    except ValidationError as error:
        raise ConfigError(explained(error, Method, "method")) from None


def _plain_method(found: Method) -> str | dict[str, Any]:
    """A method as `as_method` reads it back: its name, or a mapping of it and the ingredients that differ."""
    known = dict(METHODS.get(found.name, {}))
    others = {name: value for name, value in found if known.get(name) != value}
    return {"name": found.name, **others} if others else found.name


_Method = Annotated[Method, BeforeValidator(as_method), PlainSerializer(_plain_method)]


class FoLoraConfig(Options):
    """All options: which model, data, output folder and method, and the sections.

    Options that are not given have the defaults of the method, which `Method.settings` names, or else
    those below.
    """

    model: str | None = None
    """name on the Hub or a folder"""
    dataset: str | None = None
    """name on the Hub or a .json, .jsonl or .parquet file (.gz too)"""
    output: str | None = None
    """folder that receives everything"""
    base: str | None = None
    """file of 'folora base' with samples and C_pre of this model, instead of making them"""
    method: _Method = METHODS["folora"]
    """fine-tuning method by name, or a mapping of its name and other ingredients"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the base model; 'auto': the checkpoint's, or float32 on a CPU without products of it"""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """load the base by bitsandbytes"""
    shard: bool = False
    """with several processes each holds a part of the base's weights (FSDP2), from loading on"""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1', ..."""
    revision: str | None = None
    """revision of the model on the Hub"""
    trust_remote_code: bool = False
    """let the model's repository run its own code"""
    seed: Seed = 0
    """seed of sampled text, held-out rows, initialization and training"""
    budget: float | None = Field(None, gt=0)
    """most KL to the base, in nats per token on held-out calibration text: training weighs the anchor by it,
    and the adapter is scaled to it"""
    anchor: float | None = Field(None, ge=0, le=0.5)
    """share of a training step's tokens that are calibration text, on which KL to the base is added to the
    loss; default: 0.08 with a budget or where the method has a KL weight, else 0"""
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig = DataConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    spectrum: SpectrumConfig = SpectrumConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _with_settings(cls, values: Any) -> Any:
        """Fill in the options whose defaults the method changes."""
        if not isinstance(values, dict) or "method" not in values:
            return values
        found = as_method(values["method"])
        filled: dict[str, Any] = {**values, "method": found}
        for name, value in found.settings.items():
            section, _, option = name.partition(".")
            given = filled.get(section, {})
            if isinstance(given, Options) and option not in given.model_fields_set:
                filled[section] = given.replace(**{option: value})
            elif isinstance(given, Mapping):
                filled[section] = {option: value, **given}
        return filled

    @model_validator(mode="after")
    def _check(self) -> FoLoraConfig:
        kept, r = self.directions, self.adapter.r
        if kept is not None and kept < r and self.method.init == "eigen":
            raise ConfigError(
                f"spectrum.directions is {kept}, but must be >= adapter.r ({r}): the initialization "
                "spans so many"
            )
        if self.shard and self.quantize != "none":
            raise ConfigError(
                f"quantize is {self.quantize!r}, but must be 'none' with shard: packed weights are not "
                "sharded"
            )
        if self.anchor and not self.anchor_share:
            raise ConfigError(
                f"anchor is {self.anchor:g}, but its KL has no weight: give budget, or method.kl_weight"
            )
        return self

    @property
    def directions(self) -> int | None:
        """Number of leading columns of each basis that A is stepped along; None for all."""
        given = self.spectrum.directions
        if given == "all":
            return None
        return self.adapter.r if given is None else int(given)

    @property
    def protected(self) -> int:
        """OPLoRA's k, or 0 without the constraint."""
        return 0 if self.method.constraint == "none" else self.method.protect or self.adapter.r

    @property
    def training_seed(self) -> int:
        """Seed of initialization and training: SFTConfig's own if it is given."""
        return self.seed if self.training.seed is None else self.training.seed

    @property
    def anchor_share(self) -> float:
        """Share of a training step's tokens that the anchor takes."""
        wanted = self.budget is not None or self.method.kl_weight > 0
        return (ANCHOR if self.anchor is None else self.anchor) if wanted else 0.0

    @property
    def ends_early(self) -> bool:
        """Whether sampling stops early when it has converged for the task, whose rows it then needs."""
        return self.sampling.may_end_early and self.base is None and self.dataset is not None

    @classmethod
    def paper(cls, **changes: Any) -> FoLoraConfig:
        """The settings of arXiv:2606.00132, as far as the paper states them.

        Null-space initialization, the whole basis, unscaled, lambda 1, s_min .3, 2000 sequences of 128 to
        512 tokens, 256 task examples, cosine schedule with 3 % warm-up, clipping at 1, no decay.
        `changes` are top-level fields such as ``model=...`` or whole sections.
        """
        settings: dict[str, Any] = {
            "method": "folora-paper",
            "sampling": SamplingConfig(max_new_tokens=512, tolerance=None, sources={BOS: 1.0}),
            "statistics": StatisticsConfig(task_examples=256),
            "spectrum": SpectrumConfig(tau=1e-3, lam=1.0),
            "adapter": AdapterConfig(r=128),
        }
        return cls(**{**settings, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FoLoraConfig:
        """Build a config from nested dicts, as YAML gives them.

        Raises:
            ConfigError: An unknown name (the nearest right one is given), a wrong type, or a value
                outside of its interval.
        """
        check_keys(values)
        for name in values:
            section, _, option = name.partition(".")
            if option and name in OPTIONS:
                raise ConfigError(
                    f"option {name!r} must be nested in a file: {option} under {section}"
                )
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> FoLoraConfig:
        """Read a config file. Raises ConfigError as `from_dict`, or if it is no YAML mapping."""
        return cls.from_dict(read_yaml(path))

    def changed(self, changes: Mapping[str, Any]) -> FoLoraConfig:
        """This config with options changed by dotted name (``method.protect`` too), and checked again.

        A new method brings its own settings along, over those of this config.

        Raises:
            ConfigError: As `from_dict`.
        """
        for name in changes:
            check_name(name)
        values = self.differences()
        if "method" in changes:
            settings = as_method(changes["method"]).settings
            values = {name: v for name, v in values.items() if name not in settings}
        return FoLoraConfig.from_dict(nested({**values, **changes}))

    def differences(self) -> dict[str, Any]:
        """The options that differ from the method's defaults, by dotted name; `changed` takes them back."""
        plain, mine = FoLoraConfig(method=self.method)._flat(), self._flat()
        found = {name: v for name, v in mine.items() if name not in plain or v != plain[name]}
        own = {} if self.method == METHODS["folora"] else {"method": _plain_method(self.method)}
        return own | found

    def _flat(self) -> dict[str, Any]:
        """All options but the method, by dotted name."""
        names = [*OPTIONS, *(f"training.{name}" for name in self.training.model_extra or {})]
        return {name: attrgetter(name)(self) for name in names if name != "method"}

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values, for YAML and JSON."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """The text of a config file that `from_yaml` reads back."""
        return to_yaml(self.model_dump(mode="json"))


class Option(NamedTuple):
    """One option, for help texts and tables."""

    help: str
    default: Any  # of the method `folora`
    type: Any
    allowed: str  # its interval, "" if there is none


def option_names() -> dict[str, Option]:
    """Every option by its dotted name; of SFTConfig's those with a default or an interval of folora."""
    found: dict[str, Option] = {}
    for name, field in FoLoraConfig.model_fields.items():
        if isinstance(field.default, Options):
            for option, inner in type(field.default).model_fields.items():
                found[f"{name}.{option}"] = _option(inner)
        else:
            found[name] = _option(field)
    return found


def _option(field: FieldInfo) -> Option:
    default = field.default.name if isinstance(field.default, Method) else field.default
    help = " ".join((field.description or "").split())
    return Option(help, default, field.annotation, allowed(field))


OPTIONS = option_names()
SECTIONS = tuple(n for n, f in FoLoraConfig.model_fields.items() if isinstance(f.default, Options))


def check_name(name: Any) -> None:
    """Refuse what is no option, no section and no ingredient of a method. Raises ConfigError."""
    section, _, option = str(name).partition(".")
    fine = name in OPTIONS or name in SECTIONS or (section == "training" and option.isidentifier())
    if not fine and not (section == "method" and option in Method.model_fields):
        raise ConfigError(unknown(str(name), OPTIONS))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested dicts; a whole section or method goes before its options."""
    found: dict[str, Any] = {}
    for name in sorted(values, key=lambda n: "." in n):
        section, _, option = name.partition(".")
        if option:
            inner = found.get(section, "folora" if section == "method" else {})
            inner = dict(inner) if isinstance(inner, Mapping | BaseModel) else {"name": inner}
            found[section] = {**inner, option: values[name]}
        else:
            found[name] = values[name]
    return found
