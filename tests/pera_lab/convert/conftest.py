"""Fixtures for the tests of conversion."""

import pytest

from pera_lab.convert.merge import merge
from pera_lab.opening import locate_adapter


@pytest.fixture
def merge_adapter(tmp_path):
    """Merges the adapter in the folder "adapter" into the folder "merged"."""

    def call(**options):
        return merge(locate_adapter(str(tmp_path / "adapter")), tmp_path / "merged", **options)

    return call


@pytest.fixture
def stored():
    """The expected content of ``verification.json`` for a check on a run's own task, in float32."""

    def of(agreement, form, against):
        return {
            "of": form,
            "against": str(against),
            "agree": True,
            "prompts": 6,
            "tokens": agreement.tokens,
            "max_difference": agreement.max_difference,
            "tolerance": 1e-3,
            "dtype": "float32",
            "near_ties": agreement.near_ties,
            "same_top1": 1.0,
            "kl_divergence": agreement.kl_divergence,
        }

    return of
