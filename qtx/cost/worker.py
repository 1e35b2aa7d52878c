"""What `qtx cost` runs in processes of their own: a crash there is a finding, and memory is that of one variant alone.

`python -m qtx.cost.worker` answers the tasks of `qtx.cost.compare`, in the messages of `qtx.engines.process`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from qtx_ref.integer.lifting import real
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention
from qtx_ref.spec import ModelSpec, OptimSpec, Output, SpecError, from_dict

from ..engines import ort as onnx_engine
from ..engines.backend import backend
from ..engines.process import Tell, Values, serve
from ..files.artifact import load_artifact
from ..files.checkpoint import load_checkpoint
from ..prepare import calibration

WARM = 3  # passes before any that counts
Task = dict[str, Any]


class PlainRunner:
    """A model of the reference: NumPy in, NumPy out."""

    def __init__(self, call: Callable[[Any], Any], model: Any) -> None:
        self.call, self.model = call, model

    def inputs(self, batch: Any) -> Any:
        """A batch as the model takes it."""
        return batch

    def __call__(self, inputs: Any) -> Any:
        return self.call(inputs)

    def output(self, result: Any) -> Any:
        """What a pass gave, as an array."""
        return result


def load(task: Task, kind: str, file: str) -> Any:
    """The runner of a variant; see `qtx_torch.runners` for what one is."""
    path, threads, device = Path(file), task["threads"], task["device"]
    if kind.startswith("onnx"):
        return onnx_engine.OnnxRunner(path, threads)
    module, torch = backend(task["backend"]), task["backend"] == "torch"
    if torch:
        importlib.import_module("torch").set_num_threads(threads)
        passes = importlib.import_module("qtx_torch.runners.passes")
    if kind in ("integer", "integer-compiled"):
        artifact = load_artifact(path)
        options: dict[str, Any] = {"compiled": True} if kind == "integer-compiled" else {}
        meaning = artifact.spec, artifact.constants, artifact.quants, artifact.profile
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            integers = module.IntegerModel(*meaning, device=device, **options)
        if options and getattr(integers, "execution", None) is None:  # it would be measured as what it is not
            raise SpecError("; ".join(str(one.message) for one in said))
        return passes.IntegerRunner(integers) if torch else PlainRunner(integers.run, integers)
    checkpoint = load_checkpoint(path)
    model = module.Model(checkpoint.spec, checkpoint.params, device=device)
    if kind == "fake" and checkpoint.recipe is not None:
        calibration.bind(model, checkpoint.recipe, checkpoint.ranges, checkpoint.transforms)
    if not torch:
        return PlainRunner(model.forward, model)
    if kind == "bfloat16":
        return passes.make_bfloat16_runner(model)
    if kind == "torch-dynamic":
        return passes.FloatRunner(model, importlib.import_module("qtx_torch.runners.dynamic_int8").DynamicInt8(model))
    return passes.FloatRunner(model)


def clock(task: Task, kind: str) -> Callable[[Callable[[], Any]], float]:
    """How a variant is timed: by the clock, or by CUDA's."""
    if kind.startswith("onnx") or task["device"] == "cpu":
        return onnx_engine.by_clock
    device = importlib.import_module("torch").device(task["device"])
    return importlib.import_module("qtx_torch.runners.clocks").make_timer(device)


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_peak() -> int | None:
    """The largest resident size of this process since `reset_peak`, in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        pass
    try:
        usage = importlib.import_module("resource")
    except ModuleNotFoundError:
        return None
    return usage.getrusage(usage.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Gives back what is only freed, and starts the peak anew, where the system can (Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        pass


# --- tasks ------------------------------------------------------------------------------------------------------------


def measure_idle(task: Task, tell: Tell) -> Task:
    """Memory of a process that has the libraries and no model."""
    if task["kind"].startswith("onnx"):
        importlib.import_module("onnxruntime")
    else:
        backend(task["backend"])
    reset_peak()
    return {"peak": resident_peak()}


def prepare(task: Task, tell: Tell) -> Task:
    """Makes the file that an engine loads."""
    source, path = Path(task["source"]), Path(task["file"])
    if task["kind"] == "onnx":
        checkpoint = load_checkpoint(source)
        exporter = importlib.import_module("qtx_torch.runners.onnx_export")
        exporter.export_onnx(checkpoint.spec, checkpoint.params, path, masked=task["masked"])
    else:
        batches = (load_file(file) for file in task["calibration"])
        onnx_engine.quantize(source, path, task["kind"] == "onnx-static", iter(batches))
    return {}


def probe(task: Task, tell: Tell) -> Task:
    """Memory of some passes, their output to `task["output"]`, the argmax of the output of each sample, (N, T) or (N,),
    to `task["answers"]`, and which kernels ran."""
    kind, batch = task["kind"], load_file(task["cell"])
    runner = load(task, kind, task["file"])
    inputs = runner.inputs(batch)
    cuda = task["device"] != "cpu" and not kind.startswith("onnx")
    reset_peak()

    if cuda:
        clocks = importlib.import_module("qtx_torch.runners.clocks")
        peak = clocks.measure_peak(runner.device, lambda: repeated(runner, inputs))
    else:
        repeated(runner, inputs)
        peak = resident_peak()
    np.save(task["output"], answer(runner, inputs))
    given = (runner.inputs(load_file(file)) for file in task["samples"])
    answers = [answer(runner, one).argmax(axis=-1).astype(np.int32) for one in given]
    if answers:
        np.save(task["answers"], np.concatenate(answers))
    return {"peak": peak} | (kernels(task, runner, batch, inputs) if task["profile"] else {})


def answer(runner: Any, inputs: Any) -> np.ndarray:
    """The output of one pass, in real numbers."""
    output = runner.output(runner(inputs))
    return real(output) if isinstance(output, Output) else output


def repeated(runner: Any, inputs: Any) -> None:
    for _ in range(WARM):
        runner(inputs)


def kernels(task: Task, runner: Any, batch: Any, inputs: Any) -> Task:
    """Shares of op time, of the integer matmuls and of the quantizers; `matmuls` is the share of all matrix
    products."""
    kind = task["kind"]
    if kind.startswith("onnx"):
        ops, matmuls = onnx_engine.shares(Path(task["file"]), task["threads"], batch)
        return {"ops": ops, "matmuls": matmuls}
    result: Task = {}
    if task["backend"] == "torch":
        clocks = importlib.import_module("qtx_torch.runners.clocks")
        result["ops"], result["matmuls"] = clocks.measure_shares(runner.device, lambda: repeated(runner, inputs))
    profiling = importlib.import_module(f"qtx_{task['backend']}.timing")
    if kind == "integer":
        timed, seconds = profiling.products(runner.model, batch)
        result["matmuls"] = sum(taken for *_, taken in timed) / seconds
        result["kernels"] = {kernel: sum(k == kernel for _, k, _ in timed) for _, kernel, _ in timed}
    if kind == "fake":
        steps, seconds = profiling.quantizers(runner.model, batch)
        result["quantizers"] = len(steps)
        result["weight_quantizers"] = sum(site.endswith(".weight") for site, _ in steps)
        result["quantizing"] = sum(taken for _, taken in steps) / seconds
    return result


def turns(task: Task, calls: dict[str, tuple[Callable, Callable]], tell: Tell) -> Iterator[tuple[str, float]]:
    """Every call once a round, in an order drawn anew; the first rounds do not count."""
    order, names = random.Random(0), list(calls)
    for round_ in range(WARM + task["rounds"]):
        order.shuffle(names)
        for name in names:
            call, measure = calls[name]
            seconds = measure(call)
            if round_ >= WARM:
                yield name, seconds
        tell(len(names))


def time_variants(task: Task, tell: Tell) -> Task:
    """Seconds of each pass of each variant in each cell, all variants in turn."""
    runners = {name: load(task, kind, file) for name, (kind, file) in task["variants"].items()}
    result: dict[str, dict[str, list[float]]] = {}
    for cell, (file, names) in task["cells"].items():
        batch, calls = load_file(file), {}
        for name in names:
            runner = runners[name]
            inputs = runner.inputs(batch)
            measure = clock(task, task["variants"][name][0])
            calls[name] = (lambda runner=runner, inputs=inputs: runner(inputs), measure)
        times = result[cell] = {name: [] for name in names}
        for name, seconds in turns(task, calls, tell):
            times[name].append(seconds)
    return {"seconds": result}


def time_ways(task: Task, tell: Tell) -> Task:
    """What each way to multiply bytes exactly takes here, a line for each shape: compiled integers take the fastest."""
    importlib.import_module("torch").set_num_threads(task["threads"])
    machine = importlib.import_module("qtx_torch.integer.machine")
    return {"lines": machine.describe(task["device"].partition(":")[0])}


def time_attentions(task: Task, tell: Tell) -> Task:
    """Seconds of each pass, and of each training step, of one shape with each attention, in turn."""
    module, spec, torch = backend(task["backend"]), from_dict(ModelSpec, task["spec"]), task["backend"] == "torch"
    if torch:
        importlib.import_module("torch").set_num_threads(task["threads"])
        passes = importlib.import_module("qtx_torch.runners.passes")
    result: dict[str, dict[str, dict[str, list[float]]]] = {"forward": {}, "step": {}}
    for cell, file in task["cells"].items():
        batch = load_file(file)
        models = {}
        for name, text in task["variants"].items():
            shape = replace(spec, attention=attention(text), dropout=0.0, attention_dropout=0.0)
            models[name] = module.Model(shape, init_params(shape, 0), device=task["device"])
            if name in task["unfused"]:
                passes.unfuse(models[name])
        measure = clock(task, "float32")
        runners = {n: passes.FloatRunner(m) if torch else PlainRunner(m.forward, m) for n, m in models.items()}
        given = {name: runner.inputs(batch) for name, runner in runners.items()}
        calls = {n: (lambda n=n: runners[n](given[n]), measure) for n in models}  # noqa: B023
        kinds = {"forward": calls}
        if task["training"]:
            optim = OptimSpec(steps=1000, lr=1e-4)
            trainers = {n: module.Trainer(model, optim) for n, model in models.items()}
            kinds["step"] = {n: (lambda n=n: trainers[n].step(batch), measure) for n in models}  # noqa: B023
        for kind, each in kinds.items():
            times = result[kind][cell] = {name: [] for name in models}
            for name, seconds in turns(task, each, tell):
                times[name].append(seconds)
    return result


TASKS = {
    "idle": measure_idle,
    "prepare": prepare,
    "probe": probe,
    "time": time_variants,
    "attentions": time_attentions,
    "ways": time_ways,
}


def main() -> None:
    """Does the tasks that stdin brings."""

    def do(task: Task, values: Values, tell: Tell) -> tuple[Task, Values]:
        return TASKS[task["task"]](task, tell), {}

    serve(do)


if __name__ == "__main__":
    main()
