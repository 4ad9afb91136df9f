"""What the robustness tests share: a small problem, and the same problem in other circumstances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_registry.sdpa import AttentionCall, dispatch_counts
from flash_attention_testkit.cases import SdpaCase
from flash_attention_testkit.inputs import SdpaInputs, make_inputs
from flash_attention_testkit.reference import AttentionOptions
from flash_attention_testkit.suite._findings import assert_same, named
from flash_attention_testkit.suite._subject import (
    Subject,
    reason_to_decline,
    run_kernels,
    usual_form,
)

PACKED = ((33, 65), (0, 4), (1, 97), (70, 70), (5, 0))
"""Packed sequences: ragged, without queries, one query, as long, without keys."""


def problem(subject: Subject, *, seed: int = 0, **changes: Any) -> SdpaInputs:
    """A small problem of ragged lengths; skips the test if the subject does not declare it.

    Args:
        subject: For what it declares.
        seed: Tells problems of one test apart.
        **changes: Of the case, which otherwise is a dense batch of two sequences of 40 rows and
            70 keys without a mask, with grouped heads if these are declared. ``lengths`` alone
            makes it packed.
    """
    head_dim, dtype = usual_form(subject)
    kv_heads = 1 if "gqa" in subject.capabilities.features else 2
    measures: dict[str, Any] = {"batch": 2, "heads": 2, "kv_heads": kv_heads}
    measures |= {"seq_q": 40, "seq_k": 70, "head_dim": head_dim, "dtype": dtype}
    lengths = changes.get("lengths")
    if lengths is not None:
        longest = (max(side) for side in zip(*lengths, strict=True))
        measures |= {"batch": len(lengths), **dict(zip(("seq_q", "seq_k"), longest, strict=True))}
    case = SdpaCase(**(measures | changes))
    missing = sorted(case.features - subject.capabilities.features)
    if missing:
        pytest.skip(f"{subject.name} does not declare {', '.join(missing)}")
    return make_inputs(case, subject.seed + seed, subject.device)


def masked(subject: Subject, **options: Any) -> AttentionOptions:
    """Of these options those that the subject declares: causal, and windows."""
    features = subject.capabilities.features
    kept: Any = {
        name: value
        for name, value in options.items()
        if ("causal" if name == "causal" else "window") in features
    }
    options_kept: AttentionOptions = kept
    return options_kept


def run(subject: Subject, inputs: SdpaInputs) -> dict[str, Tensor]:
    """Out, lse and, where they are declared, gradients; the kernel set is called directly."""
    return named(run_kernels(subject, inputs))


def run_call(subject: Subject, call: AttentionCall, grad_out: Tensor) -> dict[str, Tensor]:
    """The same for a call that has been made before; asks the device nothing itself."""
    with torch.no_grad():
        out, lse = subject.kernel_set.forward(call)
        found = {"out": out, "lse": lse}
        if subject.has_backward:
            backward_call = call._replace(out=None)
            grads = subject.kernel_set.backward(backward_call, grad_out, out, lse)
            found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return found


def assert_same_results(subject: Subject, inputs: SdpaInputs, plain: SdpaInputs) -> None:
    """Insist that the kernel set gives the same for the same problem otherwise put.

    Args:
        subject: Is called with both.
        inputs: In special circumstances.
        plain: Contiguous.
    """
    __tracebackhide__ = True
    assert_same(run(subject, inputs), run(subject, plain), plain)


def assert_same_or_declined(subject: Subject, inputs: SdpaInputs, plain: SdpaInputs) -> None:
    """The same where the kernel set serves the inputs as they lie; it may decline that.

    What moves memory in blocks, such as the copy engine of a GPU, takes only aligned addresses.
    A reason is required; that torch's own kernel then runs is a test of dispatch.
    """
    __tracebackhide__ = True
    reason = reason_to_decline(subject, inputs)
    if reason is None:
        assert_same_results(subject, inputs, plain)
    else:
        assert reason.strip(), f"{subject.name} declines without a reason"


def parts(tensors: Mapping[str, Tensor], **rows: slice) -> dict[str, Tensor]:
    """Some rows of some tensors by name; rows are the third axis from the end, of lse the last."""
    return {
        name: tensors[name][..., part] if name == "lse" else tensors[name][..., part, :, :]
        for name, part in rows.items()
        if name in tensors
    }


def needs_backward(subject: Subject) -> None:
    """Leave out a test of gradients where none are declared."""
    if not subject.has_backward:
        pytest.skip(f"{subject.name} declares no backward")


def needs_cuda(subject: Subject) -> None:
    """Leave out a test of what only a CUDA device has."""
    if subject.device.type != "cuda":
        pytest.skip(f"{subject.name} is tested on {subject.device}, and this needs a CUDA device")


def free_memory(subject: Subject, gibibytes: int) -> None:
    """Leave out a test that needs more memory than the CUDA device has free."""
    needs_cuda(subject)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(subject.device)[0] >> 30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free} are free")


@contextmanager
def served(subject: Subject, calls: int) -> Iterator[None]:
    """Insist that inside, the subject serves so many of torch's calls and none goes to stock."""
    __tracebackhide__ = True
    before = dispatch_counts()
    yield
    after = dispatch_counts()
    found = after.served - before.served, after.declined - before.declined
    assert found == (calls, 0), (
        f"{subject.name} served {found[0]} of {calls} calls and {found[1]} went to torch's own "
        f"kernels; since the last reset:\n{after}"
    )
