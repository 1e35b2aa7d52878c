"""A certificate: for every integer product of a model, on every target, a proof that nothing overflows or a witness.

`certify` reads an artifact or an ONNX file, bounds each product by its codes (`certificate_bounds`), runs the model on
data where there are any, and lists what would mend what can overflow (`certificate_cures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qtx_ref.spec import SpecError

from ..engines import paths
from ..files.artifact import SUFFIX, load_artifact
from ..graphs.reading import read_graph
from ..progress import Progress
from .certificate_artifact import Show, read_artifact_products, run_artifact
from .certificate_bounds import TARGETS, Product, Verdict, check_overflow, check_shift, check_sums
from .certificate_cures import Cure, Tally, list_cures
from .certificate_onnx import read_onnx_products, run_onnx

__all__ = ["Certificate", "Line", "certify", "confirm", "open_products"]

Batch = Mapping[str, np.ndarray]
Runner = Callable[[Batch, Show], None]


@dataclass(frozen=True)
class Line:
    """What holds of one product. `targets`: by name; without those that do not take its codes."""

    name: str
    constant: bool  # weights, or activations times activations
    depth: int | None
    columns: int | None
    targets: dict[str, Verdict]
    overflow: Verdict
    shift: Verdict | None
    cures: list[Cure]
    tally: Tally | None = None

    @property
    def holds(self) -> bool:
        """Whether everything is proved on every target that was asked for."""
        verdicts = [*self.targets.values(), self.overflow, self.shift]
        return all(one is None or one.holds for one in verdicts)


@dataclass(frozen=True)
class Certificate:
    """All products of a model, in its order, and nodes of integers that were not read."""

    model: str
    lines: list[Line]
    unread: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every product is proved on every target that was asked for, and none is left."""
        return not self.unread and all(line.holds for line in self.lines)


def open_products(path: Path) -> tuple[list[Product], list[str], Runner]:
    """The products of an artifact or an ONNX file, the nodes that are not read, and what runs a batch.

    Raises FileError for a file that is neither, SpecError for one without integer products.
    """
    unread: list[str] = []
    run: Runner
    if path.suffix == SUFFIX:
        artifact = load_artifact(path)
        products = read_artifact_products(artifact)

        def run(batch: Batch, show: Show) -> None:
            run_artifact(artifact, batch, show)

    else:
        graph = read_graph(path)
        products, unread = read_onnx_products(graph)

        def run(batch: Batch, show: Show) -> None:
            run_onnx(graph, batch, show)

    if not products and not unread:
        raise SpecError(f"{path} has no product of integer codes: give a MODEL{SUFFIX}, or a quantized ONNX file")
    return products, unread, run


def certify(
    path: Path, targets: Sequence[str] = tuple(TARGETS), batches: Iterable[Batch] = (), engines: Sequence[str] = ()
) -> Certificate:
    """The certificate of a file.

    targets: of `TARGETS`. batches: what the model is run on. engines: names in `ENGINES`, to which a witness of each
    product whose pairs overflow is given.

    Raises SpecError for an unknown target or engine, FileError, MissingExtra.
    """
    for target in targets:
        if target not in TARGETS:
            raise SpecError(f"target is {target!r}: known targets are {', '.join(TARGETS)}")
    products, unread, run = open_products(path)
    lines = {}
    with Progress("products", len(products)) as bar:
        for product in products:
            lines[product.name] = judge(product, targets, engines)
            bar.advance(note=product.name)
    by_name = {product.name: product for product in products}
    tallies: dict[str, Tally] = {}

    def show(name: str, *operands: np.ndarray) -> None:
        product = by_name.get(name)
        if product is not None and product.left.is_byte and product.right.is_byte:
            tallies.setdefault(name, Tally()).see(product, lines[name].cures, *operands)

    for batch in batches:
        run(batch, show)
    judged = [add_data(line, tallies.get(name)) for name, line in lines.items()]
    return Certificate(str(path), judged, unread)


def judge(product: Product, targets: Sequence[str], engines: Sequence[str]) -> Line:
    """One product on each target."""
    overflow = check_overflow(product)
    verdicts, cures = {}, []
    if product.left.is_byte and product.right.is_byte:
        cures = list_cures(product)
        for name in targets:
            target = TARGETS[name]
            verdicts[name] = check_sums(product, target) if target.run else overflow
            if target.run == 1 and engines:
                verdicts[name] = confirm(product, verdicts[name], engines)
    shift = check_shift(product, overflow)
    constant = product.right.codes is not None
    return Line(product.name, constant, product.depth, product.columns, verdicts, overflow, shift, cures)


def add_data(line: Line, tally: Tally | None) -> Line:
    """A line with what data say."""
    if tally is None:
        return line
    cures = [replace(cure, error=tally.error(cure)) for cure in line.cures]
    return replace(line, tally=tally, cures=sorted(cures, key=lambda cure: (cure.error is None, cure.error)))


# --- engines ----------------------------------------------------------------------------------------------------------

ENGINES = {  # the path whose products add pairs in int16, and the CPU on which it does
    "onnxruntime": ("onnxruntime-disable", "Haswell"),
}


def confirm(product: Product, verdict: Verdict, engines: Sequence[str]) -> Verdict:
    """A verdict with what engines make of its witness. Raises SpecError for an unknown engine, MissingExtra,
    EngineCrash."""
    if verdict.witness is None:
        return verdict
    left, right = (
        (side.moved(signed), codes.astype(np.int64) + 128 * (side.signed - signed))
        for side, codes, signed in (
            (product.left, verdict.witness.left, False),
            (product.right, verdict.witness.right, True),
        )
    )
    seen = {}
    for name in engines:
        if name not in ENGINES:
            raise SpecError(f"engine is {name!r}: known engines are {', '.join(ENGINES)}")
        path, cpu = ENGINES[name]
        given = {
            "x": left[1].astype(np.uint8)[None],
            "x_zero": np.uint8(0),
            "w": right[1].astype(np.int8)[:, None],
            "w_zero": np.int8(0),
        }
        seen[name] = int(paths.run(path, "matmul", given, cpu)["accumulator"][0, 0])
    return replace(verdict, witness=replace(verdict.witness, engines=seen))
