from .adapters.adapter import attach, lora_factors
from .adapters.export import ExportReport, export_adapter, export_merged
from .adapters.low_rank import narrow_inputs
from .calibration.calibration_set import CalibrationSet
from .calibration.engine import HuggingFaceEngine
from .calibration.moments import calibrate
from .calibration.sampling import sample
from .calibration.vllm import VllmEngine, find_server
from .config import (
    AdapterConfig,
    DataConfig,
    FoLoraConfig,
    SamplingConfig,
    SpectrumConfig,
    StatisticsConfig,
    TrainingConfig,
)
from .errors import (
    ArtifactError,
    ConfigError,
    DataError,
    FoLoraError,
    MismatchError,
    NumericsError,
    ServerError,
)
from .metrics.budget import BudgetFit, fit_budget
from .metrics.meter import Meter, Reading
from .optim.fused import FusedSAdam as SAdam
from .pipeline.prepare import prepare
from .spectral.eigenproblem import generalized_eigenbasis, spectral_gate, step_scale
from .spectral.layers import GroupBasis, Spectrum, solve
from .spectral.moments import Moments
from .training.arguments import sft_config
from .training.optimizer import optimizer, param_groups
from .training.prepared import Prepared
from .training.trainer import FoLoraTrainer

__version__: str

__all__ = [
    "AdapterConfig",
    "ArtifactError",
    "BudgetFit",
    "CalibrationSet",
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
    "Moments",
    "NumericsError",
    "Prepared",
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
    "calibrate",
    "export_adapter",
    "export_merged",
    "find_server",
    "fit_budget",
    "generalized_eigenbasis",
    "lora_factors",
    "narrow_inputs",
    "optimizer",
    "param_groups",
    "prepare",
    "sample",
    "sft_config",
    "solve",
    "spectral_gate",
    "step_scale",
]
