"""How a step is computed: in parts, in float16, with blocks computed again, compiled, in a fixed order."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import qtx_ref.backend
import qtx_torch.backend
from parity_tests.long import compiled
from parity_tests.subjects import small_models
from qtx.engines.machine import Machine
from qtx.prepare.calibration import bind
from qtx.recipes.named import training_recipe
from qtx_ref.spec import PLAIN_STEP, ObserverKind, ObserverSpec, OptimSpec, QuantSpec, Sharding, SpecError, StepSpec
from qtx_torch.numerics import Float
from qtx_torch.quant import gradients
from qtx_torch.step import LossScale, check_deterministic

OPTIM = OptimSpec(lr=1e-3, warmup=5, steps=100)
RUNNING = QuantSpec(observer=ObserverSpec(ObserverKind.RUNNING))  # a batch seen twice moves the mean twice
BACKENDS = {"ref": qtx_ref.backend, "torch": qtx_torch.backend}


Trainer = qtx_torch.backend.Trainer


def make_trainer(
    name: str, step: StepSpec = PLAIN_STEP, rate: float = 0.1, dtype: str = "float32", layers: int = 2
) -> Trainer:
    small = small_models.build(name)
    spec = replace(small.spec, dropout=rate, attention_dropout=rate, layers=layers)
    trainer = Trainer(qtx_torch.backend.Model(spec, small.params, dtype=dtype), OPTIM, seed=1, step=step)
    if trainer.scale:
        trainer.scale.value = 2.0**10  # the gradients of these parameters are above 1
    return trainer


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_part_without_targets_has_no_loss(kind):
    """Two rows of four ask nothing: the loss is that of the other two, and so is each gradient."""
    small = small_models.build("bert_plain", 4)
    batch = small.batch | {"targets": np.where(np.arange(4)[:, None] < 2, small.batch["targets"], -1)}
    model = BACKENDS[kind].Model(small.spec, small.params, dtype="float64")
    want_loss, want = model.gradients({key: value[:2] for key, value in batch.items()})
    loss, grads = model.gradients(batch, accumulate=2)
    assert loss == want_loss
    for key, value in want.items():
        np.testing.assert_array_equal(grads[key], value)
    with pytest.raises(ValueError, match="no target"):
        model.gradients(batch | {"targets": np.full_like(batch["targets"], -1)}, accumulate=2)


@pytest.mark.parametrize("kind", BACKENDS)
def test_refused_parts(kind):
    small = small_models.build("opt_plain", 4)
    trainer = BACKENDS[kind].Trainer(BACKENDS[kind].Model(small.spec, small.params), OPTIM, step=StepSpec(accumulate=3))
    with pytest.raises(SpecError, match="step accumulate is 3: a batch of 4 rows"):
        trainer.step(small.batch)
    with pytest.raises(SpecError, match="rows 4 to 8 of a batch of 8: one process computes the whole batch"):
        trainer.step(small.batch, first=4, total=8)
    with pytest.raises(SpecError, match="step accumulate"):
        StepSpec(accumulate=0)


@pytest.mark.parametrize("field", [{"recompute": True}, {"compiled": True}, {"sharding": Sharding.FULL}], ids=str)
def test_the_reference_computes_a_step_in_one_way(field):
    small = small_models.build("opt_plain")
    model = qtx_ref.backend.Model(small.spec, small.params)
    (name, value), *_ = field.items()
    with pytest.raises(SpecError, match=f"step {name} is {value}: .*use --backend torch"):
        qtx_ref.backend.Trainer(model, OPTIM, step=StepSpec(**field))
    qtx_ref.backend.Trainer(model, OPTIM, step=StepSpec(accumulate=3, deterministic=True)).step(small.batch)


# --- float16 ----------------------------------------------------------------------------------------------------------


def test_loss_scale_is_that_of_torch(monkeypatch):
    """Beside torch's own over 400 steps, of which some overflow; growth after 20 here."""
    monkeypatch.setattr("qtx_torch.step.PATIENCE", 20)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=20), LossScale()
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    rng = np.random.default_rng(0)
    for _ in range(400):
        overflow = rng.uniform() < 0.04
        theirs.scale(torch.zeros(()))  # torch makes its scale where it is first used
        weight.grad = torch.tensor([1.0, np.inf if overflow else 1.0])
        theirs.step(optimizer)
        theirs.update()
        ours.update(np.inf if overflow else 1.0)
        assert ours.value == theirs.get_scale()
    assert ours.value != 2.0**16


def test_float16_trains_and_its_norm_is_of_the_loss_itself():
    half, full = make_trainer("bert_plain", dtype="float16"), make_trainer("bert_plain")
    batch = small_models.build("bert_plain").batch
    losses = [(half.step(batch), full.step(batch)) for _ in range(8)]
    for got, want in losses:
        np.testing.assert_allclose(got, want, rtol=2e-2)  # 11 bits through two layers, with parameters far from quiet
    assert losses[-1][0][0] < losses[0][0][0]
    assert all(value.dtype == np.float32 for value in half.model.params().values())
    assert half.scale == LossScale(2.0**10, good=8)


def test_a_step_that_overflows_is_skipped_and_counts():
    """Nothing but the count and the scale changes; the next step has the rate and the draws of its own number, and the
    averages' t of the steps that were taken. Resumed from where it stands, it gives the same bits."""
    batch = small_models.build("opt_plain").batch
    trainer, straight = make_trainer("opt_plain", dtype="float16"), make_trainer("opt_plain", dtype="float16")
    trainer.scale.value = 2.0**40
    before = trainer.model.params() | trainer.state()
    loss, norm = trainer.step(batch)
    after = trainer.model.params() | trainer.state()
    assert loss == straight.step(batch)[0] and not np.isfinite(norm)
    changed = {key for key, value in after.items() if not np.array_equal(value, before[key])}
    assert changed == {"optim.step", "optim.skipped", "optim.loss_scale"}
    assert (trainer.adam.count, trainer.adam.skipped, trainer.scale) == (1, 1, LossScale(2.0**39))
    trainer.scale.value = 2.0**10
    trainer.step(batch)
    resumed = make_trainer("opt_plain", dtype="float16")
    resumed.model = qtx_torch.backend.Model(trainer.model.spec, trainer.model.params(), dtype="float16")
    resumed = qtx_torch.backend.Trainer(resumed.model, OPTIM, seed=1)
    resumed.load_state(trainer.state())
    assert [resumed.step(batch) for _ in range(3)] == [trainer.step(batch) for _ in range(3)]
    for key, value in (trainer.model.params() | trainer.state()).items():
        np.testing.assert_array_equal((resumed.model.params() | resumed.state())[key], value)
    # AdamW's first update moves each parameter by about the rate, here that of step 1, whatever was skipped before
    first = make_trainer("opt_plain", dtype="float16")
    first.adam.skipped, first.adam.count = 1, 1
    was = first.model.params()
    first.step(batch)
    moved = max(np.abs(value - was[key]).max() for key, value in first.model.params().items())
    assert moved == pytest.approx(2 / 5 * 1e-3, rel=0.1)  # decay moves the largest a little more


def test_at_scale_1_a_step_is_taken_as_in_float32():
    """What overflows still is no matter of scale: the run diverges, and is seen to."""
    batch = small_models.build("bert_plain").batch
    trainer = make_trainer("bert_plain", dtype="float16")
    trainer.scale.value = 1.0
    with torch.no_grad():
        trainer.model.weights["layer.0.ffn.output.weight"].fill_(1e30)
    assert not np.isfinite(trainer.step(batch)[0])
    assert trainer.scale == LossScale(1.0) and trainer.adam.skipped == 0


# --- recomputation ----------------------------------------------------------------------------------------------------


def saved_bytes(trainer: Trainer, batch: dict[str, np.ndarray]) -> int:
    """What autograd keeps between a forward and a backward pass, each storage once, without parameters."""
    own = {value.untyped_storage().data_ptr() for value in trainer.model.leaves().values()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        inputs = trainer.model.accept(batch)
        logits = trainer.model.compute(Float(training=True, seed=1), inputs)
        total = sum(kept.values())
    del logits
    return total


@pytest.mark.parametrize("name", ["bert_clipped_alpha", "opt_plain", "vit_gate_mlp"])
@pytest.mark.parametrize("recipe", ["float", "w8a8"])
def test_recomputation_changes_no_bit_and_keeps_less(name, recipe):
    small = small_models.build(name, 8)
    plain, again = make_trainer(name), make_trainer(name, StepSpec(recompute=True))
    for trainer in (plain, again):
        if recipe != "float":
            bind(trainer.model, training_recipe(recipe, trainer.model.spec), {})
    for _ in range(3):
        assert plain.step(small.batch) == again.step(small.batch)
    for key, value in plain.model.params().items():
        np.testing.assert_array_equal(again.model.params()[key], value)
    assert saved_bytes(again, small.batch) < 0.5 * saved_bytes(plain, small.batch)


def test_what_looks_at_tensors_sees_each_once():
    """Statistics and calibration are passes of their own, without gradients, in which nothing is computed again."""
    plain, again = make_trainer("bert_plain"), make_trainer("bert_plain", StepSpec(recompute=True))
    batch, quants = small_models.build("bert_plain").batch, {"layer.0.ffn.hidden": RUNNING}
    calls: list[str] = []
    again.model._show(batch, ["layer.0.ffn.hidden"], lambda site, x, where: calls.append(site))
    assert calls == ["layer.0.ffn.hidden"]
    batches = [small_models.make_batch(plain.model.spec, size) for size in (3, 4, 5)]
    want, got = (t.model.calibrate(batches, quants) for t in (plain, again))
    assert got["layer.0.ffn.hidden"] == want["layer.0.ffn.hidden"]


# --- where and in which order -----------------------------------------------------------------------------------------


def test_a_deterministic_step_leaves_torch_as_it_was(monkeypatch):
    trainer, plain = make_trainer("bert_plain", StepSpec(deterministic=True)), make_trainer("bert_plain")
    batch = small_models.build("bert_plain").batch
    seen: list[bool] = []
    compute = trainer.model.forward_pass

    def look(*given: object) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return compute(*given)

    trainer.model.forward_pass = look
    assert trainer.step(batch) == plain.step(batch)
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
    trainer.model.forward_pass = lambda *given: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.step(batch)
    assert not torch.are_deterministic_algorithms_enabled()
    for value in (None, ":0:0"):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if value:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        with pytest.raises(SpecError, match="step deterministic is True on cuda: set CUBLAS_WORKSPACE_CONFIG=:4096:8"):
            check_deterministic(torch.device("cuda"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check_deterministic(torch.device("cuda"))


def test_the_device_auto_is_kept_by_the_name_of_the_one_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Machine("torch", "auto") == Machine("torch", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Machine("torch", "auto") == Machine("torch", "cuda")
    assert Machine("ref", "auto") == Machine("ref", "cpu")
    assert Machine("torch", "cuda:1").device == "cuda:1"


# --- compiled ---------------------------------------------------------------------------------------------------------


def trace(monkeypatch):
    """Traced and differentiated as for the compiler, and run op by op, where no compiler is too."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("qtx_torch.trainer.find_compiler", lambda device: "")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's tracer says them of torch
@pytest.mark.parametrize("name", ["bert_clipped_alpha", "opt_plain", "opt_clipped_row"])
def test_a_compiled_step_is_one_graph_with_the_same_draws(name, monkeypatch):
    """What code is generated for it, `python -m parity_tests.long.compiled` compares."""
    trace(monkeypatch)
    counters.clear()
    again = name.startswith("opt")  # a block that is computed again may make nothing that lies outside it
    step = StepSpec(accumulate=2, compiled=True, recompute=again)
    traced, eager = make_trainer(name, step, layers=1), make_trainer(name, layers=1)
    for seed in range(3):
        batch = small_models.make_batch(traced.model.spec, 4 + 2 * seed)
        batch = {key: value[:4] for key, value in batch.items()}
        # the same ops; sums over two parts are in another order
        np.testing.assert_allclose(traced.step(batch), eager.step(batch), rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["bert_plain", "opt_plain"])
def test_quantized_gradients_are_compiled(name, monkeypatch):
    trace(monkeypatch)
    models = [make_trainer(name, layers=1).model for _ in range(2)]
    for model in models:
        bind(model, training_recipe("w8a8+grad8", model.spec), {})
    eager, traced = (
        Trainer(m, OPTIM, seed=3, step=StepSpec(compiled=c)) for m, c in zip(models, (False, True), strict=True)
    )
    for seed in range(2):
        batch = small_models.make_batch(traced.model.spec, 4 + 2 * seed)
        assert traced.step(batch) == eager.step(batch)  # the same ops in the same order


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_gradients_of_heads_are_the_same_compiled_under_autocast():
    """A gate's logits are float32 under autocast, and so are the products of its backward pass."""

    def run(compiled: bool) -> list[np.ndarray]:
        torch._dynamo.reset()
        drawn = np.random.default_rng(0)
        x, w, b = (torch.tensor(drawn.normal(size=n), requires_grad=True) for n in ((2, 5, 8), (2, 3, 4), (2, 3)))
        how = gradients.Backward(training_recipe("w8a8+grad8", small_models.specs()["opt_plain"]).gradients, "s", 0, 1)

        def apply(x, w, b):
            return gradients.linear(x.float(), w.float(), b.float(), how)

        with torch.autocast("cpu", torch.bfloat16):
            y = (torch.compile(apply, backend="aot_eager") if compiled else apply)(x, w, b)
        y.square().sum().backward()
        return [v.grad.numpy() for v in (x, w, b)]

    for eager, traced in zip(run(False), run(True), strict=True):
        np.testing.assert_array_equal(traced, eager)


def test_without_a_compiler_a_compiled_step_is_refused(monkeypatch):
    monkeypatch.setattr("qtx_torch.trainer.find_compiler", lambda device: f"nothing for {device}")
    with pytest.raises(SpecError, match="^step compiled is True: nothing for cpu; leave it out$"):
        make_trainer("opt_plain", StepSpec(compiled=True))


def test_a_step_names_what_its_compiler_says(monkeypatch):
    exc = pytest.importorskip("torch._inductor.exc")
    monkeypatch.setattr("qtx_torch.trainer.find_compiler", lambda device: "")
    made = make_trainer("opt_plain", StepSpec(compiled=True))

    def fail(*given):
        raise exc.InductorError(OSError(28, "No space left on device"), None)

    monkeypatch.setattr(made.model, "run", fail)
    said = r"^the compiler fails, OSError: \[Errno 28\] No space left on device, with its caches in "
    with pytest.raises(SpecError, match=said + "TORCHINDUCTOR_CACHE_DIR: leave step compiled out, or mend it$"):
        made.step(small_models.make_batch(made.model.spec, 4))


def test_a_step_that_fails_uncompiled_says_why(monkeypatch):
    """Whatever keeps torch's compiler from being imported: its caches have no folder."""
    made = make_trainer("opt_plain")

    def fail(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(made.model, "run", fail)
    monkeypatch.setitem(sys.modules, "torch._dynamo.exc", None)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        made.step(small_models.make_batch(made.model.spec, 4))


def test_what_is_not_compiled():
    with pytest.raises(SpecError, match="step sharding"):
        StepSpec(compiled=True, sharding=Sharding.FULL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler says them of torch
def test_compiled_draws_and_codes_have_every_bit():
    torch._dynamo.reset()
    wrong = [verdict for verdict in compiled.check_operations(names=("per token",)) if not verdict.ok]
    assert not wrong
