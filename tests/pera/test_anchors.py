"""The frozen rows: what they depend on, and that they are the same everywhere."""

import pytest
import torch

from pera.anchors import draw_anchors, names_digest
from reference import sign_row

NAME = "model.layers.0.mlp.down_proj"


def test_rows_are_the_bits_of_a_digest():
    """Written down once. If it fails, every adapter with anchors that exists is lost."""
    anchors = draw_anchors(2, 7, NAME, rows=5, columns=12)
    assert anchors.V.tolist() == [
        [-1, -1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1],
        [-1, 1, -1, 1, -1, -1, -1, 1, -1, -1, 1, -1],
    ]
    assert anchors.U_T.tolist() == [[1, -1, -1, -1, 1], [-1, 1, 1, -1, 1]]


@pytest.mark.parametrize("name", ["", NAME, "blocks.größe"])
def test_rows_are_those_of_the_reference(name):
    anchors = draw_anchors(3, 2**32 - 1, name, rows=8, columns=33)
    text = name.replace("ö", r"\u00f6").replace("ß", r"\u00df")
    for rows, side, width in ((anchors.V, "in", 33), (anchors.U_T, "out", 8)):
        assert rows.dtype == torch.int8
        assert rows.tolist() == [sign_row(2**32 - 1, text, side, width, c) for c in range(3)]


def test_rows_of_fewer_anchors_come_first_in_those_of_more():
    few, many = (draw_anchors(k, 0, NAME, rows=40, columns=50) for k in (4, 16))
    assert torch.equal(many.V[:4], few.V)
    assert torch.equal(many.U_T[:4], few.U_T)


@pytest.mark.parametrize(
    ("seed", "name", "rows", "columns"),
    [(1, "a.b", 64, 64), (0, "a.c", 64, 64), (0, "a.b", 65, 65)],
    ids=["seed", "name", "shape"],
)
def test_another_seed_name_or_shape_gives_other_rows(seed, name, rows, columns):
    some, others = draw_anchors(1, 0, "a.b", 64, 64), draw_anchors(1, seed, name, rows, columns)
    for row, other in zip(some, others, strict=True):
        agreement = (row == other[:, :64]).double().mean().item()
        assert 0.25 < agreement < 0.75, "independent signs agree in half of the places; 4 deviations are 0.25"


def test_rows_of_both_sides_and_of_all_anchors_are_independent():
    anchors = draw_anchors(8, 0, NAME, rows=1024, columns=1024)
    rows = torch.cat(anchors).double()
    correlations = rows @ rows.T / 1024 - torch.eye(16)
    assert correlations.abs().max() < 5 / 32, "5 deviations"


def test_generators_and_defaults_of_torch_do_not_matter():
    expected = draw_anchors(2, 0, NAME, rows=9, columns=9)
    torch.manual_seed(123)
    with torch.device("meta"), torch.inference_mode():
        drawn = draw_anchors(2, 0, NAME, rows=9, columns=9)
    for rows, same in zip(drawn, expected, strict=True):
        assert torch.equal(rows, same)
        assert not rows.is_inference()


def test_no_anchors_are_none():
    assert draw_anchors(0, 0, NAME, rows=9, columns=9) is None


def test_the_digest_of_names_ignores_order_and_repetition():
    assert names_digest(["a", "b", "a"]) == names_digest(["b", "a"]) != names_digest(["a"]) != names_digest(["a.b"])
