"""Merging inside a whole model: a backbone, and a head that needs features of every patch.

The model's own forward runs as its library wrote it, on a shallow copy in which only the blocks of
the backbone are others. They hand the merged tokens to each other out of sight, and give the code
around them the features of every token, those of one group alike (ToMe, arXiv 2210.09461, section
3.2: unmerging). So the head reads what it always reads, wherever it reads it, and what nobody reads
is no part of an exported graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.plan import unmerge
from tome_export.merge.schedule import Schedule
from tome_export.patch.base import MergedModel
from tome_export.patch.checks import COPYABLE, MakeZeros, check_unhooked, count_macs
from tome_export.patch.heads import OutputChoice
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.precision import copy_sharing_weights
from tome_export.spec import ENTROPY, INPUT_NAME, SOURCE_MAP
from tome_export.weights.files import first_line

UNNAMED = "map"
"""Name of the output of a model that gives a tensor without one."""

IMAGES = 2
"""Images of the pass that only looks at shapes."""

BlockForward = Callable[..., Any]


class MergedWholeModel(MergedModel):
    """A whole model whose backbone merges tokens; see ``MergedModel``.

    The output is the model's own, a tensor ``[B, ...]`` of three or more axes.

    Attributes:
        map_name: What the model calls its output; ``map`` if it gives a tensor without a name.
    """

    def __init__(
        self, model: nn.Module, settings: MergeSettings, family: Any, backbone: nn.Module
    ) -> None:
        name = type(model).__name__
        check_unhooked(model, name)
        _check_settings(settings, name)
        inner: MergedModel = family(backbone, MergeSettings(Schedule(0), settings.prop_attn))
        # Not registered: its weights are those of the model.
        self._inner = (inner,)
        layers = {id(block): layer for layer, block in enumerate(inner.blocks)}
        # A model may know its blocks by several names.
        self._block_places = {
            place: layers[id(part)]
            for place, part in model.named_modules(remove_duplicate=False)
            if id(part) in layers
        }
        super().__init__(model, settings, inner.layout)
        self.map_name, shape, self._outside_macs = self._tried()
        patches = inner.layout.tokens - inner.layout.prefix
        tokens = [(count, inner.layout.width) for count in (patches, inner.layout.tokens)]
        if len(shape) not in (2, 3) or shape in tokens:
            raise InputError(
                f"model {name} gives {self.map_name} {list(shape)} for an image; of a model with a "
                "head of its own a map is expected, [rows, columns] or [channels, rows, columns]: "
                "give the library's own class of a classifier or tower (--dense gives features of "
                "patches)"
            )

    def _tried(self) -> tuple[str, tuple[int, ...], int]:
        """Name and shape of the output for one image, and MACs outside the blocks."""
        found: list[tuple[str, Tensor]] = []

        who = f"model {type(self.model).__name__}"
        # What a model keeps of a pass without data must not stay in it.
        try:
            model = copy_sharing_weights(self.model).eval()
        except Exception as error:
            raise InputError(f"{who} cannot be copied ({first_line(error)}); {COPYABLE}") from error
        places = dict(model.named_modules(remove_duplicate=False))
        passing = {p: _stand_in(places[p], _passing_on(places[p])) for p in self._block_places}

        def outside(zeros: MakeZeros) -> None:
            output = with_parts(model, passing)(zeros(IMAGES, *self.input_size))
            found.append(own_output(output, type(model).__name__))

        try:
            macs = count_macs(model, outside)
        except InputError:
            raise
        # It is the user's code that runs.
        except Exception as error:
            raise InputError(
                f"{who} cannot be traced: its forward fails with {type(error).__name__}: "
                f"{first_line(error)}; expected one that takes images of {list(self.input_size)} "
                "whatever their pixels are"
            ) from error
        name, example = found[0]
        if example.shape[:1] != (IMAGES,):
            raise InputError(
                f"{who} gives {name} {list(example.shape)} for {IMAGES} images; expected one map "
                "for each, images first"
            )
        return name, tuple(example.shape[1:]), macs // IMAGES

    @property
    def backbone(self) -> nn.Module:
        """The library's model inside whose tokens merge."""
        return self._inner[0].backbone

    @property
    def output_choice(self) -> OutputChoice:
        """Neither classes nor features, but what the head makes of the patches."""
        why = f"the model's own head makes {self.map_name} of the features of all patches"
        return OutputChoice(classifies=False, why=why)

    @property
    def tracks(self) -> bool:
        """The head needs the features of every patch."""
        return True

    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The model's own forward, its backbone merging with ``merger``."""
        state = _Blocks(self, self._inner[0], merger)
        blocks = [
            _stand_in(block, state.forward_of(layer)) for layer, block in enumerate(self.blocks)
        ]
        parts = {place: blocks[layer] for place, layer in self._block_places.items()}
        output = with_parts(self.model, parts)(pixel_values)
        state.check_done()
        return own_output(output, type(self.model).__name__)[1]

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the model itself gives."""
        return own_output(self.model(pixel_values), type(self.model).__name__)[1]

    def fixed_macs(self, tokens: int) -> int:  # noqa: ARG002
        """Those of embedding and head, which sees every patch, whatever is merged."""
        return self._outside_macs


class _Blocks:
    """The blocks of one forward pass: the merged tokens on their way from each to the next."""

    def __init__(self, model: MergedWholeModel, inner: MergedModel, merger: Merger) -> None:
        self.model, self.inner, self.merger = model, inner, merger
        self.who = f"model {type(model.model).__name__}"
        self.tokens: Tokens | None = None
        self.shown: Tensor | None = None
        self.version = 0
        self.done = 0

    def forward_of(self, layer: int) -> BlockForward:
        """What one block does in place of its own forward."""
        as_tuple = _gives_tuple(self.model.blocks[layer])

        def forward(x: Tensor, *more: Any, **named: Any) -> Any:
            given = any(isinstance(value, Tensor) for value in (*more, *named.values()))
            # Where a forward is traced, Transformers makes a mask that masks nothing.
            if given and not _is_traced(x):
                raise InputError(
                    f"{self.who} gives its backbone's blocks a mask "
                    "or another tensor beside the tokens, which merging would leave out; it is not "
                    "supported"
                )
            found = self._run(layer, x)
            return (found,) if as_tuple else found

        return forward

    def _run(self, layer: int, x: Tensor) -> Tensor:
        model, expected = self.model, self.model.layout.tokens
        if layer != self.done:
            raise InputError(
                f"{self.who} runs block {layer} of its backbone where "
                f"block {self.done} is expected; expected every block once and in order"
            )
        if layer == 0 and x.shape[1:-1] != (expected,):
            raise InputError(
                f"{self.who} gives its backbone's blocks "
                f"{list(x.shape[1:-1])} tokens of an image, and its configuration {expected}; "
                "expected images of the size that the backbone is configured for"
            )
        if layer > 0 and (x is not self.shown or _version(x) != self.version):
            raise InputError(
                f"{self.who} changes tokens ahead of block {layer} of its "
                "backbone, which would be lost on the merged ones; it is not supported"
            )
        tokens = Tokens(x) if self.tokens is None else self.tokens
        tokens = self.merger.ahead(tokens, layer)
        bias = model.size_bias(tokens)
        tokens = self.inner.run_block(model.blocks[layer], tokens, bias, self.merger, layer)
        self.tokens = tokens = self.merger.behind(tokens, layer)
        self.done += 1
        places = self.merger.positions
        # Never the tokens themselves: what is done to them in place would be right without merging.
        shown = tokens.x.clone() if places is None else unmerge(tokens.x, places)
        self.shown, self.version = shown, _version(shown)
        return shown

    def check_done(self) -> None:
        """Refuse a model that left blocks out, whose merges nothing would show."""
        if self.done != len(self.model.blocks):
            raise InputError(
                f"{self.who} runs {self.done} of the "
                f"{len(self.model.blocks)} blocks of its backbone; expected all of them: cut the "
                "others off"
            )


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place, where torch counts that."""
    return 0 if x.is_inference() or _is_traced(x) else int(x._version)


def _is_traced(x: Tensor) -> bool:
    """Whether there is no data in it, or a graph is made of what is done to it."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor) or torch.compiler.is_compiling()


def own_output(output: Any, name: str) -> tuple[str, Tensor]:
    """The one tensor that a model gives, and its name.

    It may be bare, in a tuple, or in a dictionary or a Transformers ``ModelOutput``, whose key is
    then its name; entries of None do not count.

    Raises:
        InputError: if there is another number of them, or something else.
    """
    entries: list[tuple[str, Any]] = [(UNNAMED, output)]
    if isinstance(output, Mapping):
        entries = [(str(key), value) for key, value in output.items() if value is not None]
    elif isinstance(output, tuple | list):
        entries = [(UNNAMED, value) for value in output if value is not None]
    if len(entries) != 1 or not isinstance(entries[0][1], Tensor):
        kinds = {k: "a tensor" if isinstance(v, Tensor) else type(v).__name__ for k, v in entries}
        what = ", ".join(f"{key} ({kind})" for key, kind in kinds.items()) or "nothing"
        raise InputError(
            f"model {name} gives {what}; expected one tensor, alone or in a dictionary with its "
            "name: return only what is to be served"
        )
    key, tensor = entries[0]
    if not tensor.is_floating_point():
        raise InputError(
            f"model {name} gives {key} of {str(tensor.dtype).removeprefix('torch.')}; expected "
            "floating-point numbers: of classes the scores, [classes, rows, columns], and not the "
            "best one"
        )
    if not key.isidentifier() or key in (INPUT_NAME, SOURCE_MAP, ENTROPY):
        raise InputError(
            f"model {name} calls its output {key!r}; expected a name of letters, digits and _ "
            f"other than {INPUT_NAME}, {SOURCE_MAP} and {ENTROPY}"
        )
    return key, tensor


def with_parts(module: Any, parts: Mapping[str, nn.Module]) -> Any:
    """A copy of a module with others in some places, such as ``encoder.layer.0``.

    Only the modules on the way there are copied, without what they hold: everything else, weights
    too, is that of the module itself, which is left as it is.
    """
    if "" in parts:
        return parts[""]
    made = copy.copy(module)
    made.__dict__["_modules"] = children = dict(module._modules)
    inside: dict[str, dict[str, nn.Module]] = {}
    for place, part in parts.items():
        child, _, rest = place.partition(".")
        inside.setdefault(child, {})[rest] = part
    for child, some in inside.items():
        children[child] = with_parts(children[child], some)
    return made


def _stand_in(block: nn.Module, forward: BlockForward) -> nn.Module:
    """A block of the same class with another forward.

    It has no parts, in which the library might put hooks of its own, and hooks of its own.
    """
    made = copy.copy(block)
    made.__dict__["_modules"] = {}
    made.__dict__["_forward_hooks"] = block._forward_hooks.copy()
    made.__dict__["forward"] = forward
    return made


def _passing_on(block: nn.Module) -> BlockForward:
    as_tuple = _gives_tuple(block)
    return lambda x, *_, **__: (x,) if as_tuple else x


def _gives_tuple(block: nn.Module) -> bool:
    """Whether the library's block gives a tuple, as those of transformers 4 say they do."""
    return "uple" in str(type(block).forward.__annotations__.get("return", ""))


def _check_settings(settings: MergeSettings, name: str) -> None:
    """Refuse forms of output that a model with a head of its own has none of."""
    for given, option in ((settings.dense, "--dense"), (settings.compressor, "--compress")):
        if given:
            raise InputError(
                f"{option} is for features, and model {name} gives a map by a head of its own; "
                f"leave {option} out"
            )
    if settings.reducer.drops:
        raise InputError(
            f"reducer {settings.reducer.name} drops tokens, so not every patch has features for "
            f"the head of model {name}; use a reducer that merges, such as tome"
        )


def backbone_inside(model: nn.Module, backbones: Mapping[str, Any]) -> tuple[Any, nn.Module] | None:
    """The one backbone inside a model and its family, by full names of classes; None without one.

    Raises:
        InputError: if there are several.
    """
    found: dict[str, tuple[Any, nn.Module]] = {}
    for place, part in model.named_modules():
        cls = type(part)
        family = backbones.get(f"{cls.__module__}.{cls.__qualname__}")
        if family is not None and place and not any(f"{place}.".startswith(f"{p}.") for p in found):
            found[place] = family, part
    if len(found) > 1:
        raise InputError(
            f"model class {type(model).__name__} has {len(found)} backbones "
            f"({', '.join(found)}); expected one whose tokens merge"
        )
    return next(iter(found.values()), None)
