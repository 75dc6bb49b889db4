"""Settings: their schema, the named presets and methods, and how a run's settings are put together."""

from sparsae.config.schema import (
    AdaptationConfig,
    BurnInConfig,
    Config,
    DataConfig,
    EvolutionConfig,
    MicroBatchConfig,
    ModelConfig,
    ProxyConfig,
    ResetConfig,
    RuleConfig,
    Section,
    SparsityConfig,
    StaticConfig,
    TeacherConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AdaptationConfig",
    "BurnInConfig",
    "Config",
    "DataConfig",
    "EvolutionConfig",
    "MicroBatchConfig",
    "ModelConfig",
    "ProxyConfig",
    "ResetConfig",
    "RuleConfig",
    "Section",
    "SparsityConfig",
    "StaticConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
]
