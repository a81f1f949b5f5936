"""Weights files: their tensors, and what is worth knowing of them, or one clear line why not."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tome_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Of weights files; PyTorch's own are one format under many names, ``.pth.tar`` among them."""

STORED = ("float32", "float64", "float16", "bfloat16")
"""Types that weights come in; anything else holds the codes of a quantisation."""

AVERAGED = (
    "state_dict_ema",
    "model_ema_state_dict",
    "ema_state_dict",
    "model_ema",
    "ema_model",
    "ema",
    "teacher",
)
"""Names of averaged weights in trainers' files: those that are evaluated, so they go first."""

PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Names of the weights of the last step."""

_COUNTS = (
    "num_batches_tracked",
    "n_averaged",
    "position_ids",
    "relative_position_index",
    "input_resolution",
    "context_length",
    "vocab_size",
)
"""Last names of whole numbers that models store beside their weights."""

# What DistributedDataParallel and common trainers put in front of every key.
_FRONTS = ("module.", "model.", "net.", "network.", "backbone.")
# torch.compile, FSDP, checkpointing and Fabric do so wherever they are used.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_DEEPEST = 4
_SHOWN = 3
_LONGEST_NAME = 200
_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, by the names of a model.

    Attributes:
        key: Where in the file they are; empty if they are all that it holds.
        beside: Other places in the file that hold tensors.
    """

    path: Path
    state: dict[str, Tensor]
    key: str = ""
    beside: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Name of the file, and which of its weights these are."""
        if not self.key:
            return self.path.name
        beside = f", not {few(list(self.beside))}" if self.beside else ""
        return f"{self.path.name}; its {self.key}{beside}"


def read_checkpoint(path: Path, key: str = "", counts: Collection[str] = ()) -> Checkpoint:
    """Read a weights file: .safetensors, or one of torch.save; no code that it holds is run.

    Trainers put weights into a dict beside other things. By the first of these rules that holds,
    the weights are: what ``key`` says; the file itself, if it is tensors by name; the first of
    ``AVERAGED`` and then ``PLAIN`` that is there; the only entry that is tensors by name. The same
    again inside that entry. Prefixes of DistributedDataParallel, torch.compile and trainers go.

    Args:
        path: The file.
        key: Names of entries joined by dots; last may be how the wanted tensors' names begin.
        counts: Names of tensors that need not be floating-point numbers, besides ``_COUNTS``.

    Raises:
        InputError: if the file is missing, of another kind, damaged, or holds no weights or
            several where it is unclear which are meant; if tensors are codes of a quantisation,
            sparse, or without values.
    """
    expected = f"a file ending in {', '.join(SUFFIXES)}"
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise InputError(
            f"weights file {str(path)[:_LONGEST_NAME]} cannot be opened ({error.strerror}); "
            f"expected {expected}"
        ) from None
    if is_folder:
        raise InputError(f"weights {path} is a folder; expected {expected}")
    if not is_file:
        raise InputError(
            f"weights file {path} does not exist; expected 'pretrained', 'random', or {expected}"
        )
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"weights file {path} ends in {path.suffix or 'nothing'!r}; expected one of "
            f"{', '.join(SUFFIXES)}"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    found = checkpoint_from_content(content, path, key)
    found = replace(found, state=_bare(found.state))
    check_stored(found.state, f"weights of {path}", counts)
    return found


def checkpoint_from_content(content: object, path: Path, key: str = "") -> Checkpoint:
    """The weights in what a file holds, by the rules of ``read_checkpoint``, but as they are."""
    at, taken = content, key
    beside: tuple[str, ...] = ()
    if key:
        at = _at(content, key)
        if at is None:
            raise InputError(
                f"weights file {path} has no {key!r}; it has {_entries(content)}: give one of "
                "these, or how the names of the wanted tensors begin"
            )
    for _ in range(_DEEPEST):
        name, others = _chosen(at, path, taken)
        if name is None:
            break
        at = at[name] if isinstance(at, Mapping) else at
        taken, beside = (f"{taken}.{name}", beside) if taken else (name, others)
    return Checkpoint(path, _tensors(at, path), taken, beside)


def _at(content: object, key: str) -> Mapping[Any, Any] | None:
    """What is under a key: an entry, entries joined by dots, or tensors whose names begin so."""
    if not isinstance(content, Mapping):
        return None
    if isinstance(found := content.get(key), Mapping):
        return found
    for dot in (match.start() for match in re.finditer(r"\.", key)):
        if (found := _at(content.get(key[:dot]), key[dot + 1 :])) is not None:
            return found
    front = f"{key}."
    names = [name for name in content if isinstance(name, str) and name.startswith(front)]
    return {name.removeprefix(front): content[name] for name in names} or None


def _entries(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    names = names or sorted({str(name).partition(".")[0] for name in content})
    return few(names) or "nothing"


def _is_state(value: object) -> bool:
    import torch

    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _chosen(content: object, path: Path, where: str) -> tuple[str | None, tuple[str, ...]]:
    """The entry that holds the weights, None if it is the whole, and others that hold tensors."""
    if not isinstance(content, Mapping) or _is_state(content):
        return None, ()
    states = [name for name, value in content.items() if isinstance(name, str) and _is_state(value)]
    known = [name for name in (*AVERAGED, *PLAIN) if isinstance(content.get(name), Mapping)]
    # An empty one, or one of other things, does not hide the weights beside it.
    usable = [n for n in known if n in states or any(_is_state(v) for v in content[n].values())]
    if name := next(iter(usable or (known if not states else ())), None):
        return name, tuple(other for other in states if other != name)
    if len(states) > 1:
        raise InputError(
            f"weights file {path} has several state dicts ({few(states)}){where and f' in {where}'}"
            "; say with --weights-key which is the model's"
        )
    return (states[0] if states else None), ()


def _tensors(content: object, path: Path) -> dict[str, Tensor]:
    import torch

    if isinstance(content, PickledObject):
        raise _refused_objects(path)
    if not isinstance(content, Mapping) or not content:
        kind = type(content).__name__ if not isinstance(content, Mapping) else "empty dict"
        raise InputError(f"weights file {path} holds a {kind}; expected a state_dict of tensors")
    if any(isinstance(value, PickledObject) for value in content.values()):
        raise _refused_objects(path)
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"weights file {path} holds a {type(value).__name__} under {key!r}; "
                "expected a state_dict of tensors"
            )
    return dict(content)


def bare_name(key: str) -> str:
    """A tensor's name without what torch.compile, FSDP and others put into it."""
    return _WRAPPERS.sub("", key)


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that they have without wrappers of training."""
    # AveragedModel counts beside the model that it holds.
    if "n_averaged" in state and len(state) > 1:
        state = {key: value for key, value in state.items() if key != "n_averaged"}
    bare = {bare_name(key): value for key, value in state.items()}
    state = bare if len(bare) == len(state) else state
    while front := next((f for f in _FRONTS if all(k.startswith(f) for k in state)), None):
        state = {key.removeprefix(front): value for key, value in state.items()}
    return state


def check_finite(state: Mapping[str, Tensor], who: str) -> None:
    """Refuse values that are not finite in float32; ``who`` is such as ``weights file X has``."""
    broken = [k for k, v in state.items() if v.is_floating_point() and not _finite(v)]
    if broken:
        raise InputError(f"{who} NaN or infinite values in {few(broken)}; expected finite weights")


def _finite(value: Tensor) -> bool:
    import torch

    value = value.float() if value.dtype == torch.float64 else value
    return bool(value.isfinite().all())


def check_stored(state: Mapping[str, Tensor], who: str, counts: Collection[str] = ()) -> None:
    """Refuse what are no plain floating-point weights, before anything is computed with them."""
    for name, value in state.items():
        if problem := _no_plain_tensor(value):
            raise InputError(
                f"{who} are stored as {problem} in {name}, which is not supported; expected dense "
                "tensors of floating-point numbers"
            )
        stored = str(value.dtype).removeprefix("torch.")
        whole = not (value.is_floating_point() or value.is_complex() or value.is_quantized)
        if whole and (name in counts or name.rpartition(".")[2] in _COUNTS):
            continue
        if stored not in STORED:
            raise InputError(
                f"{who} are stored as {stored} in {name}, which is not supported; expected "
                f"{', '.join(STORED[:-1])} or {STORED[-1]}, not quantised"
            )


def _no_plain_tensor(value: Tensor) -> str:
    """What kind of tensor has no values that can be copied one by one; empty for a plain one."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a sparse tensor ({str(value.layout).removeprefix('torch.')})"
    return "a meta tensor without values" if value.is_meta else ""


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"weights file {path} is not a whole safetensors file ({first_line(error)}); "
            "it is damaged or cut short, get it again"
        ) from None


def read_torch(path: Path, mmap: bool = False) -> object:
    """Read a file of ``torch.save``: tensors and containers.

    Objects of any other class, as trainers put their arguments beside the weights, are not made: a
    ``PickledObject`` stands in their place, and none of their code runs.

    With ``mmap``, tensors stay in the file until they are used.
    """
    import pickle
    import warnings

    import torch

    if _is_torchscript(path):
        raise InputError(
            f"weights file {path} is a TorchScript archive, which holds code and is not "
            "loaded; save the tensors of its state_dict() as .safetensors"
        )
    objects: list[Any] = list(_stand_ins(path))
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(objects):
            # It warns of pickle protocols other than its own, then reads or refuses the file.
            warnings.simplefilter("ignore")
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            return content
    except pickle.UnpicklingError as error:
        if objects or "nsupported global" in str(error) or "nsupported class" in str(error):
            raise _refused_objects(path) from None
        raise InputError(
            f"weights file {path} is not a PyTorch checkpoint of tensors; save the state_dict "
            "with torch.save, or as .safetensors"
        ) from None
    # Damaged files surface as errors of any class from torch's reader.
    except Exception as error:
        if "mmap can only be used" in str(error):
            raise InputError(
                f"weights file {path} is in PyTorch's format of before 1.6, which can only be read "
                "whole; save it again with torch.save, or as .safetensors"
            ) from None
        raise InputError(
            f"weights file {path} cannot be read ({first_line(error)}); "
            "it is damaged or cut short, get it again"
        ) from None


def _is_torchscript(path: Path) -> bool:
    """Whether a file is of ``torch.jit.save``, as OpenAI publishes CLIP."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    # Damaged archives surface as errors of any class; what reads the tensors says so.
    except Exception:
        return False


class PickledObject:
    """Stands for an object of a file, of any class, which is not made."""

    def __new__(cls, *_args: object, **_kwargs: object) -> PickledObject:
        """An empty one, whatever the object would be made of."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Nothing is kept."""

    def __setstate__(self, _state: object) -> None:
        """Nothing is kept."""


class _PickledDict:
    """Stands for a class of dicts; torch's reader fills a ``Counter`` and no dict of another."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Counter[Any]:  # type: ignore[misc]
        return Counter()


def _stand_ins(path: Path) -> Iterator[tuple[Any, str]]:
    """What takes the place of each class and function that a file names and torch does not know."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # Not in the present format, or damaged: what reads it says so.
    except Exception:
        return
    for name in names:
        is_dict = name.lower().endswith("dict") or name.endswith(".CfgNode")
        yield (_PickledDict if is_dict else PickledObject), name


def _refused_objects(path: Path) -> InputError:
    return InputError(
        f"weights file {path} holds Python objects, which could run code and are not loaded; save "
        "the state_dict alone, or as .safetensors"
    )


def check_fit(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], who: str, expected: str
) -> None:
    """Refuse tensors that are not exactly a module's state dict, by name, shape and kind."""
    have, want = shapes_of(found), shapes_of(wanted)
    wrong = {k: (have[k], want[k]) for k in want if k in have and have[k] != want[k]}
    missing = [key for key in want if key not in have]
    unexpected = [key for key in have if key not in want]
    if text := misfit(missing, unexpected, wrong):
        fronts = (key.removesuffix(f".{want_key}") for want_key in list(want)[:1] for key in have)
        inside = [f for f in fronts if f not in have and all(f"{f}.{k}" in have for k in want)]
        hint = f" (it is all there under {few(inside)}: say so with --weights-key)" * bool(inside)
        raise InputError(f"{who}: {text}; expected {expected}{hint}")
    for key, value in wanted.items():
        if value.is_floating_point() != found[key].is_floating_point():
            got, expected_type = (str(v.dtype).removeprefix("torch.") for v in (found[key], value))
            raise InputError(f"{who}: {key} is {got}; expected {expected_type}")


def misfit(
    missing: Iterable[str],
    unexpected: Iterable[str],
    wrong: Mapping[str, tuple[Iterable[int], Iterable[int]]],
) -> str:
    """How tensors differ from those of a module, in words; empty if they do not.

    ``wrong`` has shapes as they are and as the module has them, by name.
    """
    names = (("missing", list(missing)), ("unexpected", list(unexpected)))
    if parts := [f"{len(keys)} {what} ({few(keys)})" for what, keys in names if keys]:
        return f"keys {' and '.join(parts)}"
    shapes = [f"{key}: got {list(a)} expected {list(b)}" for key, (a, b) in wrong.items()]
    return f"{len(shapes)} wrong shapes ({few(shapes, '; ')})" if shapes else ""


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(value.shape) for name, value in state.items()}


def few(items: list[str], separator: str = ", ") -> str:
    """The first few of a list, for a message."""
    more = f"{separator}…" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its class if it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def stored_dtype(tensors: Iterable[Tensor]) -> str:
    """``float32``, ``float16`` or ``bfloat16``: the type that most of a checkpoint's values have.

    A checkpoint in half precision may keep a norm or a scale in float32, and one in float32 a
    table in half: a single tensor says nothing. Any other type counts as ``float32``.
    """
    values: Counter[str] = Counter({"float32": 0})
    for tensor in tensors:
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            values[name if name in _HALF else "float32"] += tensor.numel()
    return max(values, key=lambda name: values[name])


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return sha256_of_stream(stream)


def sha256_of_stream(stream: BinaryIO) -> str:
    """SHA-256 of what is left of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
