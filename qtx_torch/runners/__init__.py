"""What a cost is measured on, and the engines that are run beside us.

Not in the reference: the engines that are run beside us take torch's tensors and modules.

    passes        our models as runners: float, fake-quantized, bfloat16, integer
    dynamic_int8  torch's dynamic int8
    onnx_export   the float model as an ONNX file
    clocks        seconds, bytes on a CUDA device, shares of ops
"""
