"""An artifact as an ONNX file, in integers or as quantize-dequantize pairs; its sites by name in the metadata.

Metadata `qtx`: version, form, the artifact's sha256, the whole profile that the file computes by, and of each site the
value that holds its codes, with scale, zero point and the codes' limits. `docs/onnx.md` lists the operators.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.spec import SpecError, to_dict

from .. import __version__
from ..disk import write_whole
from ..files.artifact import Artifact, load_artifact
from ..files.container import FileError, check_writable, sha_of, write_beside
from .export_graph import IR_VERSION, OPSET, Graph, Value
from .export_integer import IntegerGraph
from .export_qdq import QdqGraph
from .export_wiring import Wiring

FORMS = {"integer": IntegerGraph, "qdq": QdqGraph}
EXTERNAL = 2**31 - 2**20  # bytes of constants that one protobuf message holds, with room for the rest
SMALL = 1024  # bytes that stay in the graph
ALIGNMENT = 4096  # of external data, so that it can be mapped
SUFFIX = ".onnx"


@dataclass(frozen=True)
class Exported:
    """What was written: the form, its files with their bytes, nodes by operator, and the sites it names."""

    form: str
    files: dict[str, int]
    operators: dict[str, int]
    sites: tuple[str, ...]
    profile: str
    session: dict[str, str]  # entries that an onnxruntime session needs


def export_artifact(
    path: Path,
    out: Path,
    form: str = "integer",
    *,
    external_above: int = EXTERNAL,
    expose: bool = False,
) -> Exported:
    """Writes the artifact `path` as the ONNX file `out`.

    external_above: bytes of constants beyond which they go into `<out>.data` beside it. expose: the codes of every
    site are outputs too. Raises SpecError for a form that is not known, another name than a .onnx, and a site that
    cannot be exported; FileError where `out` exists or cannot be written; MissingExtra without onnx.
    """
    if out.suffix != SUFFIX:
        raise SpecError(f"--out {out}: give a name ending in {SUFFIX}")
    data = out.with_name(out.name + ".data")
    for target in (out, data):
        if target.exists():
            raise FileError(f"{target} exists: choose another --out")
    check_writable(out)
    artifact = load_artifact(path)
    model, wiring = make_model(artifact, form, sha=sha_of(path), expose=expose)
    size = sum(value.nbytes for value in wiring.graph.constants.values())
    try:
        if size > external_above:
            move_constants(model, data)
        write_beside(out, model.SerializeToString())
    except BaseException:  # a full disk, Ctrl-C: constants without their graph would be in the next export's way
        data.unlink(missing_ok=True)
        raise
    written = [target for target in (out, data) if target.exists()]
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return Exported(
        form,
        {str(target): target.stat().st_size for target in written},
        dict(sorted(operators.items())),
        tuple(wiring.sites),
        wiring.profile.name,
        wiring.session(),
    )


def make_model(artifact: Artifact, form: str, *, sha: str = "", expose: bool = False) -> tuple[Any, Wiring]:
    """The artifact as an ONNX model, and what was traced. Raises as `export_artifact`."""
    if form not in FORMS:
        raise SpecError(f"--form {form}: choose one of {', '.join(FORMS)}")
    graph = Graph()
    wiring = FORMS[form](graph, artifact)
    result = wiring.trace()
    graph.place = "output"
    outputs = [Value(graph, graph.node("Identity", result.name, name="output"), result.axes, result.dtype)]
    if expose:
        outputs += unique(wiring.sites.values())
    return build_model(graph, outputs, describe(artifact, wiring, form, sha, result)), wiring


def unique(values: Iterable[Value]) -> list[Value]:
    """Each value once, by its name."""
    return list({value.name: value for value in values}.values())


PLACED = {  # where the form has what is no operator of its own
    "scale of scores": "1 / sqrt(K) is part of the scale with which the query's codes are read",
    "bias": "int32, in units of the input's scale times the weight's",
    "requantization": "the scale of QuantizeLinear behind each product; the profile's where an engine makes one kernel",
}


def describe(artifact: Artifact, wiring: Wiring, form: str, sha: str, result: Value) -> dict[str, Any]:
    """What the file says of itself."""
    return {
        "qtx": __version__,
        "form": form,
        "artifact": sha,
        "profile": to_dict(wiring.profile),
        "nonlinear": str(artifact.nonlinear),
        "session": wiring.session(),
        "placed": PLACED if form == "qdq" else {},
        "output": {
            "scale": to_list(artifact.constants.get("output.scale", result.unit)),
            "zero_point": to_list(result.zero_point),
        },
        "sites": {site: describe_site(value) for site, value in wiring.sites.items()},
    }


def describe_site(value: Value) -> dict[str, Any]:
    """Which value holds a site, and what its integers mean."""
    about: dict[str, Any] = {"value": value.name, "dtype": value.dtype, "scale": to_list(value.unit)}
    if value.spec is not None:
        limits = [int(value.spec.code_min), int(value.spec.code_max)]
        about |= {"zero_point": to_list(value.zero_point), "codes": limits}
    return about


def to_list(value: Any) -> Any:
    """Numbers as JSON has them."""
    return np.asarray(value).tolist()


def build_model(graph: Graph, outputs: list[Value], about: dict[str, Any]) -> Any:
    """The ModelProto of a graph."""
    onnx = graph.onnx
    helper = onnx.helper

    def info(name: str, dtype: str, axes: Any) -> Any:
        return helper.make_tensor_value_info(name, graph.kind(dtype), list(axes))

    made = helper.make_graph(
        graph.nodes,
        "qtx",
        [info(*given) for given in graph.inputs],
        [info(value.name, value.dtype, value.axes) for value in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
    )
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="qtx", producer_version=__version__
    )
    model.ir_version = IR_VERSION
    helper.set_model_props(model, {"qtx": json.dumps(about)})
    return model


def move_constants(model: Any, path: Path) -> None:
    """The constants of a model to a file beside it, but for small ones."""
    parts, offset = [], 0
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < SMALL:
            continue
        parts += [b"\0" * (-offset % ALIGNMENT), tensor.raw_data]
        offset += len(parts[-2])
        for key, value in {"location": path.name, "offset": offset, "length": len(tensor.raw_data)}.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        offset += len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = type(tensor).EXTERNAL
    if parts:
        write_whole(path, b"".join(parts))
