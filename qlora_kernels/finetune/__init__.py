"""Finetuning a causal language model in 4 bits: ``qlora finetune`` and what it is made of.

- :mod:`.config`: names, defaults, translations, checks; :mod:`.names` has the tables.
- :mod:`.data`: from a file of records to rows of tokens.
- :mod:`.plan`: how much memory it will take.
- :mod:`.trainer`: the run itself; :mod:`.checkpoint` keeps it, :mod:`.report` shows it.

Nothing is imported here: transformers and its like take seconds.
"""
