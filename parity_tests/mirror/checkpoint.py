"""A user's own model in both backends, site by site in forward order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from parity_tests.mirror.fakequant import calibrate_both, find_quantizers, measure_flips
from parity_tests.proof import teacher
from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, relative, relative_rms, report
from qtx_ref.backend import Model as RefModel
from qtx_ref.spec import Head, InputTransform, ModelSpec, QuantSpec, Range
from qtx_torch.backend import Model

Batch = Mapping[str, np.ndarray]
LOSS = 1e-5, "float32 through all layers"


def list_cases(
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    batches: Sequence[Batch],
    quants: Mapping[str, QuantSpec],
    ranges: Mapping[str, Range],
    masked_scores: bool,
    transforms: Mapping[str, InputTransform],
    calibration: Sequence[Batch],
    quantize: bool,
) -> list[Case]:
    """In float, and where there are quantizers under them: each op from the reference's operands, then freely. Where
    there are calibration batches, the ranges that both choose from the reference's tensors."""

    held = {"masked_scores": masked_scores, "transforms": transforms}

    def build_models(context: Context, quantized: bool) -> tuple[RefModel, Model]:
        made = RefModel(spec, params), Model(spec, params, device=context.device)
        for model in made:
            sites = (quants, ranges) if quantized else ({}, {})
            model.bind(*sites, **held)
        return made

    def check_forced(context: Context, quantized: bool) -> list[Verdict]:
        ref, model = build_models(context, quantized)
        hooks: dict[str, nn.Module] = find_quantizers(model)
        verdicts = []
        for batch in batches:
            nx = teacher.FakeQuant(quants, ranges, **held) if quantized else teacher.Float(transforms=transforms)
            verdicts += teacher.force(model, batch, teacher.record(nx, ref, batch), hooks, context)
        return verdicts

    def check_ranges(context: Context) -> list[Verdict]:
        options = {"quantize": quantize, "masked_scores": masked_scores}
        return calibrate_both(*build_models(context, False), calibration, quants, transforms, options, context)[0]

    def check_free_float(context: Context) -> list[Verdict]:
        ref, model = build_models(context, False)
        verdicts = []
        for batch in batches:
            want = ref.record(batch)
            for site, (value, _) in model.record(batch).items():
                error = relative_rms(site, value, want[site][0], np.inf, "").error
                verdicts.append(report(site, "relative rms", error, "float noise so far; reported, not bounded"))
        return verdicts + compare_losses(ref, model)

    def check_free_quantized(context: Context) -> list[Verdict]:
        ref, model = build_models(context, True)
        return [v for batch in batches for v in measure_flips(ref, model, batch, masked_scores)]

    def compare_losses(ref: RefModel, model: Model) -> list[Verdict]:
        if spec.head is Head.NONE:
            return []
        return [relative("loss", model.evaluate(batch)[0], ref.evaluate(batch)[0], *LOSS) for batch in batches]

    rows = [
        Case("checkpoint", "float_forced", "torch", lambda context: check_forced(context, False)),
        Case("checkpoint", "float_free", "torch", check_free_float),
    ]
    if quants and calibration:
        rows.append(Case("checkpoint", "ranges_forced", "torch", check_ranges))
    if quants:
        rows.append(Case("checkpoint", "quantized_forced", "torch", lambda context: check_forced(context, True)))
        rows.append(Case("checkpoint", "quantized_free", "torch", check_free_quantized))
    return rows
