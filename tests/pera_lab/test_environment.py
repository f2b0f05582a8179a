"""Versions and hardware of this machine."""

import pytest
import torch

from pera_lab import environment
from pera_lab.environment import fast_dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_the_fast_dtype_of_a_processor_that_computes_in_it(native, dtype, monkeypatch):
    monkeypatch.setattr(environment, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert fast_dtype() == dtype


def test_env_lists_versions_and_missing_packages(pera, monkeypatch):
    monkeypatch.setattr("pera_lab.environment.PACKAGES", ("torch", "no-such-package"))
    shown = pera("env").out
    assert f"torch: {torch.__version__}" in shown
    assert "no-such-package: not installed" in shown
