"""What was found in engines and files: each with its cause, lines that reproduce it and a remedy, under a stable name.

A room for each kind. Names are by area: QUA quantize, DEQ dequantize, REQ requantize, ACC accumulation, BIA bias,
CAS cast, SCA scale, GRA graph, NAN. Behind each `print` of a reproduction stands what it printed; the tests run it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from qtx_ref.spec import SpecError

from . import files, numbers, products
from .finding import Finding

__all__ = ["FINDINGS", "LIST", "Finding", "find", "format_finding", "format_page", "list_printed"]

PAGE = """# Findings

What the audits found, each under a name that stays. This page is what `qtx audit findings` prints;
`qtx audit findings QTX-QUA-001` prints one. Behind each `print` of a reproduction stands what it printed with onnx
1.23.2, onnxruntime 1.32.0, torch 2.13, torchao 0.18, ai-edge-litert 2.3.0 and ml_dtypes 0.6 on x86-64 with AVX-512.
"""

LIST = (*numbers.LIST, *products.LIST, *files.LIST)
FINDINGS = {finding.id: finding for finding in LIST}


def find(name: str) -> Finding:
    """The finding of that name. Raises SpecError for an unknown one."""
    if name not in FINDINGS:
        raise SpecError(f"finding is {name!r}: known findings are {', '.join(FINDINGS)}")
    return FINDINGS[name]


def list_printed(finding: Finding) -> list[str]:
    """What the reproduction prints, line by line: the comments behind its `print`s."""
    return re.findall(r"^ *print\(.*\)  # (.+)$", finding.reproduce, re.MULTILINE)


def format_finding(finding: Finding) -> str:
    """One finding as Markdown."""
    said = [f"{word.capitalize()}: {getattr(finding, word)}" for word in ("cause", "consequence", "remedy")]
    parts = [f"## {finding.id}", *(textwrap.fill(text, 118) for text in (f"**{finding.title}**", *said))]
    return "\n\n".join([*parts, f"```python\n{finding.reproduce.strip()}\n```"])


def format_page(findings: Iterable[Finding]) -> str:
    """All of them as one page of Markdown."""
    return "\n\n".join([PAGE.strip(), *map(format_finding, findings)])
