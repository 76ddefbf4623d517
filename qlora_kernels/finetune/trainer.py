"""A finetune from a configuration to an adapter: transformers' Trainer, made exact to resume.

What is exact rests on three things. The order of the data is a pure function of (seed, epoch). All
random numbers of a step (dropout) come from generators that are seeded at its start by (seed,
step), so that nothing drawn in between, by an evaluation or a restart, can shift them. And a
checkpoint holds the rest: trained parameters, optimizer, scheduler, counters (:mod:`.checkpoint`).

The folder of a run::

    config.yaml          the resolved configuration: `qlora finetune config.yaml` is the same run
    identity.json        what the losses depend on: settings, data, model, machine
    log.jsonl            a line a step, as it happens
    checkpoint-<step>/   complete or absent
    adapter_model.safetensors, adapter_config.json, tokenizer: the result, in PEFT's format
    curves.png, figures.json
    mmlu.json            what do_mmlu_eval measured
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.markup import escape
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from .. import cpu
from ..activations import fuse, recompute
from ..integrations import optimizers
from ..nn import Linear4bit
from .checkpoint import (
    CheckpointStore,
    DamagedCheckpoint,
    load_state,
    read_json,
    replace_file,
    save_state,
    write_json,
)
from .config import FinetuneConfig
from .data import (
    IGNORE,
    Collator,
    EpochSampler,
    Prepared,
    packing_is_exact,
    prepare,
    preview,
)
from .errors import BadInput, Interrupted, RunError, bad_input
from .model import fingerprint_model, load_tokenizer
from .plan import (
    MemoryPlan,
    StepShape,
    available_memory,
    peak_memory,
    plan_memory,
    resident_memory,
)
from .report import ProgressReport, clock, draw_curves, megabytes, plan_table, throughput

__all__ = ["NonFiniteLoss", "QLoraTrainer", "finetune"]


class NonFiniteLoss(RunError):
    """The loss, or the norm of the gradient, is NaN or infinite; no step was taken with it."""


# --- random numbers -----------------------------------------------------------------------------


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's random numbers: 63 bits of BLAKE2b of (seed, step)."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _seed_everything(value: int) -> None:
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)


# --- the trainer --------------------------------------------------------------------------------


class _Conductor(TrainerCallback):
    """Seeds each step, keeps its record, and stops between two steps when asked to."""

    def __init__(self, trainer: QLoraTrainer) -> None:
        self._trainer = trainer
        self.stop_signal: int | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._trainer.end_step()
        if self.stop_signal is not None:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO
        return control


class QLoraTrainer(Trainer):
    """transformers' Trainer with exact resume, checkpoints without pickles, and a loss that is
    checked before it is believed.

    Args:
        model, args, processing_class: as in Trainer; ``model`` is a PeftModel.
        data: the prepared samples.
        store: where checkpoints go; None keeps none.
        identity: what goes into each checkpoint to tell runs apart.
    """

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As Trainer's; paged and 8-bit optimizers are this package's, never bitsandbytes'."""
        with optimizers.ours():
            return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def __init__(
        self,
        model: Any,
        args: Any,
        data: Prepared,
        tokenizer: Any,
        *,
        store: CheckpointStore | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.store, self.identity = store, dict(identity or {})
        self.history: list[dict[str, Any]] = []
        self.log_file: Path | None = None
        self._record: dict[str, Any] = {}
        self._sampler: Any = None
        self._updates_per_epoch = 1
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(tokenizer),
            train_dataset=data.train,
            eval_dataset=data.eval if len(data.eval) else None,
            processing_class=tokenizer,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.conductor = _Conductor(self)
        self.add_callback(self.conductor)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        count = sum(
            m.in_features * m.out_features
            for m in self.model.modules()
            if isinstance(m, (nn.Linear, Linear4bit))
        )
        # 2 for the forward pass, 2 for the gradient of the input, none for that of the weight.
        self._flops_a_token = 4 * count

    # -- data --

    def get_train_dataloader(self) -> DataLoader:
        args, data = self.args, self.train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.train_sampling_strategy == "sequential":
            sampler = SequentialSampler(data)
        else:
            group = args.train_sampling_strategy == "group_by_length"
            size = args.train_batch_size * args.gradient_accumulation_steps
            sampler = self._sampler = EpochSampler(
                data, seed=seed, batch_size=size if group else None
            )
        loader = self._loader(data, args.train_batch_size, sampler, args.dataloader_drop_last)
        if not len(loader):
            raise BadInput(
                f"{len(data)} rows make no batch of {args.train_batch_size} with "
                "dataloader_drop_last: lower per_device_train_batch_size"
            )
        self._updates_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        # Longest first: least padding, and memory that is short is short at once.
        order = np.argsort(-np.asarray(data.lengths), kind="stable").tolist()
        return self._loader(data, self.args.eval_batch_size, order, False)

    def _loader(self, data: Any, batch: int, sampler: Any, drop_last: bool) -> DataLoader:
        args = self.args
        return DataLoader(
            data,
            batch_size=batch,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def begin_epoch(self) -> None:
        if self._sampler is not None:
            # From the step, which a checkpoint restores, not from who calls how often.
            self._sampler.set_epoch(self.state.global_step // self._updates_per_epoch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was interrupted after its last checkpoint has no step left; Trainer looks only
        # after it has taken one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # -- a step --

    def begin_step(self) -> None:
        _seed_everything(step_seed(self.args.seed, self.state.global_step))
        self._record = {"loss": 0.0, "tokens": 0, "trained": 0, "start": time.perf_counter()}

    def end_step(self) -> None:
        record = self._record
        seconds = time.perf_counter() - record.pop("start")
        line = {
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            **record,
            "seconds": seconds,
        }
        self.history.append(line)
        if self.log_file is not None:
            with self.log_file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> Tensor:
        record, labels = self._record, inputs["labels"]
        mask = inputs.get("attention_mask")
        record["tokens"] += int(mask.sum()) if mask is not None else labels.numel()
        record["trained"] += int((labels[..., 1:] != IGNORE).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss of step {self.state.global_step + 1} is {value}")
        record["loss"] += value
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # Activation checkpointing keeps less still, and compiled code plans its own memory.
        if self.args.activation_checkpointing or self.args.torch_compile:
            return super().compute_loss(*args, **kwargs)
        with recompute():
            return super().compute_loss(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(norm)
        # With fp16's scaler an overflow is usual: it skips the step and lowers the scale.
        if not math.isfinite(value) and getattr(self.accelerator, "scaler", None) is None:
            raise NonFiniteLoss(
                f"the norm of the gradient in step {self.state.global_step + 1} is {value}"
            )
        self._record["grad_norm"] = value
        self._record["learning_rate"] = self._get_learning_rate()
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return self._flops_a_token * inputs["input_ids"].numel()

    # -- evaluation --

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss of all trained tokens. (Trainer's own is a mean of means of batches, in
        which a token of a short reply counts for more.)"""
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        total, count = 0.0, 0
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            trained = int((inputs["labels"][..., 1:] != IGNORE).sum())
            if trained:
                with torch.no_grad(), self.compute_loss_context_manager():
                    total += model(**inputs).loss.item() * trained
                count += trained
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        loss = total / count if count else math.nan
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_tokens": count}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]

    # -- checkpoints --

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        store, step = self.store, self.state.global_step
        # An epoch's end may ask again for what its last step has saved.
        if store is None or store.path(step).exists():
            return
        self.store_flos()
        if self.state.best_global_step:
            best = store.path(self.state.best_global_step)
            if best.exists() or self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(best)
        store.write(step, self._fill_checkpoint)
        store.rotate(self.args.save_total_limit, protect=self.state.best_global_step)

    def _fill_checkpoint(self, folder: Path) -> None:
        save_adapter(self.model, folder)
        self.processing_class.save_pretrained(folder)
        save_state(folder, "optimizer", self.optimizer.state_dict())
        save_state(folder, "scheduler", self.lr_scheduler.state_dict())
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            save_state(folder, "scaler", scaler.state_dict())
        write_json(folder / "history.json", self.history)
        write_json(folder / "identity.json", self.identity)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_adapter(self.model if model is None else model, folder)
        self.history = read_json(folder / "history.json")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        with bad_input(f"{folder} does not fit this run"):
            self.optimizer.load_state_dict(load_state(folder, "optimizer"))
            self.lr_scheduler.load_state_dict(load_state(folder, "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: see :meth:`begin_step`."""

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            load_adapter(self.model, Path(self.state.best_model_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapter and tokenizer, without Trainer's pickle of the arguments."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, folder)
        self.processing_class.save_pretrained(folder)


def save_adapter(model: Any, folder: Path) -> None:
    """The adapter as PEFT writes it, and beside it whatever else is trained."""
    from peft import get_peft_model_state_dict

    model.save_pretrained(folder)
    kept = {t.data_ptr() for t in get_peft_model_state_dict(model).values()}
    rest = {
        name: p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad and p.data_ptr() not in kept
    }
    if rest:
        save_file(rest, folder / "trained_besides.safetensors")


def load_adapter(model: Any, folder: Path) -> None:
    """What :func:`save_adapter` wrote, into a model of the same adapters.

    Raises:
        BadInput: names or shapes that do not agree.
    """
    from peft import set_peft_model_state_dict

    with bad_input(f"{folder} does not fit this model"):
        try:
            weights = load_file(folder / "adapter_model.safetensors")
            found = set_peft_model_state_dict(model, weights, adapter_name=model.active_adapter)
            if found.unexpected_keys:
                raise ValueError(f"the model has no {', '.join(found.unexpected_keys[:3])}")
            extra = folder / "trained_besides.safetensors"
            if extra.is_file():
                parameters = dict(model.named_parameters())
                with torch.no_grad():
                    for name, value in load_file(extra).items():
                        parameters[name].copy_(value)
        except (RuntimeError, KeyError) as error:
            raise ValueError(str(error)) from error


# --- what a run depends on ----------------------------------------------------------------------

_fingerprint_model = fingerprint_model


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the bits of a result depend on besides settings, data and model."""
    from importlib.metadata import version

    from .. import __version__

    machine: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "instruction set of qlora-kernels": cpu.isa(),
        "device": str(device.type),
        "qlora-kernels": __version__,
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine | {name: version(name) for name in ("transformers", "peft", "accelerate")}


# Settings that decide which parameters there are: another run's checkpoint cannot be loaded.
_STRUCTURAL = frozenset(
    """
    r target_modules exclude_modules modules_to_save bias use_dora layers_to_transform
    layers_pattern rank_pattern trainable_token_indices layer_replication lora_bias
    target_parameters quant_type blocksize double_quant skip_modules optim
    """.split()
)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``name: old, now new`` for each difference of two mappings."""
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    return [f"{n}: {_short(old.get(n))}, now {_short(new.get(n))}" for n in names]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "..."


# --- a run's folder -----------------------------------------------------------------------------

_OURS = (
    "config.yaml",
    "identity.json",
    "figures.json",
    "log.jsonl",
    "curves.png",
    "adapter_model.safetensors",
    "adapter_config.json",
    "trained_besides.safetensors",
    "mmlu.json",
)


@dataclass
class _Resume:
    """How a run begins."""

    path: Path | None = None  # a checkpoint; None: at the beginning
    exact: bool = True
    because: list[str] = field(default_factory=list)  # why it is not exact


def _wants_resume(value: Any) -> bool | Path:
    """``resume_from_checkpoint``: no, yes (the latest), or which."""
    text = str(value).strip().lower()
    if value is None or text in ("false", "no", "none", ""):
        return False
    return True if text in ("true", "yes", "latest", "last") else Path(str(value)).expanduser()


def _open_folder(
    config: FinetuneConfig, store: CheckpointStore, say: Any
) -> tuple[_Resume, dict[str, Any] | None]:
    """Decides whether this run begins, goes on or is refused; what was there if it goes on.

    Raises:
        BadInput: the folder holds another run, or nothing to resume.
    """
    folder = store.folder
    store.sweep()
    present = [name for name in _OURS if (folder / name).exists()]
    steps = store.steps()
    wish = _wants_resume(config.resume_from_checkpoint)
    if config.overwrite:
        if wish:
            raise BadInput("overwrite and resume_from_checkpoint contradict each other")
        for step in steps:
            store.remove(step)
        for name in present:
            (folder / name).unlink()
        return _Resume(), None

    identity_file = folder / "identity.json"
    identity = read_json(identity_file) if identity_file.is_file() else None
    if isinstance(wish, Path):
        path = wish if wish.is_dir() else folder / wish
        if not path.is_dir():
            raise BadInput(f"there is no checkpoint {wish}")
        owner = CheckpointStore(path.parent)
        step = next((s for s in owner.steps() if owner.path(s).name == path.name), None)
        if step is None:
            raise BadInput(f"{path} is not a checkpoint: they are called checkpoint-<step>")
        owner.verify(step)
        identity = read_json(path / "identity.json")
        resume = _Resume(path)
        inside = path.resolve().parent == folder.resolve()
        if not inside and (present or steps):
            raise BadInput(
                f"{folder} holds another run than that of {path}: give another "
                "output_dir, or overwrite"
            )
    else:
        if not present and not steps:
            if wish:
                raise BadInput(f"{folder} holds no checkpoint to resume from")
            return _Resume(), None
        if identity is None:
            raise BadInput(
                f"{folder} holds files of another run ({', '.join(present or ['checkpoints'])}): "
                "give another output_dir, or overwrite (which deletes them)"
            )
        found, damaged = store.latest()
        for problem in damaged:
            say(f"[yellow]damaged checkpoint, not used:[/] {escape(problem)}")
        for step in [s for s in steps if found is None or s > found]:
            store.put_aside(step, "damaged")
        if damaged and found is None:
            raise DamagedCheckpoint(
                f"no checkpoint in {folder} is intact; overwrite begins the run anew"
            )
        resume = _Resume(None if found is None else store.path(found))

    changed = _differences(identity["settings"], config.decisive)
    if changed and not wish:
        raise BadInput(
            f"{folder} holds another run ({'; '.join(changed[:4])}"
            f"{'; ...' if len(changed) > 4 else ''}): give another output_dir, or overwrite; or "
            "resume_from_checkpoint true to go on with other settings, which is not exact"
        )
    names = {c.partition(":")[0] for c in changed}
    if names & _STRUCTURAL:
        raise BadInput(
            "the checkpoint cannot be loaded with other settings of "
            f"{', '.join(sorted(names & _STRUCTURAL))}"
        )
    if changed:
        resume.exact, resume.because = False, changed
    return resume, identity


# --- signals ------------------------------------------------------------------------------------


class _Signals:
    """SIGINT and SIGTERM: while training, the first one stops after the step, the second at once;
    otherwise the first one stops at once."""

    def __init__(self, say: Any) -> None:
        self._say = say
        self.conductor: _Conductor | None = None

    def _handle(self, number: int, frame: Any) -> None:
        conductor = self.conductor
        if conductor is None or conductor.stop_signal is not None:
            raise Interrupted("stopped", number)
        conductor.stop_signal = number
        self._say("stopping after this step (once more: at once)")

    @contextmanager
    def handled(self) -> Iterator[_Signals]:
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread, which is not ours to interrupt then
                break
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def between_steps(self, conductor: _Conductor) -> Iterator[None]:
        self.conductor = conductor
        try:
            yield
        finally:
            self.conductor = None


# --- the run ------------------------------------------------------------------------------------


def finetune(config: FinetuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Runs a finetune, or goes on with it where its folder holds one that was interrupted.

    Returns:
        The figures, as ``figures.json`` in the output folder has them.

    Raises:
        BadInput: something given cannot be used; nothing has been done.
        Interrupted: a signal came; the message says how to go on.
        RunError: training could not go on; the message says what is kept.
    """
    console = console or Console()
    store = CheckpointStore(Path(config.output_dir).expanduser())
    transformers.utils.logging.disable_progress_bar()
    with _Signals(console.print).handled() as signals, store.lock():
        try:
            return _Run(config, console, store, signals).go()
        except BadInput:
            store.forget()
            raise


class _Run:
    """One call of :func:`finetune`, stage by stage."""

    def __init__(
        self, config: FinetuneConfig, console: Console, store: CheckpointStore, signals: _Signals
    ) -> None:
        self.config, self.console, self.store, self.signals = config, console, store, signals
        self.folder = store.folder
        self.args = config.training_args()
        self.lora = config.lora_config()
        self.say = console.print
        self.mmlu: Any = None  # the callback, with do_mmlu_eval

    def note(self, text: str) -> None:
        self.say(f"[dim]note:[/] {escape(text)}")

    def go(self) -> dict[str, Any]:
        for notice in self.config.notices:
            self.note(notice)
        self._look_at_model()
        resume, before = _open_folder(self.config, self.store, self.say)
        figures = self._figures_there()
        back = isinstance(_wants_resume(self.config.resume_from_checkpoint), Path)
        if before and figures.get("finished") and resume.exact and not back:
            done = figures["steps"]
            self.say(
                f"{self.folder} holds this run, finished after step {done}; overwrite begins "
                "it anew"
            )
            return figures
        self._prepare_data()
        identity = self._identify(resume, before)
        plan = self._plan_memory()
        figures = self._figures_kept(figures, resume, before, identity)
        if before is not None:  # first, so that no run that is killed now looks finished
            self._write_unfinished(figures)
        if not (self.folder / "identity.json").exists() or not resume.exact:
            replace_file(self.folder / "identity.json", lambda p: write_json(p, identity))
        yaml = self.config.to_yaml()
        replace_file(self.folder / "config.yaml", lambda p: p.write_text(yaml, "utf-8"))

        trainer = self._make_trainer(identity)
        if resume.path is not None:
            self._report_resume(resume)
            resume_step = int(resume.path.name.rpartition("-")[2])
            if resume.path.parent.resolve() == self.folder.resolve():
                for step in [s for s in self.store.steps() if s > resume_step]:
                    aside = self.store.put_aside(step, "superseded")
                    self.note(f"{self.store.path(step).name} is of a later step: now {aside.name}")
            history = read_json(resume.path / "history.json")
        else:
            history = []
        self._begin_log(trainer, history)

        if self.mmlu is not None:
            if before is not None:
                self.mmlu.take_up(0 if resume.path is None else resume_step)
            trainer.add_callback(self.mmlu)
        figures = self._evaluate_before(trainer, figures)
        if self.mmlu is not None and resume.path is None:
            self.mmlu.measure(trainer.model, 0)
        self._train(trainer, resume)
        return self._finish(trainer, figures, plan)

    def _figures_kept(
        self,
        figures: Mapping[str, Any],
        resume: _Resume,
        before: Mapping[str, Any] | None,
        identity: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Of the figures that are there, what the rest of this run will not measure again."""
        kept: dict[str, Any] = {}
        if before is None:
            return kept
        if "eval_loss_before" in figures and before["data"] == identity["data"]:
            kept["eval_loss_before"] = figures["eval_loss_before"]
        kept["resumes"] = list(figures.get("resumes", []))
        if resume.path is not None:
            step = int(resume.path.name.rpartition("-")[2])
            because = {"because": resume.because} if resume.because else {}
            kept["resumes"].append({"step": step, "exact": resume.exact} | because)
        return kept

    def _write_unfinished(self, figures: Mapping[str, Any]) -> None:
        unfinished = {"finished": False, **figures}
        replace_file(self.folder / "figures.json", lambda p: write_json(p, unfinished))

    def _figures_there(self) -> dict[str, Any]:
        file = self.folder / "figures.json"
        return read_json(file) if file.is_file() else {}

    # -- before --

    def _look_at_model(self) -> None:
        """Model files, configuration and tokenizer, as far as they can be judged unloaded."""
        from transformers import AutoConfig

        from ..integrations.checkpoint_files import check_weight_files
        from ..integrations.transformers import _local_folder, default_dtype

        config = self.config
        with bad_input("model"):
            self.model_folder = _local_folder(
                config.model_name_or_path, config.model_revision, None
            )
            check_weight_files(self.model_folder)
            self.model_config = AutoConfig.from_pretrained(
                self.model_folder, trust_remote_code=config.trust_remote_code
            )
        self.dtype = default_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
        if self.dtype == torch.float16 and not self.args.fp16 and self.args.device.type == "cuda":
            # Gradients underflow in fp16 without a scaler.
            self.args.fp16 = True
            self.note("float16 is trained with autocast and a gradient scaler (fp16: true)")
        if config.trust_remote_code:
            self.note("trust_remote_code: code that came with the model will run")
        self.tokenizer = load_tokenizer(self.model_folder, config.trust_remote_code)
        context = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        if context is not None and (config.max_length or 0) > context:
            if "max_length" in config.given:
                raise BadInput(
                    f"max_length is {config.max_length}, but the model takes {context} tokens at "
                    "most"
                )
            config.values["max_length"] = context

    def _prepare_data(self) -> None:
        config, text = self.config, self.model_config.get_text_config()
        options = config.data_options(getattr(text, "max_position_embeddings", None))
        with bad_input("data"):
            self.data = prepare(options, self.tokenizer)
        for line in self.data.report.lines():
            self.say(escape(line))
        if not len(self.data.train):
            raise BadInput("data: no sample is left to train on")
        if self.data.chat_template is not None:
            self.tokenizer.chat_template = self.data.chat_template  # goes with the adapter
        words, highest = text.vocab_size, int(self.data.train.arrays[0].max())
        if highest >= words:
            raise BadInput(
                f"the tokenizer made token {highest}, but the model has {words} words: the "
                "tokenizer belongs to another model"
            )
        if config.eval_strategy != "no" and not len(self.data.eval):
            raise BadInput("eval_strategy needs held-out samples, and there are none")
        if config.do_mmlu_eval:
            self._prepare_mmlu()
        self.say("\n[bold]one sample[/] (what is trained is in colour)")
        self.say(preview(self.data.train[0], self.tokenizer))
        self.say()

    def _prepare_mmlu(self) -> None:
        from ..evaluate.mmlu_callback import MmluCallback
        from ..evaluate.mmlu_data import read_mmlu

        config = self.config
        data = read_mmlu(
            config.mmlu_dataset,
            config.mmlu_split,
            config.mmlu_shots,
            limit=config.max_mmlu_samples,
        )
        self.say(
            f"MMLU: {len(data):,} questions of {len(data.subjects)} subjects, split {data.split}, "
            f"{data.shots}-shot"
        )
        self.mmlu = MmluCallback(
            data,
            self.tokenizer,
            self.folder / "mmlu.json",
            self.args.per_device_eval_batch_size,
            config.mmlu_source_max_len,
            self.say,
        )

    def _identify(self, resume: _Resume, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """This run's identity; compares it with that of before."""
        identity = {
            "settings": self.config.decisive,
            "model": fingerprint_model(self.model_folder),
            "data": self.data.fingerprint,
            "machine": describe_machine(self.args.device),
        }
        if before is None:
            return json.loads(json.dumps(identity))
        asked = bool(_wants_resume(self.config.resume_from_checkpoint))
        for part, what in (("model", "the base model"), ("data", "the data")):
            if before[part] == identity[part]:
                continue
            if part == "model" or not asked:
                advice = (
                    ""
                    if part == "model"
                    else "; or resume_from_checkpoint true to go on with them, which is not exact"
                )
                raise BadInput(
                    f"{what} of the run in {self.folder} were others: give another output_dir, or "
                    f"overwrite{advice}"
                )
            resume.exact = False
            resume.because.append(f"{what} are others")
        machine = _differences(before["machine"], identity["machine"])
        if machine:
            resume.exact = False
            resume.because += machine
        return json.loads(json.dumps(identity))

    def _plan_memory(self) -> MemoryPlan:
        config, args = self.config, self.args
        quant = None
        if config.quant_type != "none":
            names = ("quant_type", "blocksize", "double_quant", "skip_modules")
            quant = {name: getattr(config, name) for name in names}
        optimizer = QLoraTrainer.get_optimizer_cls_and_kwargs(args, None)
        if config.max_memory_mb is not None:
            limit: tuple[int | None, str] = (config.max_memory_mb * 10**6, "max_memory_mb")
        else:
            limit = available_memory(args.device)
        settings = {
            "dtype": self.dtype,
            "quant": quant,
            "lora": self.lora,
            "checkpointing": bool(args.activation_checkpointing),
            "accumulation": args.gradient_accumulation_steps,
            "optimizer": optimizer,
            "attention": config.attn_implementation,
            "fused": config.fuse_layers,
            "program": 0 if args.device.type == "cuda" else resident_memory(),
            "limit": limit,
        }
        shape = StepShape(
            min(args.train_batch_size, len(self.data.train)),
            int(max(self.data.train.lengths)),
            self.data.train.packed,
        )
        plan = plan_memory(self.model_config, shape, **settings)
        self.say(plan_table(plan))
        for line in plan.notes:
            self.note(line)
        if plan.excess:
            message = (
                f"the plan needs {megabytes(plan.peak)}, {megabytes(plan.excess)} more than there "
                f"is ({megabytes(plan.limit or 0)}, {plan.limit_from})"
            )
            if not config.force:
                advice = _what_to_lower(self.model_config, shape, settings)
                raise BadInput(f"{message}. Lower: {advice}. --force goes on all the same.")
            self.say(f"[yellow]{message}; going on, as force says[/]")
        self._check_disk(plan)
        return plan

    def _check_disk(self, plan: MemoryPlan) -> None:
        if self.args.save_strategy == SaveStrategy.NO:
            return
        size = plan.parts["trained parameters"] + plan.parts["optimizer states"]
        # One more than is kept: the old one goes when the new one is there. And the result.
        need = size * ((self.args.save_total_limit or 1) + 1) + plan.parts["trained parameters"]
        free = shutil.disk_usage(self.folder).free
        if need > free and not self.config.force:
            raise BadInput(
                f"checkpoints need {megabytes(need)} in {self.folder}, and {megabytes(free)} are "
                "free: make room, or lower save_total_limit or r"
            )

    # -- model and trainer --

    def _make_trainer(self, identity: Mapping[str, Any]) -> QLoraTrainer:
        from peft import get_peft_model

        from ..loss import install

        config = self.config
        model = self._load_model()
        if config.packing and not packing_is_exact(model):
            raise BadInput(
                f"packing: {type(model).__name__} lets packed samples see each other with "
                f"{config.attn_implementation} attention; train without packing"
            )
        model.requires_grad_(False)
        name = Path(config.model_name_or_path).expanduser()
        model.name_or_path = str(name.resolve()) if name.is_dir() else config.model_name_or_path
        _seed_everything(self.args.seed)
        with bad_input("LoRA"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            model = get_peft_model(model, self.lora)
        self.loss = install(model, chunk_tokens=config.loss_chunk or None)
        if config.fuse_layers:
            fuse(model)
        gc.collect()
        return QLoraTrainer(
            model,
            self.args,
            self.data,
            self.tokenizer,
            store=self.store if self.args.save_strategy != SaveStrategy.NO else None,
            identity=identity,
        )

    def _load_model(self) -> Any:
        config = self.config
        common = {
            "dtype": self.dtype,
            "attn_implementation": config.attn_implementation,
            "trust_remote_code": config.trust_remote_code,
        }
        if self.args.device.type == "cpu":
            common["device_map"] = {"": "cpu"}
        with bad_input("model"):
            if config.quant_type == "none":
                from transformers import AutoModelForCausalLM

                return AutoModelForCausalLM.from_pretrained(self.model_folder, **common)
            from ..integrations.transformers import load_quantized_model

            # A checkpoint that is quantized already keeps its format unless another is asked for.
            names = ("quant_type", "blocksize", "double_quant")
            given = {n: getattr(config, n) for n in names if n in config.given}
            return load_quantized_model(
                self.model_folder,
                compute_dtype=config.compute_dtype,
                skip_modules=config.skip_modules,
                **given,
                **common,
            )

    # -- training --

    def _report_resume(self, resume: _Resume) -> None:
        assert resume.path is not None
        if resume.exact:
            self.say(f"going on from {escape(str(resume.path))}")
            return
        self.say(
            f"[yellow]going on from {escape(str(resume.path))}; not exact, because of[/] "
            + escape("; ".join(resume.because))
        )

    def _begin_log(self, trainer: QLoraTrainer, history: list[dict[str, Any]]) -> None:
        path = self.folder / "log.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in history)
        replace_file(path, lambda p: p.write_text(text, "utf-8"))
        trainer.log_file = path

    def _evaluate_before(self, trainer: QLoraTrainer, figures: dict[str, Any]) -> dict[str, Any]:
        if len(self.data.eval) and "eval_loss_before" not in figures:
            loss = trainer.evaluate()["eval_loss"]
            figures = {**figures, "eval_loss_before": loss}
            self._write_unfinished(figures)
        if "eval_loss_before" in figures:
            self.say(f"held-out loss before: {figures['eval_loss_before']:.4f}")
        return figures

    def _train(self, trainer: QLoraTrainer, resume: _Resume) -> None:
        progress = None
        if not self.args.disable_tqdm:
            progress = ProgressReport(self.console, lambda: trainer.history)
            trainer.add_callback(progress)
        path = None if resume.path is None else str(resume.path)
        conductor = trainer.conductor
        try:
            with self.signals.between_steps(conductor):
                trainer.train(resume_from_checkpoint=path)
        except NonFiniteLoss as error:
            raise RunError(self._keep_last_good(trainer, str(error))) from error
        except Interrupted as error:
            raise Interrupted(f"stopped at once; {self._how_to_go_on()}", error.signal) from error
        except RunError as error:
            raise RunError(f"{error}; {self._how_to_go_on()}") from error
        finally:
            if progress is not None:
                progress.close()
        if conductor.stop_signal is not None:
            step = trainer.state.global_step
            raise Interrupted(
                f"stopped after step {step}; {self._how_to_go_on()}", conductor.stop_signal
            )

    def _how_to_go_on(self) -> str:
        steps = self.store.steps()
        if not steps:
            return "there is no checkpoint yet: the same command begins anew"
        return f"the same command goes on from {self.store.path(steps[-1])}"

    def _keep_last_good(self, trainer: QLoraTrainer, what: str) -> str:
        step = trainer.state.global_step
        finite = all(bool(torch.isfinite(p).all()) for p in trainer._trained)
        if trainer.store is not None and finite and step and not self.store.path(step).exists():
            try:
                # Not rotated: the state before may be what is wanted.
                self.store.write(step, trainer._fill_checkpoint)
            except RunError as error:
                what = f"{what} ({error})"
        steps = self.store.steps()
        kept = (
            f"the last good state is {self.store.path(steps[-1])}"
            if steps
            else ("no step had been taken that could be kept")
        )
        return (
            f"{what}: stopped, and no step was taken with it; {kept}. Lower learning_rate or "
            "max_grad_norm, look at the data of that step, or compute in float32 (dtype)"
        )

    # -- after --

    def _finish(
        self, trainer: QLoraTrainer, figures: dict[str, Any], plan: MemoryPlan
    ) -> dict[str, Any]:
        history = trainer.history
        evaluations = [
            {"step": entry["step"], "loss": entry["eval_loss"]}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ]
        if "eval_loss_before" in figures:
            evaluations.insert(0, {"step": 0, "loss": figures["eval_loss_before"]})
        if len(self.data.eval):
            loss = trainer.evaluate()["eval_loss"]
            figures["eval_loss_after"] = loss
            if not evaluations or evaluations[-1]["step"] != trainer.state.global_step:
                evaluations.append({"step": trainer.state.global_step, "loss": loss})
        if self.mmlu is not None:
            if not self.args.load_best_model_at_end:  # else the best step has been asked already
                self.mmlu.measure(trainer.model, trainer.state.global_step)
            figures["mmlu"] = self.mmlu.result()
        measured = peak_memory(self.args.device)
        quantized = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
        weights = sum(m.in_features * m.out_features for m in quantized)
        figures = {
            "finished": True,
            "model": self.config.model_name_or_path,
            "data": self.config.dataset_name,
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "train_loss": _mean_of_last(history),
            **figures,
            "tokens": sum(h["tokens"] for h in history),
            "trained_tokens": sum(h["trained"] for h in history),
            "seconds": sum(h["seconds"] for h in history),
            "tokens_per_second": throughput(history),
            "bits_per_weight": (
                sum(m.bits_per_weight * m.in_features * m.out_features for m in quantized) / weights
                if weights
                else None
            ),
            "trained_parameters": sum(p.numel() for p in trainer._trained),
            "fused_losses": self.loss.calls,
            "memory": {
                "predicted_peak": plan.peak,
                "predicted_parts": plan.parts,
                "measured_peak": measured,
            },
            "machine": trainer.identity["machine"],
            "evaluations": evaluations,
            "history": history,
        }
        self._save_result(trainer)
        replace_file(self.folder / "curves.png", lambda p: draw_curves(p, history, evaluations))
        # Last: it says that all the rest is there.
        replace_file(self.folder / "figures.json", lambda p: write_json(p, figures))
        self._summarise(figures)
        return figures

    def _save_result(self, trainer: QLoraTrainer) -> None:
        """The adapter into the run's folder, each file whole or as it was."""
        aside = self.folder / f".writing-{os.getpid()}-adapter"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            with _writing_result(self.folder):
                trainer._save(str(aside))
            for file in sorted(aside.iterdir()):
                replace_file(self.folder / file.name, lambda p, f=file: shutil.copyfile(f, p))
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _summarise(self, figures: Mapping[str, Any]) -> None:
        memory = figures["memory"]
        lines = [
            f"{figures['steps']} steps, {figures['tokens']:,} tokens in {clock(figures['seconds'])}"
        ]
        if figures["tokens_per_second"]:
            lines[0] += f" ({figures['tokens_per_second']:,.0f} tokens/s)"
        if "eval_loss_after" in figures:
            lines.append(
                f"held-out loss {figures['eval_loss_before']:.4f} before, "
                f"{figures['eval_loss_after']:.4f} after"
            )
        lines.append(
            f"peak memory {megabytes(memory['measured_peak'])} measured, "
            f"{megabytes(memory['predicted_peak'])} predicted"
        )
        lines.append(f"adapter, curves.png and figures.json are in {self.folder}")
        for line in lines:
            self.say(escape(line))


def _mean_of_last(history: list[dict[str, Any]]) -> float | None:
    last = history[-max(1, len(history) // 10) :]
    return statistics.fmean(h["loss"] for h in last) if last else None


@contextmanager
def _writing_result(folder: Path) -> Iterator[None]:
    from .checkpoint import _writing

    with _writing(folder / "adapter_model.safetensors"):
        yield


def _what_to_lower(config: Any, shape: StepShape, settings: Mapping[str, Any]) -> str:
    """Changes that save memory, each with the peak that it would give."""
    tries: list[tuple[str, StepShape, dict[str, Any]]] = []
    if not settings["checkpointing"]:
        tries.append(("activation_checkpointing true", shape, {"checkpointing": True}))
    if shape.batch > 1:
        small = StepShape(1, shape.length, shape.packed)
        tries.append(
            (
                "per_device_train_batch_size 1 (and more gradient_accumulation_steps)",
                small,
                {"accumulation": max(2, settings["accumulation"])},
            )
        )
    if shape.length > 64:
        half = shape.length // 2
        tries.append((f"max_length {half}", StepShape(shape.batch, half, shape.packed), {}))
    if settings["dtype"] == torch.float32:
        tries.append(("dtype bfloat16", shape, {"dtype": torch.bfloat16}))
    if settings["quant"] is None:
        tries.append(("quant_type nf4", shape, {"quant": {}}))
    told = []
    for what, changed, other in tries:
        plan = plan_memory(config, changed, **{**settings, **other})
        told.append(f"{what} ({megabytes(plan.peak)}{'' if plan.excess else ', fits'})")
    return "; ".join(told) or "a smaller model"
