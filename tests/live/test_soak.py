"""Twenty thousand requests leave nothing behind."""

from __future__ import annotations

import pytest

from bench.soak import run


@pytest.mark.slow
def test_memory_and_files_of_every_process_are_flat_over_20000_requests():
    soaked = run(20000)
    assert soaked.broken() == []
    assert soaked.ends["OK"] > 16000
    assert set(soaked.memory_kb[0]) == {
        "coordinator", "gateway-0", "gateway-1", "prefill-0", "prefill-1", "decode-0", "decode-1",
    }  # fmt: skip
