"""A certificate: for every integer product of a model, on every target, a proof that nothing overflows or a witness.

`certify` reads an artifact or an ONNX file, bounds each product by its codes (`certificate_bounds`,
`certificate_overflow`), runs the model on data where there are any, and lists what would mend what can overflow
(`certificate_cures`).
"""

from __future__ import annotations

import shutil
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
from .certificate_bounds import CENTRE, TARGETS, Operand, Product, Target, Verdict, Witness, check_sums
from .certificate_cures import Cure, Tally, list_cures
from .certificate_onnx import read_onnx_products, run_onnx
from .certificate_overflow import check_overflow, check_shift

__all__ = ["Certificate", "Line", "certify", "confirm", "list_engines", "open_products"]

Batch = Mapping[str, np.ndarray]
Runner = Callable[[Batch, Show], None]


@dataclass(frozen=True)
class Line:
    """What holds of one product. `targets`: by name; without those that do not take its codes. `codes`: of both
    operands, as the file has them."""

    name: str
    codes: str  # u8 x s8
    constant: bool  # weights, or activations times activations
    depth: int | None
    columns: int | None
    accumulator: int  # bits
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
        bar.advance(note=name)

    for number, batch in enumerate(batches, 1):
        with Progress(f"batch {number}", len(products)) as bar:
            run(batch, show)
    judged = [add_data(line, tallies.get(name)) for name, line in lines.items()]
    return Certificate(str(path), judged, unread)


def judge(product: Product, targets: Sequence[str], engines: Sequence[str]) -> Line:
    """One product on each target."""
    overflow = check_overflow(product)
    shift = check_shift(product, overflow)
    cures = list_cures(product, overflow, shift)
    verdicts = {}
    if product.left.is_byte and product.right.is_byte:
        for name in targets:
            target = TARGETS[name]
            verdicts[name] = check_sums(product, target) if target.run else overflow
            if target.run == 1:
                verdicts[name] = confirm(product, verdicts[name], engines)
            elif target.run and not verdicts[name].holds:
                verdicts[name] = replace(verdicts[name], note=find_run(product, target))
    constant = product.right.codes is not None
    codes = f"{describe_codes(product.left)} x {describe_codes(product.right)}"
    size = product.depth, product.columns, product.accumulator
    return Line(product.name, codes, constant, *size, verdicts, overflow, shift, cures)


def describe_codes(operand: Operand) -> str:
    """The dtype of codes, in short."""
    return f"{'s' if operand.signed else 'u'}{8 if operand.is_byte else 16}"


def find_run(product: Product, target: Target) -> str:
    """The longest run of pairs, of powers of two, that cannot leave int16, in words."""
    run = target.run // 2
    while run >= 1 and not check_sums(product, replace(target, run=run)).holds:
        run //= 2
    return f"runs of {run} hold" if run else "no run holds"


def add_data(line: Line, tally: Tally | None) -> Line:
    """A line with what data say."""
    if tally is None:
        return line
    cures = [replace(cure, error=tally.error(cure)) for cure in line.cures]
    return replace(line, tally=tally, cures=sorted(cures, key=lambda cure: (cure.error is None, cure.error)))


# --- engines ----------------------------------------------------------------------------------------------------------

ENGINES = {  # a path whose products add pairs in int16, its operation, and the CPU on which it does
    "fbgemm": ("torch-fbgemm", "linear", "avx2"),
    "onednn": ("torch-onednn", "linear", "avx2"),
    "onnxruntime": ("onnxruntime-disable", "matmul", "Haswell"),
}
STEPS = 120  # of a result's scale, for paths that give codes of one byte


def list_engines() -> list[str]:
    """Those of `ENGINES` that are installed, and whose CPU can be had here."""
    there = {path.name for path in paths.list_paths()}
    emulated = shutil.which("qemu-x86_64") is not None
    return [name for name, (path, _, cpu) in ENGINES.items() if path in there and (cpu in paths.SWITCHES or emulated)]


def confirm(product: Product, verdict: Verdict, engines: Sequence[str]) -> Verdict:
    """A verdict with what engines make of its witness: a number, to a 240th of it where the engine gives codes, or in
    words that it refused or crashed. Raises SpecError for an unknown engine, MissingExtra.

    torch's engines take uint8 x int8 alone; onnxruntime is given the codes as the file has them, and what it misses by
    is what it would miss after they are moved: of uint8 x uint8 nothing.
    """
    witness = verdict.witness
    if witness is None:
        return verdict
    seen: dict[str, int | str] = {}
    for name in engines:
        if name not in ENGINES:
            raise SpecError(f"engine is {name!r}: known engines are {', '.join(ENGINES)}")
        path, op, cpu = ENGINES[name]
        try:
            run = run_linear if op == "linear" else run_matmul
            seen[name] = run(path, cpu, product, witness)
        except (paths.EngineCrash, paths.EngineRefusal) as error:
            seen[name] = str(error)
    return replace(verdict, witness=replace(witness, engines=seen))


def run_linear(path: str, cpu: str, product: Product, witness: Witness) -> int:
    """What a path of uint8 times int8, whose result is codes, makes of a witness."""
    x = (witness.left + CENTRE * product.left.signed).astype(np.uint8)[None]
    w = (witness.right - CENTRE * (not product.right.signed)).astype(np.int8)[:, None]
    step, middle = abs(witness.exact) / STEPS, np.uint8(128)
    given = {"x": x, "x_scale": 1.0, "x_zero": 0, "w": w, "w_scale": np.ones(1, np.float32), "w_zero": 0}
    y = paths.run(path, "linear", given | {"bias": None, "y_scale": step, "y_zero": middle}, cpu)["y"]
    return round((int(y[0, 0]) - int(middle)) * step)


def run_matmul(path: str, cpu: str, product: Product, witness: Witness) -> int:
    """What a path of bytes of either sign, whose result is accumulators, makes of a witness."""
    kinds = [np.int8 if side.signed else np.uint8 for side in (product.left, product.right)]
    x, w = witness.left.astype(kinds[0])[None], witness.right.astype(kinds[1])[:, None]
    given = {"x": x, "x_zero": kinds[0](0), "w": w, "w_zero": kinds[1](0)}
    acc = int(paths.run(path, "matmul", given, cpu)["accumulator"][0, 0])
    return witness.exact + acc - int(witness.left @ witness.right)
