"""Every option of folora, by the same names in Python, in a YAML file and on the command line.

Nothing below reads a config inside the mathematics: the functions there take plain numbers.
May import `folora.methods` and `folora.errors`.
"""

from folora.config.folora_config import FoLoraConfig, Option, option_names
from folora.config.renamed import REMEDIES
from folora.config.sections import (
    BOS,
    CHAT,
    FIRST_LOOK,
    LAMBDA,
    LEAST_SEQUENCES,
    LEAST_SHARE,
    S_MIN,
    SEEDS,
    TAU,
    AdapterConfig,
    DataConfig,
    SamplingConfig,
    SpectrumConfig,
    StatisticsConfig,
    TrainingConfig,
)
from folora.config.yaml_files import parse_yaml, read_yaml

__all__ = [
    "BOS",
    "CHAT",
    "FIRST_LOOK",
    "LAMBDA",
    "LEAST_SEQUENCES",
    "LEAST_SHARE",
    "REMEDIES",
    "SEEDS",
    "S_MIN",
    "TAU",
    "AdapterConfig",
    "DataConfig",
    "FoLoraConfig",
    "Option",
    "SamplingConfig",
    "SpectrumConfig",
    "StatisticsConfig",
    "TrainingConfig",
    "option_names",
    "parse_yaml",
    "read_yaml",
]
