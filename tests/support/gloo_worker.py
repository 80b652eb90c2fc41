"""One rank that checks lcm_ds.distributed.gloo against torch's collectives: python gloo_worker.py."""

import os
import warnings

import torch
import torch.distributed as dist

from lcm_ds.distributed.gloo import SumOfParts, all_gather, reduce_scatter

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def refused(*args, **kwargs):
    raise AssertionError("torch's own function was called")


def values(size, dtype, rank):
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)


def check_gathers(rank, ranks):
    for dtype in (*DTYPES, torch.uint8):
        part = (values(1001, torch.float32, rank) * 30).to(dtype)
        expected, found = torch.empty(ranks * 1001, dtype=dtype), torch.empty(ranks, 1001, dtype=dtype)
        dist.all_gather_into_tensor(expected, part)
        assert all_gather(refused, found, part) is None
        assert torch.equal(found.view(-1), expected)
        in_place = torch.zeros(ranks * 1001, dtype=dtype)
        own = in_place.narrow(0, rank * 1001, 1001).copy_(part)
        all_gather(refused, in_place, own, async_op=True).wait()
        assert torch.equal(in_place, expected)


def check_sums(rank, ranks):
    for dtype in DTYPES:
        mine = values(ranks * 999, dtype, rank)
        every = torch.stack([values(ranks * 999, dtype, n) for n in range(ranks)])
        exact = every.double().sum(0)
        # Rounded once, whatever the number of ranks.
        expected = (exact if dtype is torch.float64 else every.float().sum(0)).to(dtype)
        out = torch.empty(999, dtype=dtype)
        assert reduce_scatter(refused, out, mine) is None
        assert torch.allclose(out, expected.view(ranks, -1)[rank], rtol=torch.finfo(dtype).eps, atol=1e-6)
        own = mine.narrow(0, rank * 999, 999)
        reduce_scatter(refused, own, mine)
        assert torch.equal(own, out)

        sizes = [0, 5, 700, 2][:ranks]
        begin, size = sum(sizes[:rank]), sizes[rank]
        part = SumOfParts(values(sum(sizes), dtype, rank), sizes).wait()
        every = torch.stack([values(sum(sizes), dtype, n) for n in range(ranks)]).double().sum(0)
        assert torch.allclose(part.double(), every[begin : begin + size], rtol=torch.finfo(dtype).eps, atol=1e-6)


def check_what_is_left_to_torch(rank, ranks):
    called = []

    def original(*args, **kwargs):
        called.append(kwargs)

    all_gather(original, torch.empty(5), torch.empty(7))
    reduce_scatter(original, torch.empty(2), torch.empty(2 * ranks), op=dist.ReduceOp.MAX)
    reduce_scatter(original, torch.empty(2), torch.empty(2 * ranks), async_op=True)
    assert len(called) == 3


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # of names that torch 2.13 deprecates
    dist.init_process_group("gloo")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for check in (check_gathers, check_sums, check_what_is_left_to_torch):
        check(rank, ranks)
    dist.destroy_process_group()
