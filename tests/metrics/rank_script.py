"""One rank of test_registry's two: `python rank_script.py RANK STORE CORPUS RESULT`. Not a fork: gloo may hang in one.

CORPUS is JSON: metric name -> [predictions, references, kinds]; this rank takes its part and writes the joint scores.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mmpeft.metrics import load_metric


def main(rank: int, store: str, corpus: str, result: str) -> None:
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    scores = {}
    for name, lists in json.loads(Path(corpus).read_text()).items():
        metric = load_metric(name)
        mine = slice(0, 3) if rank == 0 else slice(3, None)  # unequal shares, in unequal numbers of batches
        metric.update(*(entries[mine] for entries in lists))
        if rank:
            metric.update([], [], [])
        scores[name] = {key: value.item() for key, value in metric.compute().items()}
    Path(result).write_text(json.dumps(scores))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
