"""Settings: their schema, the named presets and methods, and how a run's settings are put together.

The settings of a topology rule are in the rule's own file: `from sparsae.rules import RiglConfig`.
"""

from sparsae.config.data import DataConfig
from sparsae.config.parameterization import ParameterizationConfig
from sparsae.config.rules import BurnInConfig, MicroBatchConfig, RuleConfig
from sparsae.config.schedule import ScheduleConfig
from sparsae.config.schema import Config, ModelConfig, SparsityConfig, TrackingConfig
from sparsae.config.section import Section
from sparsae.config.span import Span
from sparsae.config.teacher import TeacherConfig
from sparsae.config.training import TrainingConfig

__all__ = [
    "BurnInConfig",
    "Config",
    "DataConfig",
    "MicroBatchConfig",
    "ModelConfig",
    "ParameterizationConfig",
    "RuleConfig",
    "ScheduleConfig",
    "Section",
    "Span",
    "SparsityConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainingConfig",
]
