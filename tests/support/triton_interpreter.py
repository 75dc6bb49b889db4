"""Triton's interpreter (TRITON_INTERPRET=1) as these tests want it: with numpy 2.4 and with bfloat16.

Triton 3.6 makes Python numbers of arrays with one element, which numpy no longer does, and multiplies the bits of
bfloat16 as whole numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def mend_interpreter() -> None:
    """Once a process, before the first kernel runs."""
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _without_bfloat16(interpreter, a), _without_bfloat16(interpreter, b), *rest)

    interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot = patch_lang_tensor, create_dot


def _without_bfloat16(interpreter: Any, handle: Any) -> Any:
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)
