"""
What helps to test: the contract of a backend as a test, and pipelines run under injected faults.

    from jobq.testing import check_backend, simulate

    def test_my_backend_holds_the_contract():
        check_backend(MyBackend)

    def test_my_pipeline_holds_whatever_breaks():
        simulate(pipeline, seed=range(1000))
"""

from __future__ import annotations

from jobq.testing.contract import (
    RECIPES,
    Acting,
    Bench,
    Gate,
    Recipe,
    Rest,
    be_a_driver,
    check_backend,
    echo,
    gate,
    left_since,
    snapshot,
)
from jobq.testing.simulation import Simulation, SimulationFailed, simulate
from jobq.testing.world import Faults, InjectedFailure

__all__ = [
    "RECIPES",
    "Acting",
    "Bench",
    "Faults",
    "Gate",
    "InjectedFailure",
    "Recipe",
    "Rest",
    "Simulation",
    "SimulationFailed",
    "be_a_driver",
    "check_backend",
    "echo",
    "gate",
    "left_since",
    "simulate",
    "snapshot",
]
