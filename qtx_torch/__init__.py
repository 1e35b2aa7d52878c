"""The accelerator: the reference's arithmetic in torch, on CPU and CUDA. It knows `qtx_ref.spec` and nothing else of
it."""
