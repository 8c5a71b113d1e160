"""Views, which need no operation of a program, and what is ignored."""

from dataclasses import replace
from typing import Any

from samestep.kernels.lowering import (
    Activation,
    BiasGradient,
    Lowering,
    Lowerings,
    Opaque,
    Parameter,
    Results,
    WeightGradient,
)
from samestep.kernels.trace import Node


def _same(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [arguments[0]]


def _opaque(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Opaque()] * len(node.outputs)


def _view(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments[0], node.outputs[0].shape:
        case Activation(_, features, False), (lowering.trace.samples, n) if (
            n == features
        ):
            return [arguments[0]]
        case ((BiasGradient() as gradient), (n,)) if n == gradient.gradient.features:
            return [gradient]
    return None


def _transpose(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments[0]:
        case Activation() | Parameter() as matrix:
            return [replace(matrix, is_transposed=not matrix.is_transposed)]
        case WeightGradient(gradient, inputs):
            return [WeightGradient(inputs, gradient)]
    return None


LOWERINGS: Lowerings = {
    "aten._unsafe_view.default": _view,
    "aten.add_.Tensor": _opaque,
    "aten.detach.default": _same,
    "aten.empty.memory_format": _opaque,
    "aten.t.default": _transpose,
    "aten.view.default": _view,
}
