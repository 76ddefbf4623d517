"""Data for finetuning: from a file of records to rows of tokens, with every token accounted for.

    prepared = prepare(DataOptions("my.jsonl", max_length=512), tokenizer)
    print("\\n".join(prepared.report.lines()))
    rich.print(preview(prepared.train[0], tokenizer))
    loader = DataLoader(
        prepared.train,
        batch_size=8,
        sampler=EpochSampler(prepared.train, seed=0),
        collate_fn=Collator(tokenizer),
    )

- ``prepare(options, tokenizer) -> Prepared``: reads, recognises, tokenizes, masks, splits, packs.
  Everything that is wrong with the data raises :class:`DataError` here, before any work starts.
- ``Prepared.chat_template``: set it on the tokenizer that is saved with the adapter.
- ``Prepared.train`` and ``.eval`` are :class:`Samples`: sequences of rows (see there).
- ``Collator(tokenizer)`` makes a batch of rows: ``input_ids``, ``labels``, ``attention_mask``
  (padded rows) or ``position_ids`` and ``use_cache=False`` (packed rows). Pass all of it to the
  model.
- ``packing_is_exact(model)``: whether packed samples stay apart in this model; ask before
  training with ``packing``.
- ``EpochSampler`` and ``epoch_order``: the order is a pure function of (seed, epoch).
- ``preview(row, tokenizer)``: a ``rich.text.Text`` with the trained tokens in colour.
"""

from qlora_kernels.finetune.data.arrange import EpochSampler, epoch_order, hold_out, pack
from qlora_kernels.finetune.data.batch import Collator, packing_is_exact
from qlora_kernels.finetune.data.files import read_records
from qlora_kernels.finetune.data.formats import FORMATS, Example, to_examples
from qlora_kernels.finetune.data.prepare import prepare
from qlora_kernels.finetune.data.preview import preview
from qlora_kernels.finetune.data.types import (
    IGNORE,
    DataError,
    DataOptions,
    DataReport,
    Prepared,
    Sample,
    Samples,
)

__all__ = [
    "FORMATS",
    "IGNORE",
    "Collator",
    "DataError",
    "DataOptions",
    "DataReport",
    "EpochSampler",
    "Example",
    "Prepared",
    "Sample",
    "Samples",
    "epoch_order",
    "hold_out",
    "pack",
    "packing_is_exact",
    "prepare",
    "preview",
    "read_records",
    "to_examples",
]
