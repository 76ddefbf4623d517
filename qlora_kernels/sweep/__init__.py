"""``qlora sweep``: many finetunes, and what they say together.

- :mod:`.spec`: what a sweep is told, read from YAML and checked.
- :mod:`.datasets`: data sets by name: subsets, noise, shuffled replies, held-out samples.
- :mod:`.plan`: which finetunes there are, drawn by Optuna's samplers.
- :mod:`.queue`: who runs which of them, in Optuna's storage; claims, retries, resumption.
- :mod:`.worker`: a process a finetune; :mod:`.trial` is what runs in it, :mod:`.measure` looks at
  the result.
- :mod:`.report`: table and plot; :mod:`.questions`: the two questions of the QLoRA paper as sweeps,
  :mod:`.answers`: what the results say about them.
"""
