"""A run with everything that it leaves to defaults, as its commands make it."""

from qtx.data.spec import DataSpec
from qtx.engines.machine import Machine
from qtx.jobs.resolving import make_data, make_machine, make_model, make_optim, make_train
from qtx.jobs.run import TrainSpec
from qtx.runs.reading import (
    RunSpec,
)


def whole(run: RunSpec) -> tuple[TrainSpec, DataSpec, Machine]:
    """All that a run decides before its data are read."""
    model = make_model(run)
    return make_train(run, model, make_optim(run, model)), make_data(run), make_machine(run)
