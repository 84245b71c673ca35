"""Configuration: Hydra composes it, dataclasses hold it, validation happens once, at the edge.

Nothing here imports torch; Hydra is imported when something is composed.
"""

from rcpo.config.data import DataConfig, SourceConfig
from rcpo.config.judge import EndpointConfig, JudgeConfig
from rcpo.config.parsing import load_run_config, parse, save_run_config, to_container
from rcpo.config.schema import (
    AdapterConfig,
    CalibrationConfig,
    CheckpointConfig,
    ConfigError,
    DynamicsConfig,
    EngineConfig,
    EvalConfig,
    LaunchConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ProbeConfig,
    ReferenceConfig,
    RunConfig,
    RunError,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "AdapterConfig",
    "CalibrationConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DynamicsConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvalConfig",
    "JudgeConfig",
    "LaunchConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ProbeConfig",
    "ReferenceConfig",
    "RunConfig",
    "RunError",
    "SourceConfig",
    "TrainConfig",
    "WandbConfig",
    "load_run_config",
    "parse",
    "save_run_config",
    "to_container",
]
