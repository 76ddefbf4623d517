"""The ops in Triton: quantize, dequantize, the linear layer forward and backward."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "qlora_kernels.triton needs Triton, which is not installed: pip install triton (torch's "
        "GPU builds for Linux bring it)"
    ) from error
