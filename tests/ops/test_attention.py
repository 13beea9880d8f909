"""Attention among the tokens of each row, against softmax written out in float64 with a mask made by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.ops import attention, blocked_attention, tiles
from lora_cli.ops.attention import attend_rows
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight
from lora_cli.ops.tiles import MOST_SCORES, Tiling, tiling_of

LENGTHS = [5, 70, 1, 3, 130, 33, 40]  # stretches alike are computed together
HEADS, KV_HEADS, SIZE = 6, 2, 16
SIGHTS = [
    Sight(0.3, causal, window, softcap)
    for causal, window, softcap in itertools.product((True, False), (None, 3, 64), (None, 5.0))
]

UNCAPPED = [sight for sight in SIGHTS if sight.softcap is None]  # what torch's own kernel can do


def draw(dtype: torch.dtype, lengths: list[int] = LENGTHS) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, SIZE, generator=generator, dtype=torch.float64).to(dtype)

    return [normal(HEADS), normal(KV_HEADS), normal(KV_HEADS)], normal(HEADS)


def sees(t: int, u: int, sight: Sight) -> bool:
    return (u <= t or not sight.causal) and (sight.window is None or abs(t - u) < sight.window)


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], sight: Sight) -> Tensor:
    rows, start = [], 0
    for length in lengths:
        inside = slice(start, start + length)
        start += length
        group = HEADS // KV_HEADS
        keys, values = (t[inside].repeat_interleave(group, 1) for t in (k, v))
        scores = sight.scaling * torch.einsum("thd,uhd->htu", q[inside], keys)
        if sight.softcap is not None:
            scores = sight.softcap * torch.tanh(scores / sight.softcap)
        hidden = torch.tensor([[not sees(t, u, sight) for u in range(length)] for t in range(length)])
        p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        rows.append(torch.einsum("htu,uhd->thd", p, values))
    return torch.cat(rows)


def output_and_gradients(inputs: list[Tensor], gradient: Tensor, formula: Any) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = formula(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


def relative(ours: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_output_and_every_gradient_are_the_formula_s(sight, dtype, limit):
    inputs, gradient = draw(dtype)
    rows = Rows.of(LENGTHS)
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: attend_rows(q, k, v, rows, sight))
    exact = output_and_gradients(
        [t.double() for t in inputs], gradient.double(), lambda q, k, v: by_hand(q, k, v, LENGTHS, sight)
    )
    assert ours[0].dtype == dtype
    assert relative(ours, exact) < limit


@pytest.mark.parametrize("sight", UNCAPPED, ids=str)
def test_the_way_row_by_row_is_the_same(sight):
    inputs, gradient = draw(torch.float32)
    rows = Rows.of(LENGTHS)
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: attention._row_by_row(q, k, v, rows, sight, 0.0))
    exact = output_and_gradients(inputs, gradient, lambda q, k, v: by_hand(q, k, v, LENGTHS, sight))
    assert relative(ours, exact) < 1e-5


PREFIX, OWN = 37, [5, 70, 1, 3]
CAUSAL = [sight for sight in SIGHTS if sight.causal]


def expanded(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """By hand: every row with its own copy of the prefix; what the copies give is left out."""
    places, start = [], PREFIX
    for length in OWN:
        places.append(torch.cat([torch.arange(PREFIX), torch.arange(start, start + length)]))
        start += length
    lengths = [PREFIX, *(PREFIX + length for length in OWN)]
    whole = torch.cat([torch.arange(PREFIX), *places])
    out = by_hand(q[whole], k[whole], v[whole], lengths, sight)
    firsts = [0, *itertools.accumulate(lengths)]
    own = [out[first + PREFIX : first + length] for first, length in zip(firsts[1:], lengths[1:], strict=False)]
    return torch.cat([out[:PREFIX], *own])


def row_by_row(q: Tensor, k: Tensor, v: Tensor, rows: Rows, sight: Sight) -> Tensor:
    return attention._row_by_row(q, k[rows.key_places], v[rows.key_places], rows, sight, 0.0)


def each_way(sights: list[Sight], other_way: Any) -> list[Any]:
    pairs = [(attend_rows, sight) for sight in sights] + [(other_way, sight) for sight in sights if not sight.softcap]
    return [pytest.param(way, sight, id=f"{way.__name__}-{sight}") for way, sight in pairs]


@pytest.mark.parametrize(("way", "sight"), each_way(CAUSAL, row_by_row))
def test_rows_see_a_shared_prefix_as_if_each_had_its_own(sight, way):
    rows = Rows.of([PREFIX, *OWN], prefix=PREFIX)
    inputs, gradient = draw(torch.float64, list(rows.lengths))
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: way(q, k, v, rows, sight))
    exact = output_and_gradients(inputs, gradient, lambda q, k, v: expanded(q, k, v, sight))
    assert relative(ours, exact) < 1e-12


STARTS, COUNTS = [2, 0, 0, 1, 100, 32, 7], [3, 70, 1, 1, 30, 1, 20]  # of LENGTHS: tails, a whole row, and a middle


def part_of(q: Tensor) -> Tensor:
    begins = [end - length for end, length in zip(itertools.accumulate(LENGTHS), LENGTHS, strict=True)]
    places = zip(begins, STARTS, COUNTS, strict=True)
    return q[torch.cat([torch.arange(begin + start, begin + start + count) for begin, start, count in places])]


def part_row_by_row(q: Tensor, k: Tensor, v: Tensor, rows: Rows, sight: Sight) -> Tensor:
    return attention._row_by_row(q, k, v, rows, sight, 0.0)


@pytest.mark.parametrize(("way", "sight"), each_way(SIGHTS, part_row_by_row))
def test_some_tokens_of_each_row_see_what_they_see_in_the_whole(sight, way):
    inputs, gradient = draw(torch.float64)
    part = replace(Rows.of(LENGTHS).part(STARTS, COUNTS), source=lambda _, key, value: (key, value))
    ours = output_and_gradients(inputs, part_of(gradient), lambda q, k, v: way(part_of(q), k, v, part, sight))
    exact = output_and_gradients(inputs, part_of(gradient), lambda q, k, v: part_of(by_hand(q, k, v, LENGTHS, sight)))
    assert relative(ours, exact) < 1e-12


def by_torch(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Each row by torch's kernel, in which query heads share keys."""
    of_rows = zip(*(x.transpose(0, 1).split(LENGTHS, 1) for x in (q, k, v)), strict=True)
    options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    each = [F.scaled_dot_product_attention(*(x[None] for x in row), **options)[0] for row in of_rows]
    return torch.cat([out.transpose(0, 1) for out in each])


@pytest.mark.parametrize("scaling", [SIZE**-0.5, 128**-0.5, 0.3])
def test_in_bfloat16_it_is_no_less_exact_than_torch_s_own_kernel(scaling):
    inputs, gradient = draw(torch.bfloat16)
    rows, sight = Rows.of(LENGTHS), Sight(scaling)
    exact = output_and_gradients(
        [t.double() for t in inputs], gradient.double(), lambda q, k, v: by_hand(q, k, v, LENGTHS, sight)
    )
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: attend_rows(q, k, v, rows, sight))
    torchs = output_and_gradients(inputs, gradient, lambda q, k, v: by_torch(q, k, v, scaling))
    assert relative(ours, exact) <= relative(torchs, exact)


def test_no_row_sees_another_bit_for_bit():
    inputs, _ = draw(torch.float32)
    rows, sight = Rows.of(LENGTHS), Sight(0.3)
    before = attend_rows(*inputs, rows, sight)
    for tensor in inputs:
        tensor[5:75] += 1.0  # the second row
    after = attend_rows(*inputs, rows, sight)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[75:], after[75:])
    assert not torch.equal(before[5:75], after[5:75])


def tiling(lengths: list[int], sight: Sight, dtype: torch.dtype = torch.float32, prefix: int = 0) -> Tiling:
    rows = Rows.of(lengths, prefix=prefix)
    query, key = (torch.empty(n, heads, SIZE, dtype=dtype) for n, heads in ((sum(lengths), HEADS), (9, KV_HEADS)))
    return tiling_of(rows, query, key, sight)


def shapes(found: Tiling) -> list[tuple[int, int, int]]:
    """(rows, queries of a row, keys) of each tile"""
    sizes = [(tile, tile.queries.stop - tile.queries.start) for tile in found.tiles]
    return [(t.matrices // KV_HEADS, size // t.matrices * KV_HEADS // HEADS, t.keys.stop) for t, size in sizes]


def test_stretches_alike_of_several_rows_are_one_tile():
    found = shapes(tiling([100, 90, 64, 96], Sight(0.3)))
    assert found == [(4, 32, 32), (4, 32, 64), (3, 32, 96), (1, 32, 128)]
    assert shapes(tiling([100, 90, 64, 96], Sight(0.3, causal=False))) == [(1, 128, 128), (2, 96, 96), (1, 64, 64)]


def test_rows_of_another_length_or_behind_a_prefix_have_tiles_of_their_own():
    assert shapes(tiling([500, 60], Sight(0.3)))[-1] == (1, 64, 64)
    assert shapes(tiling([40, 30, 31], Sight(0.3), prefix=40)) == [(2, 32, 96), (1, 64, 64)]


def test_more_queries_make_a_tile_where_each_costs_little():
    """Fewer tiles for short rows, fewer hidden scores for long ones."""
    assert {size for _, size, _ in shapes(tiling([64] * 2, Sight(0.3)))} == {64}
    assert {size for _, size, _ in shapes(tiling([512] * 8, Sight(0.3)))} == {32}
    assert {size for _, size, _ in shapes(tiling([256], Sight(0.3), torch.bfloat16))} == {128}


def test_a_tile_of_several_rows_is_bounded():
    tiles = tiling([512] * 40, Sight(0.3)).tiles
    assert max(tile.num_scores for tile in tiles) <= MOST_SCORES
    (widest,) = tiling([2**17], Sight(0.3)).tiles[-1:]
    assert widest.num_scores > MOST_SCORES and widest.matrices == KV_HEADS, "one row is never refused"


@pytest.mark.parametrize("prefix", [0, 37])
def test_every_token_has_one_place_and_padding_repeats_its_row_s_last(prefix):
    lengths = [37, 5, 70, 1, 3]
    found = tiling(lengths, Sight(0.3), prefix=prefix)
    x = torch.arange(sum(lengths) * HEADS * SIZE, dtype=torch.float32).view(-1, HEADS, SIZE)
    filled = found.queries.fill(x, HEADS // KV_HEADS)
    assert torch.equal(found.queries.empty(filled, HEADS), x)
    zeroed = found.queries.fill_with_zeros(x + 1, HEADS // KV_HEADS)
    assert float(zeroed.sum(dtype=torch.float64)) == float((x + 1).sum(dtype=torch.float64))
    ends = {end - 1 for end in itertools.accumulate(lengths)}
    assert set((found.queries.tokens[found.queries.padding] // KV_HEADS).tolist()) <= ends


def keep_up_to(num_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "KEPT_KEYS", num_keys)
    tiles.forget_tilings()


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_probabilities_kept_or_made_again_are_the_same_bits(sight, monkeypatch):
    inputs, gradient = draw(torch.bfloat16)
    rows = Rows.of(LENGTHS)
    found = {}
    for kept_keys in (0, 512):  # of no row, of all
        keep_up_to(kept_keys, monkeypatch)
        found[kept_keys] = output_and_gradients(inputs, gradient, lambda q, k, v: attend_rows(q, k, v, rows, sight))
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[512], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept_keys", [0, 512])
@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_what_is_kept_are_the_probabilities_of_short_rows(prefix, kept_keys, dtype, monkeypatch):
    keep_up_to(kept_keys, monkeypatch)
    rows = Rows.of([PREFIX, *OWN], prefix=PREFIX) if prefix else Rows.of(OWN)
    (q, k, v), _ = draw(dtype, list(rows.lengths))
    k, v = k[rows.key_places], v[rows.key_places]
    kept: list[int] = []
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        blocked_attention.attend_in_blocks(*inputs, rows, Sight(0.3))
    expected = sum(tile.num_scores for tile in tiling_of(rows, q, k, Sight(0.3)).tiles) if kept_keys else 0
    assert sum(kept) - sum(t.numel() for t in inputs) == expected
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(-1) or t, lambda t: t):
        blocked_attention.attend_in_blocks(*inputs, rows, Sight(0.3))
    assert -1 not in kept, "an evaluation keeps nothing"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_thread_has_a_part_in_an_odd_number_of_products(count, threads, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cut_up: list[int] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **out: cut_up.append(1) or mm(*args, **out))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(count, *size, generator=generator).to(dtype) for size in ((5, 7), (7, 3)))
    found = blocked_attention._product(a, b)
    assert relative([found], [a.double() @ b.double()]) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert len(cut_up) == int(count % 2 == 1 and threads == 2 and dtype == torch.float32)


def test_dropout_is_drawn_and_leaves_the_mean_where_it_was():
    inputs, _ = draw(torch.float32, [40])
    rows, sight = Rows.of([40]), Sight(0.3)
    without = attend_rows(*inputs, rows, sight)
    torch.manual_seed(0)
    drawn = torch.stack([attend_rows(*inputs, rows, sight, dropout=0.2) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert float((drawn.mean(0) - without).norm() / without.norm()) < 0.05


@pytest.mark.parametrize("sight", [Sight(0.4), Sight(0.4, window=5), Sight(0.4, causal=False), Sight(0.4, softcap=2.0)])
@pytest.mark.parametrize("kept_keys", [0, 512])
def test_with_dropout_every_gradient_is_that_of_the_same_draw(sight, kept_keys, monkeypatch):
    """Against finite differences: what is drawn in the forward pass is drawn again in the backward pass."""
    monkeypatch.setattr(tiles, "KEPT_KEYS", kept_keys)
    tiles.forget_tilings()
    inputs, _ = draw(torch.float64, [9, 70, 5])
    rows, share = Rows.of([9, 70, 5]), 0.3

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return attend_rows(*tensors, rows, sight, share)

    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in inputs], fast_mode=True)
    assert not torch.allclose(attend(*inputs), attend_rows(*inputs, rows, sight), rtol=0.05)


@pytest.mark.parametrize("kept_keys", [0, 512])
def test_with_dropout_bfloat16_is_float32_but_for_rounding(kept_keys, monkeypatch):
    """Of one draw: tiles are cut alike, so that the same probabilities fall."""
    monkeypatch.setattr(tiles, "KEPT_KEYS", kept_keys)
    monkeypatch.setattr(tiles, "QUERIES", (32,))
    tiles.forget_tilings()
    rows, sight, found = Rows.of([9, 70, 5]), Sight(0.4), []
    for dtype in (torch.bfloat16, torch.float32):
        inputs, gradient = draw(torch.bfloat16, [9, 70, 5])
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        torch.manual_seed(3)
        out = attend_rows(*inputs, rows, sight, 0.3)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, gradient.to(dtype))])
    assert relative(*found) < 1.5e-2
    torch.manual_seed(4)
    assert relative([attend_rows(*inputs, rows, sight, 0.3).detach()], found[1][:1]) > 0.1  # the control: another draw
    tiles.forget_tilings()


def test_each_probability_is_dropped_by_itself_and_as_often_as_asked():
    """All keys are equal, so that a query's probabilities are 1/T; values tell which of them counted."""
    length, share = 300, 0.25  # more than a tile
    alike, rows = torch.zeros(length, 1, length), Rows.of([length])
    values = torch.eye(length)[:, None]
    torch.manual_seed(0)
    counted = attend_rows(alike, alike, values, rows, Sight(1.0, causal=False), share)[:, 0] * length
    assert ((counted == 0) | ((counted - 1 / (1 - share)).abs() < 1e-6)).all()
    number, expected = int((counted == 0).sum()), share * length**2
    assert abs(number - expected) < 4 * (expected * (1 - share)) ** 0.5
    assert len({tuple(row.tolist()) for row in counted}) == length  # no two queries drop the same keys
    assert attend_rows(alike, alike, values, rows, Sight(1.0, causal=False), 1.0).abs().max() == 0


SIGNATURES = {
    "2.10": {"is_causal"},
    "2.11": {"scale", "window_size"},
    "2.12 and later": {"scale", "window_size", "enable_gqa"},
}


@pytest.mark.parametrize("parameters", SIGNATURES.values(), ids=SIGNATURES)
@pytest.mark.parametrize("sight", UNCAPPED, ids=str)
def test_flash_attention_is_asked_for_the_same_thing_in_every_torch(sight, parameters, monkeypatch):
    """The CUDA kernel itself needs a GPU; what it is told is read back here by a stand-in that obeys."""
    inputs, _ = draw(torch.float32)
    rows = Rows.of(LENGTHS)

    def stand_in(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **options):
        assert options.keys() <= parameters
        assert bounds_q is bounds_k is rows.bounds
        assert longest_q == longest_k == max(LENGTHS)
        left, right = options.get("window_size", (-1, 0 if options.get("is_causal") else -1))
        assert left == -1 or right in (0, left)
        window = None if left == -1 else left + 1
        scale = options.get("scale", SIZE**-0.5)
        if not options.get("enable_gqa"):
            assert k.shape[1] == HEADS
            k, v = k[:, :: HEADS // KV_HEADS], v[:, :: HEADS // KV_HEADS]
        return by_hand(q, k, v, LENGTHS, Sight(scale, right == 0, window))

    monkeypatch.setattr(attention, "_varlen_parameters", lambda: frozenset(parameters))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    if parameters == SIGNATURES["2.10"] and sight.window is not None:
        assert not attention._has_flash(rows, sight), "it knows no windows"
        return
    assert attention._has_flash(rows, sight)
    out = attention._flash(*inputs, rows, sight)
    assert relative([out], [by_hand(*inputs, LENGTHS, sight)]) < 1e-5


@pytest.mark.parametrize("kernel", ["shares keys", "refuses", "takes the wrong ones", "fails backward"])
def test_torch_2_11_gets_copies_of_keys_only_where_its_kernel_does_not_share_them(kernel, monkeypatch):
    seen: list[int] = []

    def stand_in(q, k, v, bounds_q, bounds_k, longest_q, longest_k, window_size, **_):
        seen.append(k.shape[1])
        group = q.shape[1] // k.shape[1]
        if group > 1 and kernel == "refuses":
            raise ValueError("heads differ")
        order = torch.roll(torch.arange(k.shape[1]), int(group > 1 and kernel == "takes the wrong ones"))
        rows = [t.split(bounds_q.diff().tolist()) for t in (q, *(t[:, order] for t in (k, v)))]
        of_heads = [[t.transpose(0, 1) for t in row] for row in zip(*rows, strict=True)]
        each = (F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in of_heads)
        out = torch.cat([row.transpose(0, 1) for row in each])
        if group > 1 and kernel == "fails backward":
            out.register_hook(lambda gradient: gradient * 2)
        return out

    attention._shares_keys_by_itself.cache_clear()
    monkeypatch.setattr(attention, "_varlen_parameters", lambda: frozenset(SIGNATURES["2.11"]))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    inputs, _ = draw(torch.float32)
    rows, sight = Rows.of(LENGTHS), Sight(SIZE**-0.5)
    out = attention._flash(*inputs, rows, sight)
    assert seen[-1] == (KV_HEADS if kernel == "shares keys" else HEADS)
    assert relative([out], [by_hand(*inputs, LENGTHS, sight)]) < 1e-5
    attention._shares_keys_by_itself.cache_clear()


def test_flash_attention_gets_fewer_queries_than_keys_with_bounds_of_their_own(monkeypatch):
    inputs, _ = draw(torch.float32)
    asked: list[tuple[Any, ...]] = []

    def stand_in(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **_):
        asked.append((bounds_q.tolist(), bounds_k.tolist(), longest_q, longest_k))
        return q

    monkeypatch.setattr(attention, "_varlen_parameters", lambda: frozenset(SIGNATURES["2.12 and later"]))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    tails = Rows.of(LENGTHS).part([length - 1 for length in LENGTHS], [1] * len(LENGTHS))
    one = inputs[0][: len(LENGTHS)]
    attention._flash(one, *inputs[1:], tails, Sight(0.3, window=3))
    ends = [0, *itertools.accumulate(LENGTHS)]
    assert asked == [(list(range(len(LENGTHS) + 1)), ends, 1, max(LENGTHS))]


@pytest.mark.gpu
@pytest.mark.parametrize("sight", [sight for sight in SIGHTS if sight.causal], ids=str)
def test_on_a_gpu_the_last_tokens_of_each_row_see_what_they_see_in_the_whole(sight):
    inputs, gradient = draw(torch.bfloat16)
    starts = [length // 2 for length in LENGTHS]
    rows = Rows.of(LENGTHS).part(starts, [length - start for length, start in zip(LENGTHS, starts, strict=True)])
    begins = [end - length for end, length in zip(itertools.accumulate(LENGTHS), LENGTHS, strict=True)]
    ranges = zip(begins, starts, LENGTHS, strict=True)
    places = torch.cat([torch.arange(begin + start, begin + length) for begin, start, length in ranges])
    part = replace(rows.to(torch.device("cuda")), source=lambda _, key, value: (key, value))
    ours = output_and_gradients(
        [t.cuda() for t in inputs],
        gradient[places].cuda(),
        lambda q, k, v: attend_rows(q[places.cuda()], k, v, part, sight),
    )
    exact = output_and_gradients(
        [t.double() for t in inputs],
        gradient[places].double(),
        lambda q, k, v: by_hand(q, k, v, LENGTHS, sight)[places],
    )
    assert relative([t.cpu() for t in ours], exact) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_on_a_gpu_output_and_every_gradient_are_the_formula_s(sight, dtype, limit):
    inputs, gradient = draw(dtype)
    rows = Rows.of(LENGTHS).to(torch.device("cuda"))
    ours = output_and_gradients(
        [t.cuda() for t in inputs], gradient.cuda(), lambda q, k, v: attend_rows(q, k, v, rows, sight)
    )
    exact = output_and_gradients(
        [t.double() for t in inputs], gradient.double(), lambda q, k, v: by_hand(q, k, v, LENGTHS, sight)
    )
    assert relative([t.cpu() for t in ours], exact) < limit
