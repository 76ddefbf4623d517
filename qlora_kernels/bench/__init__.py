"""The measuring instruments: races between kernels, checked before they are timed.

==============  ================================================================================
``race``        contenders that are checked, then timed in turn
``limits``      what the machine allows: reads, copies, dense products; its caches
``machine``     what a figure depends on, and whether two machines are the same
``shapes``      linear layers by name: LLaMA's, a model folder's, ``NxK``
``work``        one line: an op on a layer, its inputs, its reference, who races, what it costs
``contenders``  ways of keeping a weight: this package's on each backend, bitsandbytes', torch's
``weights``     the contenders of quantize and dequantize
``optimizers``  the contenders of an optimizer step
``refcheck``    the bound that a result must keep
``measure``     rounds over all lines
``modelled``    the same lines for a GPU that is not here, by ``gpu_model``
``gpu_model``   times from the emulator's counts (``gpu_counts.json``)
``results``     the JSON: written, read, checked
``compare``     two of them, with their noise
``report``      tables (``table``) and pictures (``plots``)
``command``     ``qlora bench``
==============  ================================================================================

All of ``benchmarks/`` measures by these. docs/bench.md says how to read what they print.
"""
