"""The measuring instruments: races between kernels, checked before they are timed.

``race`` times contenders in turn, ``limits`` measures what the machine allows, ``machine`` says
what a figure depends on, ``table`` and ``plots`` show it. All of ``benchmarks/`` measures by these.
"""
