"""Settings: their schema, the named presets and methods, and how a run's settings are put together."""

from sparsae.config.parameterization import ParameterizationConfig
from sparsae.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    SparsityConfig,
    TeacherConfig,
    TrackingConfig,
    TrainingConfig,
)
from sparsae.config.section import Section
from sparsae.config.topology import (
    AdaptationConfig,
    BurnInConfig,
    EvolutionConfig,
    GmpConfig,
    GranetConfig,
    GseConfig,
    MagnitudeConfig,
    MicroBatchConfig,
    ProxyConfig,
    ResetConfig,
    RiglConfig,
    RuleConfig,
    SetConfig,
    StaticConfig,
)

__all__ = [
    "AdaptationConfig",
    "BurnInConfig",
    "Config",
    "DataConfig",
    "EvolutionConfig",
    "GmpConfig",
    "GranetConfig",
    "GseConfig",
    "MagnitudeConfig",
    "MicroBatchConfig",
    "ModelConfig",
    "ParameterizationConfig",
    "ProxyConfig",
    "ResetConfig",
    "RiglConfig",
    "RuleConfig",
    "Section",
    "SetConfig",
    "SparsityConfig",
    "StaticConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
]
