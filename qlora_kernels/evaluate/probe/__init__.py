"""``qlora probe``: strengths and weaknesses of a model, by generated items and plain rules.

The QLoRA paper looks at its models by hand: factual recall, suggestibility, refusal, secrets,
mathematics, theory of mind. Here each is a module with a function that makes items from a seed and
one that grades a reply:

- :mod:`.arithmetic`, :mod:`.keeping` (of secrets), :mod:`.premises`, :mod:`.minds`, :mod:`.recall`,
  :mod:`.refusing`;
- :mod:`.reading` has what graders share: what a reply asserts, and what it denies;
- :mod:`.items` puts them together, :mod:`.run` asks, :mod:`.report` counts.
"""
