"""Whether what runs is being traced: into a graph there go no branch on data, no check of them and no kernel's launch.

Not in the reference: nothing is traced there.
"""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """In this thread, by `torch.compile`; or by `torch.export`, which tells a process. `torch.compiler.is_compiling`
    tells one of both (torch 2.13): what another thread computed meanwhile would go without its checks."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()
