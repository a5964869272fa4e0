"""Two processes of one gloo group run a function: `two_ranks(function, *args)` calls `function(rank, *args)` in each.

A process that succeeds ends by `os._exit`. Gloo's worker thread may let go of the last collective only while the
interpreter is closing, which aborts the process after all the work is done (PyTorch's pull request 179291).
"""

import datetime
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = datetime.timedelta(seconds=120)  # for a process to come up on a loaded machine, or to answer


def start(rank, world, store):
    """Joins the gloo group that meets in the file `store`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=LIMIT)


def _rank(rank, store, function, args):
    torch.set_num_threads(1)
    start(rank, 2, store)
    function(rank, *args)
    dist.barrier()
    os._exit(0)


def two_ranks(function, *args):
    """`function(rank, *args)`, importable by name, in two new processes; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(f"{folder}/store", function, args), nprocs=2, start_method="spawn")
