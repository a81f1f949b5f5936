"""Options of commands as fields of dataclasses, and commands whose help groups them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import click

from tome_export.reducers import DEFAULT, REDUCERS
from tome_export.spec import PRECISIONS, Activation, ImageSize, Precision

if TYPE_CHECKING:
    from tome_export.engine import EngineOptions

Request = TypeVar("Request")


def memory(text: str) -> int:
    """Bytes of a size with its binary unit, such as ``512MiB`` or ``4GiB``."""
    found = re.fullmatch(r"(\d+)\s*([mg])(?:ib?|b)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a size with a unit, such as 512MiB or 4GiB")
    return int(found[1]) << {"m": 20, "g": 30}[found[2].lower()]


def integers(expected: str) -> Callable[[Any], tuple[int, ...]]:
    """A parser of whole numbers with commas between them, each kept once."""

    def parse(value: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):  # a default
            return value
        try:
            return tuple(dict.fromkeys(map(int, value.split(","))))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of {expected}") from None

    return parse


batch_sizes = integers("batch sizes such as 1,8,32")


class File(click.Path):
    """The path of a file or folder; an empty one would be the current folder."""

    def convert(self, value: Any, param: Any, context: Any) -> Any:
        """A path as it is given."""
        if value == "":
            self.fail("an empty name; give a path, . for the current folder", param, context)
        return super().convert(value, param, context)


FILE = File(path_type=Path)


HEADINGS = (
    "Target",
    "Images",
    "Model",
    "Merging",
    "Merging across the frames of a video",
    "What the graph takes and gives",
    "Policy",
    "Precision",
    "Engine",
    "Measuring",
    "Check",
    "Pictures",
    "Server",
    "Output",
)
"""Headings of a command's help, in their order."""


class Option(click.Option):
    """An option with its heading."""

    heading = HEADINGS[-1]


def option(*flags: str, heading: str | None = None, **settings: Any) -> Any:
    """An option as the field of a group, by default ``--field-name`` with the field's type."""
    return field(metadata={"flags": flags, "heading": heading, "settings": settings})


class Group:
    """Options of a command as a frozen dataclass; the docstring of a subclass is their heading."""

    options: ClassVar[list[Option]] = []

    def __init_subclass__(cls) -> None:
        heading, types = inspect.cleandoc(cls.__doc__ or "").rstrip("."), get_type_hints(cls)
        own = [
            _click_option(heading, name, types[name], **value.metadata)
            for name, value in vars(cls).items()
            if isinstance(value, Field)
        ]
        bases = [base for base in cls.__bases__ if issubclass(base, Group)]
        cls.options = [*own, *(one for base in bases for one in base.options)]
        dataclass(frozen=True)(cls)

    def request(self, kind: Callable[..., Request], **given: Any) -> Request:
        """A dataclass of what is given and of the options that have the names of its fields."""
        names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
        return kind(**{name: value for name, value in vars(self).items() if name in names} | given)


def _click_option(
    group: str, name: str, hint: Any, *, flags: Any, heading: str | None, settings: Any
) -> Option:
    settings = {"show_default": bool(settings.get("default")), **settings}
    flag = f"--{name.replace('_', '-')}"
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
        settings.setdefault("default", None)
    if hint is bool:
        settings["is_flag"] = True
        flag += f"/--no-{flag[2:]}" if "default" in settings else ""
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
        settings.setdefault("multiple", "type" not in settings)
    if get_origin(hint) is Literal:
        hint = click.Choice(get_args(hint))
    settings.setdefault("type", FILE if hint is Path else hint)
    made = Option([*(flags or [flag]), name], **settings)
    made.heading = heading or group
    return made


def _set_verbose(context: click.Context, _param: click.Parameter, value: bool) -> None:
    context.obj.verbose |= value


def _common_options() -> list[Option]:
    """Options of every command; main() looks for two itself, as errors may precede parsing."""
    common: Any = {"is_flag": True, "expose_value": False}
    verbose = "Show what happens within each stage."
    return [
        Option(["--json"], help="Print one JSON object.", **common),
        Option(["-v", "--verbose"], callback=_set_verbose, help=verbose, **common),
        Option(["--debug"], help="Show tracebacks and library output.", **common),
    ]


class Command(click.Command):
    """A command whose help has its options by heading, and an example at the end."""

    def __init__(self, *arguments: Any, example: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.example = example

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each heading."""
        rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for parameter in self.get_params(context):
            row = parameter.get_help_record(context)
            if row is not None and isinstance(parameter, click.Option):
                rows[getattr(parameter, "heading", Option.heading)].append(row)
        for heading, listed in rows.items():
            if listed:
                with formatter.section(heading):
                    formatter.write_dl(listed)

    def format_epilog(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example on a line of its own, which is not wrapped."""
        formatter.write(f"\nExample:\n  {self.example}\n")


def grouped_command(
    name: str, short_help: str, *, example: str
) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function that takes a terminal, arguments and ``options``, a group."""

    def decorate(function: Callable[..., None]) -> Command:
        group = get_type_hints(function).get("options")
        options: list[Option] = group.options if group else []

        @click.pass_obj
        def callback(terminal: Any, /, **given: Any) -> None:
            if group:
                names = [str(one.name) for one in options]
                given["options"] = group(**{name: given.pop(name) for name in names})
            function(terminal, **given)

        return Command(
            name,
            callback=callback,
            params=[
                *reversed(getattr(function, "__click_params__", ())),
                *options,
                *_common_options(),
            ],
            help=inspect.getdoc(function),
            short_help=short_help,
            example=example,
        )

    return decorate


class WeightsGroup(Group):
    """Model."""

    weights: str = option(
        default="pretrained",
        metavar="pretrained|random|PATH",
        help="PATH: a .safetensors file, or a .pth, .ckpt or .pth.tar file of tensors.",
    )
    weights_key: str = option(
        default="",
        metavar="KEY",
        help="Which of the weights in PATH.  [default: averaged ones (EMA) before plain ones]",
    )
    activation: Activation | None = option(
        help="What makes scores of the model's output; none: a regression's numbers.  [default: "
        "what the model says]"
    )


class ImageSizeGroup(Group):
    """Model."""

    image_size: ImageSize | None = option(
        type=ImageSize.parse,
        metavar="HxW",
        help="Height and width of the images, such as 448x224, or one number; positions are "
        "resampled for it.  [default: the model's own]",
    )


class ReducerGroup(Group):
    """Merging."""

    reducer: str = option(
        type=click.Choice(list(REDUCERS)),
        default=DEFAULT,
        help="How tokens become fewer; see docs/reducers.md.",
    )
    reducer_options: tuple[str, ...] = option(
        "--reducer-option", metavar="KEY=VALUE", help="An option of the reducer; repeatable."
    )


class PrecisionGroup(Group):
    """Precision."""

    fp16: bool = option(help="Half precision.")
    bf16: bool = option(help="bfloat16.")
    fp32: bool = option(help="Single precision, the default.")

    @property
    def precision(self) -> Precision:
        """The one precision that was asked for; fp32 if none was, a usage error if several were."""
        asked = [name for name in PRECISIONS if getattr(self, name)]
        if len(asked) > 1:
            raise click.UsageError(f"--{' and --'.join(asked)} exclude each other; give one")
        return asked[0] if asked else "fp32"


class EngineGroup(Group):
    """Engine."""

    workspace_bytes: int | None = option(
        "--workspace",
        type=memory,
        metavar="SIZE",
        help="Most scratch memory of the engine, such as 512MiB or 4GiB.",
    )
    optimization_level: int | None = option(
        metavar="0-5", help="0 builds fastest, 5 searches longest.  [default: 3]"
    )
    timing_cache: Path | None = option(
        metavar="FILE", help="Tactic timings, read if there and written after the build (TensorRT)."
    )
    version_compatible: bool = option(
        help="The engine also runs on later TensorRT of the same major version."
    )
    hardware_compatible: bool = option(
        help="The engine runs on every GPU from the Ampere generation on."
    )
    strip_weights: bool = option(
        help="Leave the weights out: those of the ONNX model are put in before the engine runs. "
        "Needs a GPU; tritonserver cannot load it."
    )
    compute_capabilities: tuple[str, ...] = option(
        "--compute-capability",
        metavar="X.Y",
        help="Build for this GPU, such as 8.9, or current; repeatable (TensorRT-RTX engines, "
        "plugin kernels).",
    )

    def engine_options(self) -> EngineOptions:
        """Engine settings, but for the batch range, which belongs to the request."""
        from tome_export.engine import EngineOptions

        return EngineOptions(**{one.name: getattr(self, one.name) for one in fields(EngineGroup)})  # type: ignore[arg-type]


class StoredWeightsGroup(Group):
    """Model."""

    weights: str | None = option(
        metavar="PATH", help="Where the weights are now, if not where they were."
    )


class QueryGroup(Group):
    """Model."""

    query: Path | None = option(
        metavar="FILE.npy",
        help="What the model takes besides images (reducer query): one vector, or one per image.",
    )


class ImagesGroup(Group):
    """Check."""

    images: Path | None = option(
        metavar="FOLDER", help="Check parity on these images.  [default: those that come along]"
    )


class LabelsGroup(Group):
    """Images."""

    labels: Path | None = option(help="Lines of 'relative/path,class' for a folder of --data.")
    classes_in_order: bool = option(
        help="Class folders, sorted, and numbers of labels are the model's classes in their order, "
        "whatever they are called."
    )


class SelfTestGroup(Group):
    """Server."""

    self_test: bool | None = option(
        help="Have a server answer about one image before anything is written.  [default: where "
        "one is on this machine]"
    )
