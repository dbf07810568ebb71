"""Any order of calls and faults on an engine, see ``engine_machine``."""

import functools

from engine_machine import EngineMachine, Part, Reference
from hypothesis import HealthCheck, settings
from random_requests import tiny_model


@functools.cache
def reference() -> Reference:
    return Reference(tiny_model("llama"))


class WholeModelMachine(EngineMachine):
    """On the reference's own model."""

    def __init__(self) -> None:
        super().__init__(Part(reference().model), reference())


WholeModelMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEngineMachine = WholeModelMachine.TestCase
