"""Records operators by their names: ``ops.Add(left, right)``, ``ops.Gather(table, ids, axis=1)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators


class Operators(Tape):
    """A tape of nodes and initializers; an attribute with a capital is an operator to add.

    Its keywords are the operator's attributes; ``_domain`` names another than the standard's, ``_outputs`` asks for a
    list of more than one output.
    """

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        if not operator[:1].isupper():
            raise AttributeError(operator)

        def add(*inputs: ir.Value | None, _domain: str = "", _outputs: int = 1, **attributes: Any) -> Any:
            found = self.op_multi_out(operator, inputs, attributes, domain=_domain, num_outputs=_outputs)
            return found[0] if _outputs == 1 else found

        return add

    def known(self, name: str) -> ir.Value | None:
        """The initializer of that name where there is one already."""
        return next((value for value in self.initializers if value.name == name), None)

    def constant(self, name: str, value: np.ndarray | np.generic) -> ir.Value:
        """An initializer of that name and value; the one that is there already where it was asked for before."""
        known = self.known(name)
        return known if known is not None else self.initializer(ir.tensor(np.asarray(value), name=name))
