"""``qlora chat``: a model, quantized as it loads, and an adapter, in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .finetune.errors import BadInput, RunError, bad_input

__all__ = ["Conversation", "add_arguments", "load", "run"]

_COMMANDS = """\
/reset           forget what was said
/system TEXT     set the system message (and forget); /system alone takes it away
/adapter on|off  answer with or without the adapter
/retry           answer the last question again
/help            this
/exit            leave (so does Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``qlora chat``."""
    add = parser.add_argument
    add("--model", help="folder or hub id of the base model (that of the adapter if left out)")
    add("--adapter", help="folder of a PEFT adapter, as `qlora finetune` leaves it")
    add("--prompt", help="answer this one message and stop")
    add("--system", help="a system message")
    add("--quant_type", default="nf4", help="4-bit format, or none for 16 bits [%(default)s]")
    add("--dtype", default="auto", help="of what is not quantized [%(default)s]")
    add("--max_new_tokens", type=int, default=256, help="longest reply [%(default)s]")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest word [%(default)s]")
    add("--top_p", type=float, default=0.95, help="with a temperature [%(default)s]")
    add("--seed", type=int, default=0, help="of the draws, with a temperature [%(default)s]")


def load(
    model: str | None,
    adapter: str | None = None,
    quant_type: str = "nf4",
    dtype: str = "auto",
) -> tuple[Any, Any]:
    """A model ready to generate, and its tokenizer.

    Args:
        model: folder or hub id; the one that the adapter was trained on if None.
        adapter: folder of a PEFT adapter.
        quant_type: as in ``load_quantized_model``; "none" leaves the model dense.

    Raises:
        BadInput: files that are missing or do not fit each other; the message says which.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    from .finetune.model import load_tokenizer
    from .integrations.checkpoint_files import check_weight_files
    from .integrations.transformers import (
        _dtype,
        _local_folder,
        default_dtype,
        load_quantized_model,
    )

    transformers.utils.logging.disable_progress_bar()
    folder = None
    if adapter is not None:
        folder = Path(adapter).expanduser()
        model = _base_of(folder, model)
    if model is None:
        raise BadInput("give --model, --adapter, or both")
    with bad_input("model"):
        base = _local_folder(model, None, None)
        if quant_type == "none":
            check_weight_files(base)
            dense = default_dtype() if dtype == "auto" else _dtype(dtype, "dtype")
            loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dense)
        else:
            # Left at its default, a checkpoint that is quantized already keeps its format.
            asked = None if quant_type == "nf4" else quant_type
            loaded = load_quantized_model(base, dtype=dtype, quant_type=asked)
    # A finetune keeps its chat template with the adapter.
    tokens = folder if folder is not None and (folder / "tokenizer_config.json").is_file() else base
    tokenizer = load_tokenizer(tokens)
    if folder is not None:
        from .integrations.adapters import load_adapter

        with bad_input(f"the adapter {folder}"):
            try:
                loaded = load_adapter(loaded, folder)
            except RuntimeError as error:  # of a type that is not LoRA, in other shapes
                raise ValueError(str(error).splitlines()[0]) from error
    return loaded.eval(), tokenizer


def _base_of(folder: Path, model: str | None) -> str | None:
    """The base model of an adapter: ``model`` if given, else what its configuration names."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        found = sorted(p.parent.name for p in folder.glob("checkpoint-*/adapter_config.json"))
        hint = f"; there is {', '.join(found)} in it" if found else ""
        raise BadInput(f"{folder} holds no adapter_config.json: not a PEFT adapter{hint}")
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadInput(f"{folder} holds no adapter_model.safetensors")
    try:
        base = json.loads(file.read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise BadInput(f"{file} cannot be read: {error!r}") from error
    return model or base


class Conversation:
    """What was said, and the next reply as it comes.

    Args:
        model, tokenizer: as :func:`load` gives them.
        system: a system message.
        max_new_tokens, temperature, top_p: of each reply; temperature 0 takes the likeliest word.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 0.95,
    ) -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        self.messages: list[dict[str, str]] = []
        self.adapter_on = True

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages = []

    def _prompt(self) -> tuple[Any, int]:
        """Token ids of the conversation so far ``[1, n]``, and how many old turns were left out so
        that the reply fits the model's context."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if context is None else max(1, context - self.max_new_tokens)
        dropped = 0
        while True:
            messages = self.messages[dropped:]
            if self.system:
                messages = [{"role": "system", "content": self.system}, *messages]
            if self.tokenizer.chat_template:
                ids = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )["input_ids"]
            else:  # a base model goes on with a text
                text = "\n".join(m["content"] for m in messages)
                ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
            # A question and its reply go together.
            if room is None or ids.shape[1] <= room or dropped + 2 >= len(self.messages) + 1:
                return ids, dropped
            dropped += 2

    def reply(self, message: str) -> Iterator[str]:
        """The reply to ``message``, piece by piece; both are remembered once it is complete, or as
        far as it came when the iteration is left early.

        Raises:
            RunError: generation failed.
        """
        import torch
        from transformers import TextIteratorStreamer

        self.messages.append({"role": "user", "content": message})
        ids, _ = self._prompt()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        failure: list[BaseException] = []

        def stopped(ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((ids.shape[0],), stop.is_set(), device=ids.device)

        settings: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            settings |= {"temperature": self.temperature, "top_p": self.top_p}
        else:  # else transformers warns of the model's own, which greedy search does not use
            settings |= {"temperature": None, "top_p": None, "top_k": None}
        ends = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id

        def work() -> None:
            try:
                with self._adapter(), torch.inference_mode():
                    self.model.generate(
                        ids.to(self.model.device),
                        attention_mask=torch.ones_like(ids).to(self.model.device),
                        max_new_tokens=self.max_new_tokens,
                        streamer=streamer,
                        stopping_criteria=[stopped],
                        eos_token_id=_ends(self.model, ends),
                        pad_token_id=ends if pad is None else pad,
                        use_cache=True,
                        **settings,
                    )
            except BaseException as error:  # to be raised where somebody sees it
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        said = []
        try:
            for piece in streamer:
                said.append(piece)
                yield piece
        finally:
            stop.set()
            thread.join()
            self.messages.append({"role": "assistant", "content": "".join(said)})
        if failure:
            raise RunError(f"generation failed: {failure[0]}") from failure[0]

    def _adapter(self) -> contextlib.AbstractContextManager[Any]:
        if self.adapter_on or not hasattr(self.model, "disable_adapter"):
            return contextlib.nullcontext()
        return self.model.disable_adapter()


def _ends(model: Any, eos: int | None) -> list[int] | None:
    """Every token that ends a reply: the tokenizer's and those of the model's own settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {eos, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends) or None


def run(arguments: argparse.Namespace) -> int:
    """Runs ``qlora chat``; returns the exit code."""
    import torch
    from rich.console import Console

    if arguments.max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {arguments.max_new_tokens}; it must be above 0")
    if arguments.temperature < 0:
        raise BadInput(f"temperature is {arguments.temperature}; it must not be negative")
    if not 0 < arguments.top_p <= 1:
        raise BadInput(f"top_p is {arguments.top_p}; it must be above 0 and at most 1")
    console = Console(highlight=False)
    model, tokenizer = load(
        arguments.model, arguments.adapter, arguments.quant_type, arguments.dtype
    )
    torch.manual_seed(arguments.seed)
    conversation = Conversation(
        model,
        tokenizer,
        arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )
    if arguments.prompt is not None:
        _speak(conversation, arguments.prompt, console)
        return 0
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited and called back
        console.print("[dim]/help lists what else can be typed; Ctrl-C stops a reply[/]")
    return _talk(conversation, console, _lines(console))


def _lines(console: Any) -> Iterator[str]:
    """What is typed, line by line; from a pipe without a prompt."""
    while True:
        try:
            yield console.input("[bold cyan]> [/]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()


def _talk(conversation: Conversation, console: Any, lines: Iterator[str]) -> int:
    last = None
    commands: dict[str, Callable[[str], None]] = {
        "/reset": lambda rest: conversation.reset(),
        "/help": lambda rest: console.print(_COMMANDS, markup=False),
        "/system": lambda rest: _set_system(conversation, rest),
        "/adapter": lambda rest: _switch(conversation, rest, console),
    }
    for line in lines:
        text = line.strip()
        if not text:
            continue
        word, _, rest = text.partition(" ")
        if word in ("/exit", "/quit"):
            break
        if word == "/retry":
            if last is None:
                console.print("nothing has been asked yet")
                continue
            conversation.messages = conversation.messages[:-2]
            text = last
        elif word in commands:
            commands[word](rest.strip())
            continue
        elif word.startswith("/"):
            console.print(f"there is no command {word}; /help lists them", markup=False)
            continue
        last = text
        _speak(conversation, text, console)
    return 0


def _set_system(conversation: Conversation, text: str) -> None:
    conversation.system = text or None
    conversation.reset()


def _switch(conversation: Conversation, word: str, console: Any) -> None:
    if word in ("on", "off"):
        conversation.adapter_on = word == "on"
    console.print(f"adapter {'on' if conversation.adapter_on else 'off'}")


def _speak(conversation: Conversation, message: str, console: Any) -> None:
    reply = conversation.reply(message)
    try:
        for piece in reply:
            console.print(piece, end="", markup=False, soft_wrap=True)
            console.file.flush()
    except KeyboardInterrupt:
        reply.close()  # type: ignore[attr-defined]
        console.print(" [dim](stopped)[/]", end="")
    console.print()


def answers(model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """The likeliest reply to each question, each in a conversation of its own."""
    talk = Conversation(model, tokenizer, max_new_tokens=max_new_tokens)
    replies = []
    for question in questions:
        talk.reset()
        replies.append("".join(talk.reply(question)).strip())
    return replies
