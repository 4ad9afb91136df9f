"""The form of what the ops return, which compiled graphs rely on, and whose memory it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.cases import Layout
from flash_attention_testkit.suite._subject import Subject, call_of
from flash_attention_testkit.suite.dispatch_base import (
    OpTests,
    every_differentiable_op,
    every_op,
    problem,
    skip_unless_declared,
)
from flash_attention_testkit.suite.dispatch_ops import (
    Arguments,
    CallOp,
    Op,
    as_torch_declares,
    backward_arguments,
    forward_arguments,
    tensors_in,
)

every_layout = pytest.mark.parametrize(
    "layout", get_args(Layout), ids=lambda x: x.replace(" ", "-")
)


class FormTests(OpTests):
    """Shapes, dtypes and strides as torch's meta functions declare them; nothing shared."""

    @every_op
    @every_layout
    def test_out_has_the_declared_form(
        self, subject: Subject, op: Op, call_op: CallOp, layout: Layout
    ) -> None:
        """Out is shaped, typed and laid out as the query's memory demands."""
        if op.in_place:
            pytest.skip("its out is the caller's")
        arguments = _forward_of(subject, op, layout)
        declared = as_torch_declares(op.forward, arguments)
        assert _form(call_op(op.forward, arguments)[0]) == _form(declared[0])

    @every_op
    def test_lse_has_the_declared_form(self, subject: Subject, op: Op, call_op: CallOp) -> None:
        """Lse is float32 in the op's shape."""
        arguments = _forward_of(subject, op)
        result, declared = call_op(op.forward, arguments), as_torch_declares(op.forward, arguments)
        if not op.in_place:
            result, declared = result[1], declared[1]
        assert _form(result) == _form(declared)

    @every_op
    def test_other_results_have_the_declared_form(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """Random state, debug mask, offsets and lengths."""
        if op.in_place:
            pytest.skip("it returns lse alone")
        arguments = _forward_of(subject, op)
        declared = as_torch_declares(op.forward, arguments)
        result = call_op(op.forward, arguments)
        assert list(map(_form, result[2:])) == list(map(_form, declared[2:]))

    @every_differentiable_op
    @every_layout
    def test_gradients_have_the_declared_form(
        self, subject: Subject, op: Op, call_op: CallOp, layout: Layout
    ) -> None:
        """Gradients are shaped, typed and laid out as their tensors' memory demands."""
        name, arguments = _backward_of(subject, op, call_op, layout)
        declared = as_torch_declares(name, arguments)
        assert list(map(_form, call_op(name, arguments))) == list(map(_form, declared))

    @every_op
    def test_forward_leaves_its_arguments_alone(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """Query, key, value and offsets are as they were."""
        arguments = _forward_of(subject, op)
        _assert_unchanged(op.forward, arguments, call_op, skip=int(op.in_place))

    @every_differentiable_op
    def test_backward_leaves_its_arguments_alone(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """So are what the forward gave and the gradient of out."""
        name, arguments = _backward_of(subject, op, call_op)
        _assert_unchanged(name, arguments, call_op)

    @every_op
    def test_forward_results_share_no_memory(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """Writing to one result changes no other, and no argument."""
        arguments = _forward_of(subject, op)
        _assert_separate(arguments, call_op(op.forward, arguments))

    @every_differentiable_op
    def test_gradients_share_no_memory(self, subject: Subject, op: Op, call_op: CallOp) -> None:
        """Likewise for gradients."""
        name, arguments = _backward_of(subject, op, call_op)
        _assert_separate(arguments, call_op(name, arguments))

    @every_op
    def test_a_second_forward_leaves_the_firsts_results_alone(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """Results are the caller's to keep."""
        first = tensors_in(call_op(op.forward, _forward_of(subject, op)))
        kept = [_bits(tensor) for tensor in first]
        other = problem(subject, op, batch=2)
        call_op(op.forward, forward_arguments(op, replace(other, query=-2 * other.query)))
        unchanged = _all_equal([_bits(tensor) for tensor in first], kept)
        assert unchanged, "a second call has written to what the first had returned"

    @every_differentiable_op
    def test_a_second_backward_leaves_the_firsts_gradients_alone(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """Likewise for gradients."""
        name, arguments = _backward_of(subject, op, call_op)
        first = tensors_in(call_op(name, arguments))
        kept = [_bits(tensor) for tensor in first]
        other = problem(subject, op, batch=2)
        other = replace(other, grad_out=-2 * other.grad_out)
        call_op(name, backward_arguments(op, other, call_op))
        unchanged = _all_equal([_bits(tensor) for tensor in first], kept)
        assert unchanged, "a second call has written to what the first had returned"

    @pytest.mark.parametrize("lies", ["rows first", "heads first", "in wider rows"])
    def test_given_out_is_written_as_it_lies(self, subject: Subject, lies: str) -> None:
        """The kernel set fills the caller's tensor, whatever its strides, and nothing beside it."""
        inputs = problem(subject, batch=2)
        batch, rows, heads, width = inputs.query.shape
        if lies == "heads first":
            out = inputs.query.new_full((batch, heads, rows, width), torch.nan).transpose(1, 2)
            margin = out[..., width:]
        else:
            more = 8 if lies == "in wider rows" else 0
            wide = inputs.query.new_full((batch, rows, heads, width + more), torch.nan)
            out, margin = wide[..., :width], wide[..., width:]
        call = call_of(inputs, out=out)
        reason = subject.kernel_set.supports(call)
        if reason is not None:
            pytest.skip(f"{subject.name} declines an output that lies {lies}: {reason}")
        with torch.no_grad():
            result, _ = subject.kernel_set.forward(call)
        assert result.data_ptr() == out.data_ptr(), "call.out was given and is not what is returned"
        assert not out.isnan().any(), "not all of call.out was written"
        assert margin.isnan().all(), "memory beside call.out was written"

    def test_out_is_allocated_where_none_is_given(self, subject: Subject) -> None:
        """``call.out`` may be None."""
        inputs = problem(subject)
        with torch.no_grad():
            out, _ = subject.kernel_set.forward(call_of(inputs))
        assert (out.shape, out.dtype) == (inputs.query.shape, inputs.query.dtype)


def _forward_of(subject: Subject, op: Op, layout: Layout = "BSHD") -> Arguments:
    return forward_arguments(op, problem(subject, op, batch=2, layout=_possible(op, layout)))


def _backward_of(
    subject: Subject, op: Op, call_op: CallOp, layout: Layout = "BSHD"
) -> tuple[str, Arguments]:
    """Name and arguments of the op's backward; skipped if gradients are not declared."""
    skip_unless_declared(subject, "backward")
    assert op.backward is not None
    inputs = problem(subject, op, batch=2, layout=_possible(op, layout))
    return op.backward, backward_arguments(op, inputs, call_op)


def _possible(op: Op, layout: Layout) -> Layout:
    if op.packed and layout in ("BHSD", "expanded"):
        pytest.skip(f"packed sequences have no layout {layout}")
    return layout


def _form(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), value.dtype, value.stride()


def _assert_unchanged(name: str, arguments: Arguments, call_op: CallOp, skip: int = 0) -> None:
    __tracebackhide__ = True
    schema = getattr(torch.ops.aten, name).default._schema
    given = {
        argument.name: value
        for argument, value in zip(schema.arguments[skip:], arguments[0][skip:], strict=False)
        if isinstance(value, Tensor)
    }
    before = {argument: _bits(value) for argument, value in given.items()}
    call_op(name, arguments)
    written = [x for x, value in given.items() if not torch.equal(_bits(value), before[x])]
    assert not written, f"aten::{name} has written to its arguments"


def _assert_separate(arguments: Arguments, result: Any) -> None:
    """Write to each result, and see whether anything else changes."""
    __tracebackhide__ = True
    results = tensors_in(result)
    everything = [*tensors_in(arguments[0]), *results]
    for written in results:
        others = [tensor for tensor in everything if tensor is not written]
        before = [_bits(tensor) for tensor in others]
        if written.is_floating_point():
            written.neg_()  # changes a bit of every number
        else:
            written.fill_(12345)
        if not _all_equal([_bits(tensor) for tensor in others], before):
            raise AssertionError(
                f"a result of shape {list(written.shape)} shares memory with another result, or "
                "with an argument"
            )


def _bits(tensor: Tensor) -> Tensor:
    """A copy of its bytes, in which a NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


def _all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))
