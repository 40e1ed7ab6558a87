from . import commands
from .adapter import ExportReport, attach, export_adapter, export_merged, lora_factors
from .config import (
    AdapterConfig,
    DataConfig,
    FoLoraConfig,
    SamplingConfig,
    SpectrumConfig,
    StatisticsConfig,
    TrainingConfig,
)
from .engine import HuggingFaceEngine
from .errors import (
    ArtifactError,
    ConfigError,
    DataError,
    FoLoraError,
    MismatchError,
    NumericsError,
    ServerError,
)
from .lowrank import narrow_inputs
from .meter import Meter, Reading
from .preparation import Prepared, param_groups, prepare
from .proxies import ProxySet
from .sadam import SAdam
from .sampling import sample
from .serving import VllmEngine, served
from .solving import GroupBasis, solve
from .spectrum import Spectrum, generalized_eigenbasis, spectral_gate, step_scale
from .training import FoLoraTrainer, sft_config

__version__: str

__all__ = [
    "AdapterConfig",
    "ArtifactError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "ExportReport",
    "FoLoraConfig",
    "FoLoraError",
    "FoLoraTrainer",
    "GroupBasis",
    "HuggingFaceEngine",
    "Meter",
    "MismatchError",
    "NumericsError",
    "Prepared",
    "ProxySet",
    "Reading",
    "SAdam",
    "SamplingConfig",
    "ServerError",
    "Spectrum",
    "SpectrumConfig",
    "StatisticsConfig",
    "TrainingConfig",
    "VllmEngine",
    "attach",
    "commands",
    "export_adapter",
    "export_merged",
    "generalized_eigenbasis",
    "lora_factors",
    "narrow_inputs",
    "param_groups",
    "prepare",
    "sample",
    "served",
    "sft_config",
    "solve",
    "spectral_gate",
    "step_scale",
]
