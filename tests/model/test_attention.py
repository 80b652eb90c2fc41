"""What a position may see: the concepts before it in its own segment, and nothing else."""

import pytest
import torch
from tolerance import rounding, rounding_of
from torch._inductor import config as inductor_config

from lcm_ds.model.attention import (
    Rope,
    SegmentLayout,
    _turn,
    _turn_compiled,
    attend,
    rotate,
    uses_varlen,
    varlen_takes,
)


def packed_ids(*rows):
    """Segment ids of rows given as lists of segment lengths; a negative length is padding."""
    ids = []
    for row in rows:
        ids.append([segment if length > 0 else -1 for segment, length in enumerate(row) for _ in range(abs(length))])
    return torch.tensor(ids, dtype=torch.int32)


@pytest.mark.parametrize("changed", [1, 4, 8])
def test_no_output_moves_when_a_later_concept_does(make_model, changed):
    model = make_model()
    concepts = torch.randn(2, 9, 12)
    moved = concepts.clone()
    moved[:, changed:] += torch.randn(2, 9 - changed, 12)
    before, after = model(concepts), model(moved)
    assert torch.allclose(before[:, :changed], after[:, :changed], atol=rounding_of(model.config, 9))
    assert not torch.allclose(before[:, changed], after[:, changed], atol=1e-2)


def test_an_output_has_no_gradient_at_later_concepts_and_one_at_all_before(make_model):
    model = make_model()
    concepts = torch.randn(1, 7, 12, requires_grad=True)
    for position in range(7):
        (gradient,) = torch.autograd.grad(model(concepts)[0, position].sum(), concepts)
        assert gradient[0, position + 1 :].abs().sum() == 0
        assert (gradient[0, : position + 1].abs().sum(dim=1) > 0).all()


def test_a_packed_row_gives_what_its_segments_give_one_at_a_time(make_model):
    model = make_model()
    lengths = [[5, 1, 3, 7], [16], [2, 9, -5]]
    concepts = torch.randn(3, 16, 12)
    packed = model(concepts, SegmentLayout.from_ids(packed_ids(*lengths), max_seqlen=16))
    for row, segments in enumerate(lengths):
        start = 0
        for length in segments:
            if length > 0:
                alone = model(concepts[row : row + 1, start : start + length])
                close = rounding_of(model.config, 16)
                assert torch.allclose(packed[row, start : start + length], alone[0], atol=close)
            start += abs(length)


def test_no_gradient_crosses_the_ends_of_a_segment(make_model):
    model = make_model()
    concepts = torch.randn(1, 10, 12, requires_grad=True)
    layout = SegmentLayout.from_ids(packed_ids([4, 4, -2]), max_seqlen=10)
    (gradient,) = torch.autograd.grad(model(concepts, layout)[0, 4:8].sum(), concepts)
    assert (gradient[0, 4:8].abs().sum(dim=1) > 0).all()
    assert gradient[0, :4].abs().sum() == 0
    assert gradient[0, 8:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_never_becomes_nan(make_model, dtype):
    model = make_model().to(dtype)
    ids = packed_ids([3, -5], [-8], [8])
    concepts = torch.randn(3, 8, 12)
    concepts[ids < 0] = 0
    predictions = model(concepts, SegmentLayout.from_ids(ids, max_seqlen=8))
    assert predictions.isfinite().all()
    predictions.float()[ids >= 0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_positions_restart_at_every_segment():
    layout = SegmentLayout.from_ids(packed_ids([3, 4, -2], [1, 1, 7]), max_seqlen=9)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5, 6]]


def test_a_layout_has_the_same_shapes_for_any_number_of_segments():
    few = SegmentLayout.from_ids(packed_ids([64], [64]), max_seqlen=64)
    many = SegmentLayout.from_ids(packed_ids([30, 34], [34, -30]), max_seqlen=64)
    assert [tensor.shape for tensor in few[:3]] == [tensor.shape for tensor in many[:3]]
    assert few.max_seqlen == many.max_seqlen
    assert few.cu_seqlens.tolist() == [0, 64, 128, 128, 128]
    assert many.cu_seqlens.tolist() == [0, 30, 64, 98, 128]
    # segments that are shorter than usual take twice the room, or four times
    short = SegmentLayout.from_ids(packed_ids([1] * 64, [2] * 32), max_seqlen=64)
    assert short.cu_seqlens.tolist() == [*range(64), *range(64, 129, 2), *[128] * 32]


def test_positions_without_concepts_are_segments_no_longer_than_the_longest():
    layout = SegmentLayout.from_ids(packed_ids([3, -5], [-8], [2, 6]), max_seqlen=4)
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3] * 2, [0, 1, 0, 1, 2, 3, 4, 5]]
    assert layout.cu_seqlens.diff().max() <= 6


@pytest.mark.parametrize("max_seqlen", [8, 16, 40])
def test_rows_taken_in_parts_give_what_whole_rows_give(max_seqlen):
    # parts of 8 or 16 positions, or rows of 40 as they are; segments begin and end anywhere in a part
    lengths = [[5, 8, 1, 3, 7, 8, 8], [8, 8, 8, 8, 8], [2, 8, -5, 8, 8, -9]]
    ids = packed_ids(*lengths)
    layout = SegmentLayout.from_ids(ids, max_seqlen).prepared(torch.device("cpu"), torch.float32, 4)
    assert layout.blocks == {8: 5, 16: 1, 40: 1}[max_seqlen]
    query, key, value = torch.randn(3, 3, 40, 2, 4)
    index = torch.arange(40)
    seen = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (index.unsqueeze(1) >= index)
    scores = torch.einsum("rqhd,rkhd->rhqk", query, key) / 2
    expected = torch.einsum("rhqk,rkhd->rqhd", scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1), value)
    real = ids >= 0
    assert torch.allclose(attend(query, key, value, layout)[real], expected[real], atol=rounding(4 + 2 * 40, size=4))


def test_over_rows_a_concept_sees_all_before_it_up_to_a_gap(make_model):
    model = make_model(attention="row")
    concepts, close = torch.randn(1, 12, 12), rounding_of(model.config, 12)
    layout = SegmentLayout.from_ids(packed_ids([3, 4, -2, 3]), max_seqlen=4, attention="row")
    packed = model(concepts, layout)
    assert torch.allclose(packed[:, :7], model(concepts[:, :7]), atol=close)
    assert torch.allclose(packed[:, 9:], model(concepts[:, 9:]), atol=close)
    apart = model(concepts, SegmentLayout.from_ids(packed_ids([3, 4, -2, 3]), max_seqlen=4))
    assert torch.allclose(apart[:, :3], packed[:, :3], atol=close)
    assert not torch.allclose(apart[:, 3:7], packed[:, 3:7], atol=1e-2)


@pytest.mark.slow
def test_compiled_layers_are_one_graph_that_no_other_batch_breaks(make_model):
    torch._dynamo.reset()
    exact, compiled = (make_model(num_hidden_layers=2, dropout=0.1).train() for _ in range(2))
    for layer in compiled.layers:
        layer.compile(fullgraph=True)
    keys = torch.tensor([4, 5])

    def gradients(model, *lengths):
        model.zero_grad()
        layout = SegmentLayout.from_ids(packed_ids(*lengths), max_seqlen=16)
        output = model(torch.linspace(-1, 1, 2 * 16 * 12).view(2, 16, 12), layout, dropout_keys=keys)
        output.square().mean().backward()
        return [output, *(parameter.grad for parameter in model.parameters())]

    with inductor_config.patch(compile_threads=1):  # a pool of processes starts slowly on a machine with many cores
        gradients(compiled, [5, 11], [9, 7])
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ([1, 2, 13], [16]), ([8, 8], [4, 5, 7]), ([3, 9, -4], [2] * 8):
            for found, expected in zip(gradients(compiled, *lengths), gradients(exact, *lengths), strict=True):
                assert torch.allclose(found, expected, atol=rounding_of(exact.config, 16))


def test_one_segment_a_row_is_the_layout_of_equal_ids():
    made = SegmentLayout.one_segment(3, 5, torch.device("cpu"))
    parsed = SegmentLayout.from_ids(torch.zeros(3, 5, dtype=torch.int32), max_seqlen=5)
    assert all(torch.equal(one, other) for one, other in zip(made[:3], parsed[:3], strict=True))
    assert made.max_seqlen == parsed.max_seqlen


def test_rope_turns_interleaved_pairs_by_hand():
    rope = Rope.of(torch.tensor([[0, 3]]), head_dim=4, theta=100.0)
    pairs = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 2, 1, 4)
    # pair 0 turns by 3, pair 1 by 3 / √100
    by_hand = torch.tensor([3.0, 3.0, 0.3, 0.3])
    expected = torch.stack([by_hand[0].cos(), by_hand[1].sin(), -by_hand[2].sin(), by_hand[3].cos()])
    for turned in rotate(pairs, pairs, rope):
        assert turned[0, 0, 0].tolist() == [1, 0, 0, 1]
        assert torch.allclose(turned[0, 1, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_the_same_however_it_is_computed(dtype):
    rope = Rope.of(torch.arange(20).view(2, 10), head_dim=8, theta=1e4)
    # Heads of a product for queries and keys, as the model has them.
    x = torch.randn(2, 10, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    query, weights = x[..., :8].requires_grad_(), torch.randn(2, 10, 3, 8).to(dtype)
    even, odd = query.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cis.real, rope.cis.imag
    written_out = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(dtype)
    expected, compiled, eager = (
        (turned, *torch.autograd.grad(turned, query, weights))
        for turned in (written_out, _turn_compiled(query, rope), _turn(query, rope))
    )
    assert all(map(torch.equal, compiled, expected))
    # Complex products may round once where the others round twice; then both round to the dtype.
    rounding = 2 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    for turned, exact, size in zip(eager, expected, (query, weights), strict=True):
        assert (turned - exact).abs().max() <= rounding * 2 * size.abs().max()


def test_only_distances_matter_to_rotated_products():
    query, key = torch.randn(2, 1, 1, 1, 8)

    def product(at_query, at_key):
        q, _ = rotate(query, query, Rope.of(torch.tensor([[at_query]]), 8, 1e4))
        _, k = rotate(key, key, Rope.of(torch.tensor([[at_key]]), 8, 1e4))
        return (q * k).sum()

    assert torch.allclose(product(5, 2), product(103, 100), atol=1e-4)
    assert not torch.allclose(product(5, 2), product(5, 4), atol=1e-3)


def test_heads_that_flash_kernels_refuse_are_not_given_to_them():
    assert all(varlen_takes(torch.bfloat16, head_dim) for head_dim in (8, 64, 128, 256))
    assert not any(varlen_takes(torch.bfloat16, head_dim) for head_dim in (4, 18, 100, 264))
    assert varlen_takes(torch.float16, 64)
    assert not varlen_takes(torch.float32, 64)
    assert not uses_varlen(torch.device("cpu"), torch.bfloat16, head_dim=64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_kernels_agree_with_masked_sdpa(dtype):
    device = torch.device("cuda")
    if not uses_varlen(device, dtype, head_dim=64):
        pytest.skip("no flash kernels over segments in this build of torch or for this device")
    generator = torch.Generator(device).manual_seed(0)
    ids = packed_ids([50, 1, 13], [30, 20, -14])
    kernels = SegmentLayout.from_ids(ids, max_seqlen=64).prepared(device, dtype, head_dim=64)
    masked = SegmentLayout.from_ids(ids, max_seqlen=64).prepared(device, torch.float32, head_dim=64)
    assert (kernels.varlen, masked.varlen) == (True, False)
    results = []
    for layout in (kernels, masked._replace(mask=masked.mask.to(dtype))):
        generator.manual_seed(0)
        inputs = [
            torch.randn(2, 64, 4, 64, device=device, dtype=dtype, generator=generator).requires_grad_() for _ in "qkv"
        ]
        out = attend(*inputs, layout)
        weights = torch.randn(out.shape, device=device, dtype=dtype, generator=generator)
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for flash, masked in zip(*results, strict=True):
        assert torch.allclose(flash.float(), masked.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hidden_size", [64, 36], ids=["flash", "heads-of-18"])
def test_a_packed_batch_on_a_gpu_is_near_the_cpu(make_model, hidden_size):
    model = make_model(hidden_size=hidden_size, num_attention_heads=2)
    concepts = torch.randn(2, 16, 12)
    layout = SegmentLayout.from_ids(packed_ids([5, 11], [2, 9, -5]), max_seqlen=16)
    real = packed_ids([5, 11], [2, 9, -5]) >= 0
    exact = model(concepts, layout)
    device = torch.device("cuda")
    fast = model.to(device, torch.bfloat16)(concepts.to(device), layout).float().cpu()
    assert fast.isfinite().all()
    error = (fast - exact)[real].square().mean() / exact[real].square().mean()
    assert error < 1e-3
