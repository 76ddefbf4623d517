"""What a finetune is told: names, defaults, translations and checks.

There is one flat space of names, for YAML files and command lines alike, in four sections:

- ``run``: this command's own (:class:`Options`); where TRL's ``ModelConfig`` and
  ``ScriptArguments`` have a name for the same thing, it is that one;
- ``training``: transformers' ``TrainingArguments``; ``sft``: what TRL's ``SFTConfig`` adds to it;
- ``lora``: PEFT's ``LoraConfig``.

The last three are read off the installed dataclasses, so that names, types and defaults are those
of the versions at hand. Names that moved, and those of the original QLoRA script, are translated
and the translation is told (:data:`TRANSLATED`). What cannot be honoured is refused with the
reason (:data:`REFUSED`), and an unknown name is an error with the nearest known one: nothing that
the user says is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .errors import BadInput, bad_input
from .names import (
    CALLED,
    DEFAULTS,
    FREE,
    HARMLESS,
    LOOKS_AT_EVALUATIONS,
    REFUSED,
    TRANSLATED,
    Options,
    to_bool,
)

__all__ = [
    "FinetuneConfig",
    "Key",
    "Options",
    "known_keys",
    "parse_arguments",
    "read_yaml",
    "resolve",
]


# --- the names that there are -------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A name that may be given: its section, type, default and help."""

    name: str
    section: str  # "run", "training", "sft" or "lora"
    hint: Any
    default: Any
    help: str


def _fields(cls: Any, section: str, skip: Iterable[str] = ()) -> dict[str, Key]:
    hints = typing.get_type_hints(cls)
    keys = {}
    for f in dataclasses.fields(cls):
        if f.name in skip or not f.init:
            continue
        default = f.default
        if default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        help = str(f.metadata.get("help", "")).replace("%%", "%")
        keys[f.name] = Key(f.name, section, hints.get(f.name, Any), _plain(default), help)
    return keys


@cache
def known_keys() -> dict[str, Key]:
    """Every name that may be given, in the order of the sections.

    A name of two sections belongs to the first of run, lora, training, sft. Translated names are
    not among them (:data:`TRANSLATED`); refused ones are (:data:`REFUSED`).
    """
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import SFTConfig

    keys = _fields(Options, "run")
    keys |= _fields(LoraConfig, "lora", keys)
    keys |= _fields(TrainingArguments, "training", keys)
    keys |= _fields(SFTConfig, "sft", keys)
    for name in TRANSLATED:  # still in a dataclass, but better known by another name
        keys.pop(name, None)
    for name, value in DEFAULTS.items():
        keys[name] = dataclasses.replace(keys[name], default=value)
    return keys


def _plain(value: Any) -> Any:
    """``value`` as YAML and JSON have it."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(v) for v in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    return value


# --- values -------------------------------------------------------------------------------------


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        value = [v.strip() for v in value.split(",")]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is not a list")
    return list(value)


def _dict(value: Any) -> dict[str, Any]:
    if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        value = ",".join(value)
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("{"):
            value = yaml.safe_load(text)
        else:  # a=b,c=d
            pairs = [pair.partition("=") for pair in text.split(",")]
            if not all(sign and key.strip() for key, sign, _ in pairs):
                raise ValueError(f"{value!r} is not JSON in braces, nor name=value,...")
            value = {key.strip(): yaml.safe_load(v) for key, _, v in pairs}
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a mapping")
    return dict(value)


def _one_of(hint: Any, value: Any) -> Any:
    """``value`` as the one type ``hint`` has it. Raises ValueError where it is not one."""
    origin = typing.get_origin(hint)
    if hint is types.NoneType:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        raise ValueError("not none")
    if hint is Any:
        return value
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        # PEFT's Literal of initialisations holds one with a number to fill in.
        patterns = [re.sub(r"\\\[.*?\\\]", r"\\d+", re.escape(str(c))) for c in choices]
        if any(re.fullmatch(p, str(value)) for p in patterns):
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, choices))}")
    if hint is bool:
        return to_bool(value)
    if hint is int:
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a whole number")
        number = float(value) if not isinstance(value, int) else value
        if number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return int(number)
    if hint is float:
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a number")
        return float(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(_text(value)).value
    if hint is str:
        return _text(value)
    if origin is list or hint is list:
        (item,) = typing.get_args(hint) or (Any,)
        return [_coerce(item, v) for v in _list(value)]
    if origin is tuple:
        return tuple(_list(value))
    if origin is dict or hint is dict:
        return _dict(value)
    if dataclasses.is_dataclass(hint):
        return hint(**_dict(value))
    raise ValueError(f"a value of {hint} cannot be given here")


def _text(value: Any) -> str:
    if isinstance(value, bool):  # YAML reads a bare no as false
        return "yes" if value else "no"
    if isinstance(value, (Mapping, list, tuple)):
        raise ValueError(f"{value!r} is not one text")
    if value is None:
        raise ValueError("nothing is given")
    return str(value)


# Of the types of a union, those that accept less come first; str accepts everything.
_ORDER = (types.NoneType, bool, int, float)


def _coerce(hint: Any, value: Any) -> Any:
    """``value`` (of YAML or a command line) as ``hint`` has it.

    Raises:
        ValueError: it is none of the types of ``hint``.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = list(typing.get_args(hint))
    else:
        choices = [hint]
    if value is None and types.NoneType not in choices:
        raise ValueError("nothing is given")

    def rank(choice: Any) -> tuple[int, int]:
        exact = isinstance(choice, type) and type(value) is choice
        simple = _ORDER.index(choice) if choice in _ORDER else len(_ORDER)
        enumeration = isinstance(choice, type) and issubclass(choice, enum.Enum)
        return (0 if exact and choice is not str else 1), (
            simple if choice is not str else 2 * len(_ORDER) + (1 if enumeration else 0)
        )

    errors = []
    enums = [c for c in choices if isinstance(c, type) and issubclass(c, enum.Enum)]
    if enums:  # "OptimizerNames | str": the plain str is there for its subclass only
        choices = [c for c in choices if c is not str]
    if isinstance(value, str) and str in choices:
        # A word stays one where that is offered; JSON in braces says that it is more.
        words = (types.NoneType, bool, int, float, str)
        choices = [c for c in choices if c in words or value.lstrip().startswith("{")]
    for choice in sorted(choices, key=rank):
        try:
            return _one_of(choice, value)
        except (ValueError, TypeError, yaml.YAMLError) as error:
            errors.append(str(error))
    raise ValueError(errors[-1])


# --- reading ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which a name given twice is an error, not the second one in silence."""


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise BadInput(f"{key!r} is given twice, in line {seen[key]} and in line {line}")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        BadInput: no such file, not UTF-8, not YAML (with its line), not a mapping, a name twice.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no configuration file {path}")
    try:
        settings = yaml.load(path.read_text("utf-8"), _Loader)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(k, str) for k in settings):
        raise BadInput(
            f"{path} must hold `name: value` lines, it holds a {type(settings).__name__}"
        )
    return settings


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """``--name value``, ``--name=value``, ``--name a b`` (a list), ``--name`` (true) and
    ``--no_name`` (false) as settings; dashes in names may stand for underscores.

    Raises:
        BadInput: a value without a name, or a name given twice.
    """
    settings: dict[str, Any] = {}
    name = None
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument):
            flag, sign, value = argument.lstrip("-").partition("=")
            name = flag.replace("-", "_")
            if name in settings:
                raise BadInput(f"--{name} is given twice")
            settings[name] = [value] if sign else []
        elif name is None:
            raise BadInput(f"{argument!r} stands alone; options are given as --name value")
        else:
            settings[name].append(argument)
    for name, values in list(settings.items()):
        if len(values) == 1:
            settings[name] = values[0]
        elif not values:
            del settings[name]
            off = name.startswith("no_") and not _is_known(name)
            settings[name[3:] if off else name] = not off
    return settings


def _is_known(name: str) -> bool:
    return name in TRANSLATED or name in known_keys()


def _unknown(name: str) -> BadInput:
    known = [n for n in known_keys() if n not in REFUSED]
    near = CALLED.get(name) or next(
        iter(
            difflib.get_close_matches(name, known, n=1)
            or difflib.get_close_matches(name, [*TRANSLATED, *REFUSED], n=1)
        ),
        None,
    )
    hint = f"; the nearest name is {near}" if near else ""
    return BadInput(f"there is no option {name}{hint} (`qlora finetune --help-all` lists them all)")


def _translate(given: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    """``given`` in known names. Raises BadInput for unknown ones, and for contradictions."""
    settings: dict[str, Any] = {}
    came_from: dict[str, str] = {}

    def put(name: str, value: Any, said: str) -> None:
        if name in settings and settings[name] != value:
            raise BadInput(
                f"{came_from[name]} and {said} say different things: {name} would be "
                f"{settings[name]!r} and {value!r}"
            )
        settings[name], came_from[name] = value, said

    for name, value in given.items():
        translation = TRANSLATED.get(name)
        if translation is None:
            if name not in known_keys():
                raise _unknown(name)
            put(name, value, name)
            continue
        try:
            translated = translation.to(value)
        except BadInput:
            raise
        except (ValueError, TypeError) as error:
            raise BadInput(f"{name}: {error}") from error
        for new, v in translated.items():
            put(new, v, name)
        notices.append(f"{name} {translation.note}")
    return settings


def _join_parts(settings: dict[str, Any], notices: list[str]) -> None:
    """What takes more than one of the given names to translate."""
    source, target = settings.pop("_source_max_len", None), settings.pop("_target_max_len", None)
    if source is not None or target is not None:
        # The script's own defaults stand in for the one that is not given.
        length = (1024 if source is None else source) + (256 if target is None else target)
        if settings.setdefault("max_length", length) != length:
            raise BadInput(
                f"max_length {settings['max_length']} and source_max_len + target_max_len "
                f"({length}) say different things"
            )
    train, test = settings.pop("_train_split", None), settings.pop("_test_split", None)
    name = settings.get("dataset_name")
    hub = isinstance(name, str) and name.count("/") == 1 and not Path(name).exists()
    hub = hub and not re.search(r"\.(jsonl?|parquet)$", name or "")
    for split, key in ((train, "dataset_name"), (test, "eval_dataset")):
        if split is None:
            continue
        if not hub or ":" in str(name):
            raise BadInput(
                f"a split ({split!r}) can be named for a data set of the hub; dataset_name is "
                f"{name!r}"
            )
        if key == "dataset_name" or settings.get(key) is None:
            settings[key] = f"{name}:{split}"


# --- the result ---------------------------------------------------------------------------------


@dataclass
class FinetuneConfig:
    """A checked configuration: every name with its value, and what has to be told about it."""

    values: dict[str, Any]
    """Every known name that is not refused, with its value in plain types."""
    given: frozenset[str]
    """Names that the user set, translated."""
    notices: list[str] = field(default_factory=list)
    recipe: str | None = None
    """What the settings began with, as ``guanaco-7b, scale tiny``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def section(self, *sections: str) -> dict[str, Any]:
        """The values of one or more sections."""
        keys = known_keys()
        return {k: v for k, v in self.values.items() if keys[k].section in sections}

    def training_args(self) -> Any:
        """An ``SFTConfig``, which is a ``TrainingArguments``.

        Raises:
            BadInput: a combination of values that it does not take.
        """
        from trl import SFTConfig

        changed = {
            k: v
            for k, v in self.section("training", "sft").items()
            if v != _untouched_default(k) or k in self.given or k in DEFAULTS
        }
        with bad_input("training options"):
            args = SFTConfig(**changed, remove_unused_columns=False)
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split batches of a packed row
        return args

    def lora_config(self) -> Any:
        """PEFT's ``LoraConfig``.

        Raises:
            BadInput: a combination of values that it does not take.
        """
        from peft import LoraConfig

        values = self.section("lora")
        changed = {
            k: _as_field(k, v)
            for k, v in values.items()
            if v != _untouched_default(k) or k in self.given or k in DEFAULTS
        }
        with bad_input("LoRA options"):
            return LoraConfig(**changed, task_type="CAUSAL_LM")

    def data_options(self, context: int | None = None) -> Any:
        """``DataOptions``; ``context`` is the longest sequence that the model takes.

        Raises:
            BadInput: a value that is not offered.
        """
        from .data import DataOptions

        template = None
        if self.chat_template_path is not None:
            with bad_input("chat_template_path"):
                template = Path(self.chat_template_path).read_text("utf-8")
        length = self.max_length
        if length is None:
            if context is None:
                raise BadInput(
                    "max_length: the model does not say how long a sequence it takes; give a number"
                )
            length = context
        seed = self.seed if self.data_seed is None else self.data_seed
        with bad_input():
            return DataOptions(
                source=self.dataset_name,
                format=self.dataset_format,
                columns=self.dataset_columns,
                eval_source=self.eval_dataset,
                eval_split=self.eval_split,
                train_on=self.train_on,
                max_length=length,
                too_long=self.too_long,
                packing=self.packing,
                chat_template=template,
                seed=seed,
                limit=self.max_samples,
            )

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that the losses depend on (:data:`FREE` names the others)."""
        looks = any(self.values.get(name) in values for name, values in LOOKS_AT_EVALUATIONS)
        looks = looks or self.values.get("save_strategy") == "best"
        watched = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps")
        return {k: v for k, v in self.values.items() if k not in FREE or (looks and k in watched)}

    def to_yaml(self) -> str:
        """All of it, as a file that gives the same run again."""
        from importlib.metadata import version

        titles = {
            "run": "qlora finetune",
            "training": f"TrainingArguments of transformers {version('transformers')}",
            "sft": f"SFTConfig of trl {version('trl')}",
            "lora": f"LoraConfig of peft {version('peft')}",
        }
        blocks = [] if self.recipe is None else [f"# from the recipe {self.recipe}\n"]
        for section, title in titles.items():
            values = {k: v for k, v in self.section(section).items() if k != "hub_token"}
            dumped = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            blocks.append(f"# {title}\n{dumped}")
        return "\n".join(blocks)


@cache
def _untouched(section: str) -> dict[str, Any]:
    from peft import LoraConfig
    from trl import SFTConfig

    return {
        k: key.default
        for k, key in _fields(LoraConfig if section == "lora" else SFTConfig, section).items()
    }


def _untouched_default(name: str) -> Any:
    return _untouched("lora" if known_keys()[name].section == "lora" else "sft").get(name)


def _as_field(name: str, value: Any) -> Any:
    """A plain value as its dataclass field takes it (a mapping may stand for a nested config)."""
    return _coerce(known_keys()[name].hint, value) if isinstance(value, dict) else value


def resolve(overrides: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> FinetuneConfig:
    """The configuration that ``file`` (a YAML file's settings) and ``overrides`` (the command
    line's, which win) make, with defaults for the rest; a recipe that they name lies under both.

    Raises:
        BadInput: an unknown name, a value of another type, settings that cannot be honoured or
            that contradict each other, or no model or data set.
    """
    from ..recipes import lay_under

    notices: list[str] = []
    given: dict[str, Any] = {}
    for settings in (file or {}, overrides):
        given.update(_in_our_names(settings, notices))
    recipe, given = lay_under(given, notices, _in_our_names)

    keys = known_keys()
    values = {k: key.default for k, key in keys.items() if k not in REFUSED and k not in _LAYERS}
    for name, value in given.items():
        if name in REFUSED:
            _check_refused(keys[name], value)
            continue
        try:
            if str(value) == keys[name].default:  # "none" of report_to is a word, not nothing
                value = keys[name].default
            else:
                value = _plain(_coerce(keys[name].hint, value))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{name}: {error}") from error
        values[name] = value

    values["target_modules"] = _module_names(values["target_modules"])
    values["exclude_modules"] = _module_names(values["exclude_modules"])
    for name in ("model_name_or_path", "dataset_name"):
        if not values[name]:
            raise BadInput(f"{name} is missing: {keys[name].help}")
    _check(values)
    if values["lr_scheduler_type"] == "constant" and given.get("warmup_steps"):
        notices.append("warmup_steps does nothing under lr_scheduler_type constant; under "
                       "constant_with_warmup it does")  # fmt: skip
    return FinetuneConfig(values, frozenset(given) - frozenset(REFUSED), _unique(notices), recipe)


# Names that stand for other settings, and are none of the run itself.
_LAYERS = ("recipe", "scale")


def _in_our_names(settings: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    translated = _translate(settings, notices)
    _join_parts(translated, notices)
    return translated


def _check_refused(key: Key, value: Any) -> None:
    """Raises BadInput unless ``value`` is what is done anyway."""
    try:
        value = _plain(_coerce(key.hint, value))
    except (ValueError, TypeError):
        pass  # whatever it is, the reason below is the one to tell
    if value != key.default and value not in HARMLESS.get(key.name, ()):
        raise BadInput(f"{key.name} cannot be honoured: {REFUSED[key.name]}")


def _module_names(value: Any) -> Any:
    # For PEFT a string is a pattern for whole names; who gives one name means the layers called so.
    if isinstance(value, str) and value != "all-linear":
        parts = [part.strip() for part in value.split(",")]
        if all(re.fullmatch(r"\w+", part) for part in parts):
            return parts
    return value


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _check(values: Mapping[str, Any]) -> None:
    """Values that neither dataclass checks, or only once work has begun."""
    from ..formats import FORMATS, check_blocksize, get_format

    def positive(*names: str) -> None:
        for name in names:
            if values[name] is not None and values[name] <= 0:
                raise BadInput(f"{name} is {values[name]}; it must be above 0")

    positive(
        "r",
        "lora_alpha",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "max_memory_mb",
    )
    if values["max_steps"] == 0 or (values["max_steps"] < 0 and values["num_train_epochs"] <= 0):
        raise BadInput("nothing to do: give max_steps or num_train_epochs above 0")
    if not 0 <= values["lora_dropout"] < 1:
        raise BadInput(f"lora_dropout is {values['lora_dropout']}; it must be 0 or more, below 1")
    if values["learning_rate"] < 0:
        raise BadInput(f"learning_rate is {values['learning_rate']}; it must not be negative")
    if values["loss_chunk"] < 0:
        raise BadInput(f"loss_chunk is {values['loss_chunk']}; it must be 0 or more tokens")
    if values["quant_type"] != "none":
        with bad_input("quant_type"):
            get_format(values["quant_type"])
    with bad_input("blocksize"):
        check_blocksize(values["blocksize"])
    dtypes = ("float32", "bfloat16", "float16")
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for name in ("dtype", "compute_dtype"):
        value = values[name]
        if value is None or (name == "dtype" and value == "auto"):
            continue
        value = short.get(value, value).removeprefix("torch.")
        if value not in dtypes:
            auto = "auto, " if name == "dtype" else ""
            raise BadInput(f"{name} is {values[name]!r}; it may be {auto}{', '.join(dtypes)}")
        values[name] = value  # type: ignore[index]
    if values["train_sampling_strategy"] not in ("random", "sequential", "group_by_length"):
        raise BadInput(
            f"train_sampling_strategy is {values['train_sampling_strategy']!r}; it may be random, "
            "sequential or group_by_length"
        )
    if values["bf16"] and values["fp16"]:
        raise BadInput("bf16 and fp16 cannot both be true")
    if values["eval_split"] == 0 and not values["eval_dataset"]:
        wants = [
            name
            for name, idle in (("eval_strategy", "no"), ("load_best_model_at_end", False))
            if values[name] != idle
        ]
        if wants:
            raise BadInput(f"{wants[0]} needs held-out samples, but eval_split is 0")
    _check_mmlu(values)
    assert FORMATS  # the formats are registered on import


def _check_mmlu(values: Mapping[str, Any]) -> None:
    """Whether MMLU can be asked as it is wished; the files themselves are read by the run."""
    values["mmlu_split"] = {"eval": "val"}.get(values["mmlu_split"], values["mmlu_split"])  # type: ignore[index]
    if not values["do_mmlu_eval"]:
        return
    folder = values["mmlu_dataset"]
    if not folder:
        raise BadInput("do_mmlu_eval needs mmlu_dataset, the folder of MMLU's CSV files")
    if folder in ("mmlu-fs", "mmlu-zs"):
        raise BadInput(
            f"mmlu_dataset is {folder!r}; here it is the folder of MMLU's CSV files, and "
            "mmlu_shots (5 or 0) says which of the two is meant"
        )


def to_json(value: Any) -> str:
    """JSON of plain values, with all digits of a float."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"
