"""One seed, many streams."""

from __future__ import annotations

import torch

from lora_cli.seeds import stream, stream_seed


def test_a_stream_is_a_fixed_function_of_its_names():
    """Golden numbers: a change here changes every run that is resumed or repeated."""
    assert stream_seed(42, "init", "model.layers.0.self_attn.q_proj") == 2736660824064700773
    assert stream_seed(0) == 3456079177858693020


def test_streams_differ_by_every_part_of_their_name():
    seeds = {
        stream_seed(seed, *names)
        for seed in (0, 1, 42, 2**63 - 1)
        for names in [(), ("init",), ("order", 0), ("order", 1), ("order", 10), ("init", "q_proj"), ("init", "k_proj")]
    }
    assert len(seeds) == 4 * 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_drawing_from_one_stream_leaves_the_others_and_the_global_one_alone():
    before = torch.get_rng_state()
    expected = torch.rand(3, generator=stream(1, "b"))
    torch.rand(100, generator=stream(1, "a"))
    assert torch.equal(torch.rand(3, generator=stream(1, "b")), expected)
    assert not torch.equal(torch.rand(3, generator=stream(1, "a")), expected)
    assert torch.equal(before, torch.get_rng_state())
