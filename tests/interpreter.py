# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, hastened: half of its time went into looking for what it has replaced.

At every launch, and at every call of a device function inside of one, it lists the members of
`triton.language` to replace its builtins by its own; in the second case there is nothing left to
replace. And it writes down its table of types for every cast. Both are looked up here instead.
"""

import functools
import inspect


def hasten() -> None:
    """Of Triton 3.9; another one stays as it is where it has no such parts."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not {"_patch_builtin", "_patch_attr", "_get_np_dtype"} <= vars(interpreter).keys():
        return

    @functools.cache
    def builtins_of(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package, *scope):
        names = builtins_of(package)  # of the first call, before which nothing was replaced
        if names and tl.core.is_builtin(getattr(package, names[0])):
            for name in names:
                interpreter._patch_attr(package, name, getattr(package, name), *scope)

    interpreter._patch_builtin = patch_builtin
    numpy_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(numpy_dtype)

    def get_np_dtype(dtype):
        kind = dtype.scalar  # of the elements of a block
        return numpy_dtype(kind) if isinstance(kind, tl.pointer_type) else of_scalar(kind)

    interpreter._get_np_dtype = get_np_dtype
