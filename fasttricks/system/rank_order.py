"""The mean of gradients over ranks, added up in the order of the ranks: its last bits depend on no bucket, ring or arrival.

An all-reduce adds a gradient in an order that its place in its bucket decides, and the first step after a start has other
buckets than the steps after it. So, with three or more ranks, a resumed run would end in other bits. A sum of two has one order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future, collect_all
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from fasttricks.system.distributed import World, add_up, host_group


def mean_of(parts: Tensor) -> Tensor:
    """(S,), in the dtype of `parts` (N, S): their mean over N, divided and then added up in order, in float32 or wider.

    Divided first, so that the sum of values near the end of float32's range does not overflow.
    """
    wide = torch.promote_types(parts.dtype, torch.float32)
    return add_up(part.to(wide) / len(parts) for part in parts).to(parts.dtype)


def average_in_rank_order(model: DistributedDataParallel, world: World) -> None:
    """Have `model` take the mean of its gradients over the ranks by mean_of(), in the place of the backend's all-reduce.

    Each rank adds up one shard of a bucket (all_to_all_single) and gives it to all (all_gather). As in a ring, 2 (n - 1) / n
    of a bucket's bytes leave each of n ranks during the backward pass; memory holds each bucket once or twice more.
    A collective. Over gloo or nccl; buckets of any length and floating dtype.
    """
    gloo, gathers = world.device.type == "cpu", dist.group.WORLD
    if gloo:
        # gloo matches the calls of a group by their order. A rank gathers a bucket when its shards have come, which on another
        # may be after it has sent the next bucket's: so gathers have a group of their own.
        gathers = host_group(world)
    before: Future[Any] = Future()
    before.set_result(None)

    def hook(_: object, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are text, as they are here
        nonlocal before
        flat: Tensor = bucket.buffer()
        missing = -len(flat) % world.size
        sent = pad(flat, (0, missing)) if missing else flat
        shards = torch.empty_like(sent)

        def join(came: Future[Any]) -> Tensor:
            came.wait()  # raises where a rank was lost
            dist.all_gather(list(sent.chunk(world.size)), mean_of(shards.view(world.size, -1)), group=gathers)
            return sent[: len(flat)]

        came: Future[Any] = cast(dist.Work, dist.all_to_all_single(shards, sent, async_op=True)).get_future()
        # gloo's futures end in any order, on its threads: gathers queue. nccl's end in order, each at its call.
        before = collect_all([before, came]).then(join) if gloo else came.then(join)
        return before

    model.register_comm_hook(None, hook)
