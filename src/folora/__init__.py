"""folora: fine-tune a foundation model and keep what it already knew (arXiv:2606.00132)."""

from folora.adapter import ExportReport, attach, export_adapter, export_merged, lora_factors
from folora.config import (
    AdapterConfig,
    DataConfig,
    FoLoraConfig,
    SamplingConfig,
    SpectrumConfig,
    StatisticsConfig,
    TrainingConfig,
)
from folora.engine import HuggingFaceEngine
from folora.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    FoLoraError,
    MismatchError,
    NumericsError,
    ServerError,
)
from folora.lowrank import narrow_inputs
from folora.meter import Meter, Reading
from folora.preparation import Prepared, param_groups, prepare
from folora.proxies import ProxySet
from folora.sadam import SAdam
from folora.sampling import sample
from folora.serving import VllmEngine, served
from folora.solving import GroupBasis, solve
from folora.spectrum import Spectrum, generalized_eigenbasis, spectral_gate, step_scale
from folora.training import FoLoraTrainer, sft_config

__version__ = "0.1.0"

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
