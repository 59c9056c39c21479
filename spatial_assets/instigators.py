"""A sensor's cursor, kept where the daemon of this workspace keeps it.

The daemon finds the state of a sensor by code location, repository and sensor name, so the location's name here must be
the one in `workspace.yaml`.
"""

from __future__ import annotations

import sys

import dagster as dg
from dagster._core.definitions.selector import InstigatorSelector
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    SensorInstigatorData,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

LOCATION = "spatial_assets"
REPOSITORY = "__repository__"


def _origin(sensor_name: str) -> RemoteInstigatorOrigin:
    target = LoadableTargetOrigin(executable_path=sys.executable, module_name="spatial_assets.definitions")
    location = ManagedGrpcPythonEnvCodeLocationOrigin(loadable_target_origin=target, location_name=LOCATION)
    return RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, REPOSITORY), sensor_name)


def _state(instance: dg.DagsterInstance, sensor_name: str) -> InstigatorState | None:
    selector = InstigatorSelector(location_name=LOCATION, repository_name=REPOSITORY, name=sensor_name)
    return instance.get_instigator_state(_origin(sensor_name).get_id(), selector.get_id())


def remembered_cursor(instance: dg.DagsterInstance, sensor_name: str) -> str | None:
    """The cursor of the sensor's last tick, by whomever it was evaluated."""
    state = _state(instance, sensor_name)
    data = state.instigator_data if state is not None else None
    return data.cursor if isinstance(data, SensorInstigatorData) else None


def remember_cursor(instance: dg.DagsterInstance, sensor: dg.SensorDefinition, cursor: str | None) -> None:
    """Store a cursor; what else is recorded of the sensor (switched on or off, last tick) stays."""
    state = _state(instance, sensor.name)
    if state is not None and isinstance(state.instigator_data, SensorInstigatorData):
        instance.update_instigator_state(state.with_data(state.instigator_data._replace(cursor=cursor)))
        return
    data = SensorInstigatorData(
        min_interval=sensor.minimum_interval_seconds, cursor=cursor, sensor_type=sensor.sensor_type
    )
    instance.add_instigator_state(
        InstigatorState(_origin(sensor.name), InstigatorType.SENSOR, InstigatorStatus.DECLARED_IN_CODE, data)
    )
