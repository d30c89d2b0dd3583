"""GPU kernels of the attention ops, in Triton: what an op launches, how it runs, how it is compiled ahead of time.

`programs` says what an op launches as plain data (`program`), `launch` runs that on torch tensors (Triton's interpreter
on the CPU), `aot` compiles the kernels to cubins with a manifest, from which a C++ plugin is generated. Importing this
package needs neither triton nor torch.
"""

from __future__ import annotations

import importlib.util

from edgeattn.errors import MissingDependency


def require_triton(why: str) -> None:
    """Check that triton is installed.

    Raises:
        MissingDependency: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec("triton") is None:
        raise MissingDependency(f"{why} needs triton, which is not installed. Run: pip install 'edgeattn[kernels]'")
