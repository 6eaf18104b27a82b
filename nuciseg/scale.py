"""How many workers a run has, and what each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from nuciseg.section import Section


class WorkerRange(Section):
    """As many workers as there is room for, within bounds."""

    min: int = Field(ge=1, description="fewest workers that a run goes on with")
    max: int = Field(ge=1, description="most workers, as soon as there is room for them")

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}: swap them, or give one number")
        return self


FORMS = _NUMBER, _RANGE = "(number)", "(range)"
"""How pydantic names the two in the place of an error; no key can be called so."""


class ScaleConfig(Section):
    """Workers and what each has."""

    num_workers: Annotated[
        Annotated[int, Field(ge=1), Tag(_NUMBER)] | Annotated[WorkerRange, Tag(_RANGE)],
        Discriminator(lambda value: _RANGE if isinstance(value, Mapping | WorkerRange) else _NUMBER),
    ] = Field(
        1,
        description="data-parallel workers of a run (of each trial in a search); a run may have a min and a max: it "
        "goes on with fewer where nodes are lost, with more where there is room",
    )
    use_gpu: bool | None = Field(None, description="one GPU a worker; none: where the cluster has, or may get, GPUs")
    cpus_per_worker: int | None = Field(None, ge=1, description="CPUs a worker; none: all, in a trial 1 (GPU: 4)")

    @property
    def min_workers(self) -> int:
        """The workers without which there is no training."""
        return self.num_workers.min if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def max_workers(self) -> int:
        """The workers that train where there is room for all."""
        return self.num_workers.max if isinstance(self.num_workers, WorkerRange) else self.num_workers
