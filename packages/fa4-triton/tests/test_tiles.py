"""The table of block sizes."""

from __future__ import annotations

import pytest

from fa4_triton.tiles import Architecture, architecture, head_dim_blocks, key_gradient_kernels, tile

ARCHITECTURES: list[Architecture] = ["ampere", "ada", "hopper", "blackwell", "interpreter"]
HEAD_DIMS = range(8, 257, 8)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_has_a_tile_for_each_kernel_it_needs(
    arch: Architecture, head_dim: int
) -> None:
    for kernel in ("forward", "dq", *key_gradient_kernels(arch, head_dim)):
        chosen = tile(arch, kernel, head_dim)
        assert {chosen.m, chosen.n} <= {16, 32, 64, 128}  # tl.dot needs powers of two from 16
        assert chosen.warps in (4, 8)
        assert 1 <= chosen.stages <= 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_key_gradients_are_computed_once_each(arch: Architecture) -> None:
    for head_dim in HEAD_DIMS:
        assert key_gradient_kernels(arch, head_dim) in (("dkdv",), ("dk", "dv"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_column_blocks_cover_the_head_dim_and_little_more(head_dim: int) -> None:
    first, second = head_dim_blocks(head_dim)
    power = max(16, 1 << (head_dim - 1).bit_length())
    assert head_dim <= first + second <= power
    for block in (first, second):
        assert block == 0 or (block >= 16 and block & (block - 1) == 0)
    assert first > second


BLOCKS = {
    8: (16, 0),
    64: (64, 0),
    72: (64, 16),
    80: (64, 16),
    96: (64, 32),
    120: (128, 0),
    128: (128, 0),
    192: (128, 64),
    256: (256, 0),
}


@pytest.mark.parametrize(("head_dim", "blocks"), BLOCKS.items())
def test_usual_head_dims_are_not_padded_to_the_next_power_of_two(
    head_dim: int, blocks: tuple[int, int]
) -> None:
    assert head_dim_blocks(head_dim) == blocks


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_head_dim_over_the_widest_is_an_error_that_says_which(arch: Architecture) -> None:
    with pytest.raises(ValueError, match="head_dim 264 is over the widest served, 256"):
        tile(arch, "forward", 264)


CLASSES = {
    None: "interpreter",
    (8, 0): "ampere",
    (8, 6): "ada",
    (8, 7): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (11, 0): "blackwell",
    (12, 0): "ada",
    (13, 0): "blackwell",
}


@pytest.mark.parametrize(("capability", "name"), CLASSES.items(), ids=str)
def test_every_gpu_has_a_class(capability: tuple[int, int] | None, name: str) -> None:
    assert architecture(capability) == name
