"""What the tests of conversion share."""

import pytest


@pytest.fixture
def stored():
    """What ``verification.json`` should hold of an agreement on a run's own task, in float32."""

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
