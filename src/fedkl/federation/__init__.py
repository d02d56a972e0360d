"""Federated training in this process, and what its keys are worth."""

from fedkl.federation.aggregate import aggregate, check_update
from fedkl.federation.client import ClientResult, ClientTask, Update, Workspace, client_update
from fedkl.federation.config import (
    METHODS,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    RenewalConfig,
    RunConfig,
    TrainingConfig,
    config_from,
    load_config,
)
from fedkl.federation.engine import run
from fedkl.federation.evaluate import Accuracy
from fedkl.federation.events import Event, RunResult
from fedkl.federation.length import at_length

__all__ = [
    "METHODS",
    "Accuracy",
    "ClientResult",
    "ClientTask",
    "DataConfig",
    "EvaluationConfig",
    "Event",
    "FederationConfig",
    "ModelConfig",
    "RenewalConfig",
    "RunConfig",
    "RunResult",
    "TrainingConfig",
    "Update",
    "Workspace",
    "aggregate",
    "at_length",
    "check_update",
    "client_update",
    "config_from",
    "load_config",
    "run",
]
