"""`prepare` gives every process the same model, spectrum and optimizer as a single process."""

from __future__ import annotations

import numpy as np
import pytest
from support.closeness import assert_near
from support.processes import in_processes
from torch import from_numpy

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config

Array = np.ndarray


@pytest.mark.parametrize("tolerance", [None, 0.5], ids=["all sequences", "early stopping"])
def test_two_processes_match_one(tolerance: float | None) -> None:
    sampling = {"num_sequences": 500 if tolerance else 48, "tolerance": tolerance}
    config = tiny_config(sampling=sampling)

    def work() -> list[Array]:
        found = folora.prepare(make_llama(), make_tokenizer(), rows(), config)
        return [gamma.numpy() for gamma in (basis.gamma for basis in found.bases)]

    alone = work()
    for several in in_processes(2, work):
        assert isinstance(several, list), several
        for one, other in zip(alone, several, strict=True):
            assert_near(from_numpy(one), from_numpy(other), roundings=1e4)
