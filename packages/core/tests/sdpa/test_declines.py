"""What no kernel set may see goes to stock, with a reason that is counted.

At the CUDA key of a build without CUDA there is no stock kernel: a declined call ends in an error
that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_registry.sdpa import dispatch_counts, install

CudaOp = Callable[..., Any]
SDPA = "_scaled_dot_product_flash_attention"
FLASH = "_flash_attention_forward"
CUDNN = "_scaled_dot_product_cudnn_attention"
INPLACE = "_flash_attention_forward_no_dropout_inplace"


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


Q = tensor(2, 4, 6, 16)
PACKED = tensor(6, 4, 16)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)
DENSE = (None, None, 6, 6, 0.0, False, False)
SAME = (Q, Q, Q)


def packed(first: Any, second: Any) -> tuple[Any, ...]:
    return PACKED, PACKED, PACKED, first, second, 4, 4, 0.0, False, False


DECLINED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "dropout": (SDPA, (*SAME, 0.1), {}, "dropout_p > 0 is not supported"),
    "debug-mask": (SDPA, (*SAME, 0.0, False, True), {}, "return_debug_mask is not supported"),
    "ndim": (SDPA, (Q[0], Q[0], Q[0]), {}, "query, key and value are not all 4-dimensional"),
    "value-shape": (SDPA, (Q, Q, Q[..., :8]), {}, "key and value differ in shape"),
    "value-heads": (SDPA, (Q, Q, Q[:, :2]), {}, "key and value differ in shape"),
    "empty": (SDPA, (Q, Q[:, :, :0], Q[:, :, :0]), {}, "a tensor is empty"),
    "batch": (SDPA, (Q, Q[:1], Q[:1]), {}, "query and key differ in batch size"),
    "head-dim": (SDPA, (Q[..., :8], Q, Q), {}, "query and key differ in head_dim"),
    "heads": (
        SDPA,
        (Q, Q[:, :3], Q[:, :3]),
        {},
        "the number of query heads is not a multiple of the number of key heads",
    ),
    "mixed-dtype": (SDPA, (Q, Q.half(), Q), {}, "query, key and value differ in dtype"),
    "strides": (
        SDPA,
        (Q, Q, tensor(2, 4, 16, 6).mT),
        {},
        "the last dimension of query, key or value is not contiguous",
    ),
    "overlapping": (
        SDPA,
        (Q.as_strided((2, 4, 10, 16), (384, 96, 1, 1)), Q, Q),
        {},
        "the last dimension of the output is not contiguous",
    ),
    "float32": (SDPA, (Q.float(),) * 3, {}, "dtype torch.float32 is not supported"),
    "large-head": (SDPA, (tensor(1, 1, 2, 512),) * 3, {}, "head_dim 512 is not supported"),
    "dense-ndim": (
        FLASH,
        (PACKED, PACKED, PACKED, *DENSE),
        {},
        "query, key and value are not all 4-dimensional",
    ),
    "one-offset": (
        FLASH,
        packed(OFFSETS, None),
        {},
        "cum_seq_q and cum_seq_k are not given together",
    ),
    "other-offset": (
        FLASH,
        packed(None, OFFSETS),
        {},
        "cum_seq_q and cum_seq_k are not given together",
    ),
    "int64-offsets": (
        FLASH,
        packed(OFFSETS, OFFSETS.long()),
        {},
        "cum_seq_q and cum_seq_k are not both one-dimensional, contiguous and int32",
    ),
    "strided-offsets": (
        FLASH,
        packed(OFFSETS, torch.arange(6, dtype=torch.int32)[::2]),
        {},
        "cum_seq_q and cum_seq_k are not both one-dimensional, contiguous and int32",
    ),
    "unequal-offsets": (
        FLASH,
        packed(OFFSETS, OFFSETS[:2]),
        {},
        "cum_seq_q and cum_seq_k do not describe the same sequences",
    ),
    "packed-ndim": (
        FLASH,
        (Q, Q, Q, OFFSETS, OFFSETS, 4, 4, 0.0, False, False),
        {},
        "query, key or value has an unexpected number of dimensions for packed sequences",
    ),
    "packed-values": (
        FLASH,
        (PACKED, PACKED, PACKED[:5], OFFSETS, OFFSETS, 4, 4, 0.0, False, False),
        {},
        "key and value differ in shape",
    ),
    "packed-empty": (
        FLASH,
        (PACKED[:0], PACKED, PACKED, OFFSETS, OFFSETS, 4, 4, 0.0, False, False),
        {},
        "a tensor is empty",
    ),
    "packed-head-dim": (
        FLASH,
        (PACKED[..., :8], PACKED, PACKED, OFFSETS, OFFSETS, 4, 4, 0.0, False, False),
        {},
        "query and key differ in head_dim",
    ),
    "packed-heads": (
        FLASH,
        (PACKED, *[PACKED[:, :3]] * 2, OFFSETS, OFFSETS, 4, 4, 0.0, False, False),
        {},
        "the number of query heads is not a multiple of the number of key heads",
    ),
    "alibi": (FLASH, (*SAME, *DENSE), {"alibi_slopes": Q}, "alibi_slopes is not supported"),
    "seqused": (
        FLASH,
        packed(OFFSETS, OFFSETS),
        {"seqused_k": OFFSETS[1:].contiguous()},
        "seqused_key is not supported",
    ),
    "seqused-dense": (
        FLASH,
        (*SAME, *DENSE),
        {"seqused_k": OFFSETS[1:]},
        "seqused_k without cum_seq_k: torch reads it of packed sequences only",
    ),
    "seqused-long": (
        FLASH,
        packed(OFFSETS, OFFSETS),
        {"seqused_k": OFFSETS[1:].long()},
        "seqused_k is not contiguous and int32",
    ),
    "seqused-gaps": (
        FLASH,
        packed(OFFSETS, OFFSETS),
        {"seqused_k": OFFSETS[::2]},
        "seqused_k is not contiguous and int32",
    ),
    "seqused-others": (
        FLASH,
        packed(OFFSETS, OFFSETS),
        {"seqused_k": OFFSETS},
        "seqused_k and cum_seq_k do not describe the same sequences",
    ),
    "paged": (
        FLASH,
        (PACKED, *[tensor(3, 2, 4, 16)] * 2, OFFSETS, OFFSETS, 4, 4, 0.0, False, False),
        {"block_table": OFFSETS},
        "block_table is not supported",
    ),
    "splits": (FLASH, (*SAME, *DENSE), {"num_splits": 2}, "num_splits > 1 is not supported"),
    "flash-dropout": (
        FLASH,
        (*SAME, None, None, 6, 6, 0.1, False, False),
        {},
        "dropout_p > 0 is not supported",
    ),
    "inplace-shape": (
        INPLACE,
        (Q[:, :3], *SAME, *DENSE),
        {},
        "out differs from query in shape, dtype or device",
    ),
    "inplace-strides": (
        INPLACE,
        (tensor(2, 4, 16, 6).mT, *SAME, *DENSE),
        {},
        "the last dimension of the output is not contiguous",
    ),
    "inplace-debug": (
        INPLACE,
        (Q.clone(), *SAME, None, None, 6, 6, 0.0, False, True),
        {},
        "return_debug_mask is not supported",
    ),
    "cudnn-bias": (CUDNN, (*SAME, Q, True), {}, "attn_bias is not supported"),
    "cudnn-dropout": (CUDNN, (*SAME, None, True, 0.5), {}, "dropout_p > 0 is not supported"),
    "cudnn-causal": (
        CUDNN,
        (Q, Q[:, :, :5], Q[:, :, :5], None, True, 0.0, True),
        {},
        "causal attention of unequal lengths through cuDNN's op is not supported",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_invalid_or_unserved_forward_goes_to_stock(
    case: str, cuda_op: CudaOp, plain_kernels: type
) -> None:
    op, args, kwargs, reason = DECLINED[case]
    if not hasattr(torch.ops.aten, op):
        pytest.skip(f"torch {torch.__version__} has no {op}")
    kernel_set = plain_kernels()
    install(kernel_set, "cuda")
    with pytest.raises(RuntimeError, match=f"aten::{op} was called for CUDA .* no CUDA kernel"):
        cuda_op(op, *args, **kwargs)
    assert dispatch_counts()[op].declined == {reason: 1}
    assert kernel_set.calls == []


LSE = torch.zeros(2, 4, 6)
SEED = torch.zeros((), dtype=torch.int64)
MARKED = torch.zeros(3, dtype=torch.int64)[2]
RNG = (SEED, SEED)
NOT_LSE = "logsumexp is not what this op's forward returns"


def dense_backward(**changes: Any) -> tuple[Any, ...]:
    parts = {"grad_out": Q, "query": Q, "key": Q, "value": Q, "out": Q, "lse": LSE}
    parts |= {"cum_q": None, "cum_k": None, "max_q": 6, "max_k": 6, "dropout": 0.0, "causal": False}
    return (*(parts | changes).values(), *RNG)


def cudnn_backward(**changes: Any) -> tuple[Any, ...]:
    parts = {"grad_out": Q, "query": Q, "key": Q, "value": Q, "out": Q, "lse": LSE[..., None]}
    parts |= {"seed": MARKED, "offset": SEED, "bias": None, "cum_q": None, "cum_k": None}
    parts |= {"max_q": 6, "max_k": 6, "dropout": 0.0, "causal": False}
    return tuple((parts | changes).values())


LSE_BSHD = torch.zeros(2, 6, 4)  # the general pair reads Q as 4 rows of 6 heads
DECLINED_BACKWARD: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "dropout": (SDPA, dense_backward(dropout=0.1), "dropout_p > 0 is not supported"),
    "offsets": (
        SDPA,
        dense_backward(cum_q=OFFSETS),
        "cum_seq_q and cum_seq_k of a dense backward are not supported",
    ),
    "heads": (SDPA, dense_backward(value=Q[:, :2]), "key and value differ in shape"),
    "grad-shape": (
        SDPA,
        dense_backward(grad_out=Q[:1]),
        "grad_out or out differs from query in shape",
    ),
    "grad-dtype": (
        SDPA,
        dense_backward(grad_out=Q.float()),
        "grad_out or out differs from query in dtype",
    ),
    "lse-shape": (SDPA, dense_backward(lse=LSE[..., None]), NOT_LSE),
    "lse-dtype": (SDPA, dense_backward(lse=LSE.double()), NOT_LSE),
    "flash-dropout": (
        "_flash_attention",
        dense_backward(dropout=0.1),
        "dropout_p > 0 is not supported",
    ),
    "flash-lse": ("_flash_attention", dense_backward(lse=LSE), NOT_LSE),
    "flash-dense": ("_flash_attention", dense_backward(query=Q[0]), "not all 4-dimensional"),
    "flash-offset": (
        "_flash_attention",
        dense_backward(cum_q=OFFSETS),
        "cum_seq_q and cum_seq_k are not given together",
    ),
    "cudnn-unmarked": (CUDNN, cudnn_backward(seed=SEED), "forward was run by cuDNN"),
    "cudnn-dropout": (CUDNN, cudnn_backward(dropout=0.1), "dropout_p > 0 is not supported"),
    "cudnn-bias": (CUDNN, cudnn_backward(bias=Q), "attn_bias is not supported"),
    "cudnn-offsets": (
        CUDNN,
        cudnn_backward(cum_k=OFFSETS),
        "cum_seq_q and cum_seq_k of a dense backward are not supported",
    ),
    "cudnn-lse": (CUDNN, cudnn_backward(lse=LSE), NOT_LSE),
}


@pytest.mark.parametrize("case", DECLINED_BACKWARD)
def test_invalid_or_unserved_backward_goes_to_stock(
    case: str, cuda_op: CudaOp, plain_kernels: type
) -> None:
    op, args, reason = DECLINED_BACKWARD[case]
    kernel_set = plain_kernels()
    install(kernel_set, "cuda")
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(f"{op}_backward", *args)
    ((counted, times),) = dispatch_counts()[f"{op}_backward"].declined.items()
    assert counted.endswith(reason)
    assert times == 1
    assert kernel_set.calls == []


@pytest.mark.parametrize(
    ("op", "args"),
    [
        pytest.param(SDPA, dense_backward(), id="sdpa"),
        pytest.param("_flash_attention", dense_backward(lse=LSE_BSHD), id="flash"),
        pytest.param(CUDNN, cudnn_backward(), id="cudnn"),
    ],
)
def test_backward_is_stocks_if_the_kernel_set_has_none(
    op: str, args: tuple[Any, ...], cuda_op: CudaOp, plain_kernels: type
) -> None:
    install(plain_kernels(features=frozenset({"causal"})), "cuda")
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(f"{op}_backward", *args)
    assert dispatch_counts()[f"{op}_backward"].declined == {"backward is not supported": 1}


def test_explicit_choice_of_cudnn_is_obeyed(cuda_op: CudaOp, plain_kernels: type) -> None:
    install(plain_kernels(), "cuda")
    backends = torch.nn.attention.SDPBackend
    with (
        torch.nn.attention.sdpa_kernel(backends.CUDNN_ATTENTION),
        pytest.raises(RuntimeError, match="no CUDA kernel"),
    ):
        cuda_op(CUDNN, *SAME, None, True)
    with torch.nn.attention.sdpa_kernel([backends.CUDNN_ATTENTION, backends.FLASH_ATTENTION]):
        cuda_op(CUDNN, *SAME, None, True)
    counts = dispatch_counts()[CUDNN]
    assert counts.served == 1
    assert counts.declined == {
        "flash attention is disabled, so the caller asked for cuDNN itself": 1
    }


@pytest.mark.parametrize("name", ["sdpa_flash", "flash_forward"])
def test_arguments_of_newer_schemas_are_declined_when_used(name: str, plain_kernels: type) -> None:
    from flash_attention_registry.sdpa import flash, flash_general
    from flash_attention_registry.sdpa.serving import ActiveKernels

    adapter = flash.sdpa_flash if name == "sdpa_flash" else flash_general.flash_forward
    kernels = ActiveKernels(plain_kernels(), strict=False)
    args = (*SAME, 0.0, False, False) if name == "sdpa_flash" else (*SAME, *DENSE)
    assert adapter(kernels, *args, tiles=4) == "argument tiles is not supported"
    assert adapter(kernels, *args, 4) == "an additional positional argument is not supported"
    assert not isinstance(adapter(kernels, *args, None, tiles=None), str)


def test_empty_slot_without_stock_says_what_is_missing(
    cuda_op: CudaOp, plain_kernels: type
) -> None:
    install(plain_kernels(), "cuda").remove()
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(SDPA, *SAME)
    assert dispatch_counts()[SDPA].declined == {}
