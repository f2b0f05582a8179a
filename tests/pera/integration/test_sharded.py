"""Factors that are sharded over processes (DTensor, as under FSDP2): the same ρ and ΔW as in one process."""

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pera.anchors import draw_anchors
from pera.polynomial import delta_weight, rms


def compare(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    A, B, h = torch.randn(4, 10), torch.randn(6, 4), torch.randn(10)
    A[:2, 3] = 0  # zero in one shard
    A[:, 5] = 0
    sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in (A, B, h)]
    torch.testing.assert_close(rms(sharded[0]).full_tensor(), rms(A))
    for normalization in ("none", "rms", "centred"):
        found = delta_weight(*sharded, "all", normalization).full_tensor()
        torch.testing.assert_close(found, delta_weight(A, B, h, "all", normalization))
    anchors = draw_anchors(3, 0, "layer", 6, 10)
    h = torch.randn(13)
    found = delta_weight(*sharded[:2], distribute_tensor(h, mesh, [Shard(0)]), "all", "rms", anchors).full_tensor()
    torch.testing.assert_close(found, delta_weight(A, B, h, "all", "rms", anchors))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_sharded_factors_give_the_same_update(tmp_path):
    multiprocessing.spawn(compare, (str(tmp_path),), nprocs=2)
