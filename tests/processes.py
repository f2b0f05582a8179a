"""Checks that run in two processes, which gloo connects."""

import os
import sys

import pytest
import torch
from torch import distributed, multiprocessing

needs_processes = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")


def run_in_two_processes(check, folder, *arguments):
    """Call ``check(rank, folder, *arguments)`` in two processes. It has to be a function of a module.

    On Linux they are forked, which saves the seconds that it takes to import torch.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    multiprocessing.start_processes(_process, (check, str(folder), arguments), nprocs=2, start_method=method)


def _process(rank, check, folder, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    check(rank, folder, *arguments)
    distributed.destroy_process_group()
