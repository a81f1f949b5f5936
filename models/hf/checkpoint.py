"""What Transformers makes of a checkpoint's JSON files: its configuration and image processor.

The library reads them; what it would take for granted in silence is refused here, or said.
Imports nothing heavy by itself.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tome_export.errors import InputError, MissingComponentError
from tome_export.models.preprocessing import are_numbers, crop_pct_of, in_words, is_number
from tome_export.spec import Interpolation, Preprocessing, Resize

PROCESSOR = "preprocessor_config.json"
PROCESSORS = "processor_config.json"
"""Of Transformers 5: the image processor's settings are an entry, beside the tokenizer's."""

RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of those that ``Preprocessing`` has."""

TILES = "its own processor cuts images into tiles, here they are squashed as for its first one"
NO_PROCESSOR = f"without {PROCESSOR} and {PROCESSORS}, preprocessing is its family's"

_FAMILIES = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov2_with_registers": "dinov2",
}
"""Model types that the library has no image processor for, and those whose processor they use."""

_TRACE = re.compile(r"\n?(?:C\+\+ CapturedTraceback|Exception raised from |CPU: registered at)")
_LONGEST = 300
"""Characters of what the library says that a message repeats."""

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "patch_size",
    "image_size",
)


def library() -> Any:
    """Transformers; raises a ``MissingComponentError`` where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise MissingComponentError(
            "hf: models need Transformers, which is not installed; install it with "
            "pip install 'tome-export[hf]'"
        ) from None
    return transformers


@contextmanager
def quiet() -> Iterator[Any]:
    """Transformers without its log and progress bars: what they say is a message of ours."""
    transformers = library()
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Above every level that the library logs with: its errors are raised as well.
    logging.set_verbosity(logging.CRITICAL + 1)
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def reason_of(error: Exception) -> str:
    """What an error of the library says, in one line, without torch's trace of its own C++."""
    text = _TRACE.split(str(error), maxsplit=1)[0]
    text = " ".join(text.split()) or type(error).__name__
    text = f"{text[: _LONGEST - 1]}…" if len(text) > _LONGEST else text
    return f"unknown {text}" if isinstance(error, KeyError) else text


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``; raises an ``InputError`` if it is missing or no JSON object."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"folder {folder} has no config.json; expected a checkpoint folder as it is on the hub"
        )
    return _read_object(folder / "config.json")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); get the checkpoint again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def whole(value: object, what: str) -> int:
    """A size or count, at least 1; else an ``InputError``, in which ``what`` names file and key."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} is {value!r}; expected a whole number, 1 or more")
    return value


def refuse_quantised(values: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint whose ``config.json`` says that its weights are codes."""
    halves = (values.get("vision_config"), values.get("text_config"))
    if any(isinstance(h, dict) and h.get("quantization_config") for h in (values, *halves)):
        raise InputError(
            f"weights of {where} are quantised (quantization_config in config.json), which is not "
            "supported; use the checkpoint in float32, float16 or bfloat16"
        )


def attention_of(values: Mapping[str, Any]) -> str:
    """The attention implementation that a ``config.json`` names for images, ``sdpa`` without."""
    half = values.get("vision_config")
    for config in (half if isinstance(half, dict) else {}, values):
        found = config.get("_attn_implementation") or config.get("attn_implementation")
        # One for each half.
        if isinstance(found, dict):
            found = found.get("vision_config") or found.get("")
        if found:
            return str(found)
    return "sdpa"


def vision_config(values: Mapping[str, Any], where: str) -> Any:
    """The library's configuration of a vision model, or of the vision half of a larger one."""
    given, in_file = dict(values), f"config.json of {where}"
    kind = given.pop("model_type")
    with quiet() as transformers:
        # It checks configurations with many classes of error.
        try:
            whole_model = transformers.AutoConfig.for_model(kind, **given)
        except Exception as error:
            raise InputError(
                f"{in_file} does not make a {kind} configuration "
                f"({reason_of(error)}); expected the configuration of a whole checkpoint"
            ) from None
        half = getattr(whole_model, "vision_config", None)
        config = half if isinstance(half, transformers.PretrainedConfig) else whole_model
        if config is whole_model:
            # The library keeps keys that it has no use for.
            vars(config).pop("vision_config", None)
        if config is not whole_model and "projection_dim" in given:
            config.projection_dim = whole_model.projection_dim
        activations = transformers.activations.ACT2FN
    for key in _COUNTS:
        size = getattr(config, key, 1)
        for value in size if isinstance(size, list | tuple) else (size,):
            whole(value, f"{in_file}: {key}")
    if config.hidden_act not in activations:
        raise InputError(
            f"{in_file}: hidden_act is {config.hidden_act!r}; expected an activation "
            "of Transformers, such as quick_gelu"
        )
    if not 0 < config.layer_norm_eps < math.inf:
        raise InputError(
            f"{in_file}: layer_norm_eps is {config.layer_norm_eps}; expected a number above 0"
        )
    config._attn_implementation = attention_of(values)
    # Models are made in float32, whatever they are stored in.
    config.dtype = None
    return config


def processor_of(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The file with a folder's image processor, and its settings; None if there is none.

    ``processor_config.json`` goes first, as in Transformers, if it has an image processor's entry.
    """
    if (folder / PROCESSORS).is_file():
        found = _read_object(folder / PROCESSORS).get("image_processor")
        if isinstance(found, dict):
            return PROCESSORS, found
        if found is not None:
            raise InputError(
                f"{folder / PROCESSORS}: image_processor is {found!r}; expected a JSON object"
            )
    if (folder / PROCESSOR).is_file():
        return PROCESSOR, _read_object(folder / PROCESSOR)
    return None


def preprocessing_of(
    folder: Path, kind: str, family: Preprocessing, where: str
) -> tuple[Preprocessing, str]:
    """Preprocessing as a folder's image processor does it, and what it cannot express or left out.

    ``kind`` is the model type, whose processor is used where none is named; ``family`` is what
    holds where the file is silent, with the model's channels.
    """
    settings = processor_of(folder)
    if settings is None:
        return family, without_processor(family)
    file, given = settings
    where = f"{file} of {where}"
    values = _processor(given, kind, family, where)
    channels = family.input_size[0]
    factor = values.get("rescale_factor", 1 / 255)
    if not is_number(factor) or not 0 < factor <= 1:
        raise InputError(f"{where}: rescale_factor is {factor!r}; expected 1/255")
    if not values.get("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise _refused(where, "pixels that are not scaled to [0, 1]")
    mean, std = (0.0,) * channels, (1.0,) * channels
    if values.get("do_normalize", True):
        mean = _per_channel(values["image_mean"], "image_mean", channels, where)
        std = _per_channel(values["image_std"], "image_std", channels, where)
        if min(std) <= 0:
            raise InputError(f"{where}: image_std is {std}; expected numbers above 0")
    number = values.get("resample", 3)
    if not isinstance(number, int) or number not in RESAMPLING:
        raise _refused(where, f"PIL's resampling {number}")
    if not values.get("do_resize", True):
        raise _refused(where, "images that are not resized")
    side, edge, resize = _sides(values, where)
    if edge < min(side):
        raise _refused(where, f"a cut of {side[0]} x {side[1]} out of images of {edge}")
    found = Preprocessing(
        (channels, *side), mean, std, crop_pct_of(side[0], edge), RESAMPLING[number], resize
    )
    found = replace(found, crop_offset="floor")
    if values.get("do_pad"):
        # That of other processors pads a batch to its largest image, and all are of one size here.
        if values["image_processor_type"].startswith("LlavaImageProcessor"):
            found = padded(found)
        elif values.get("pad_size"):
            raise _refused(where, f"images that are padded to {values['pad_size']}")
    return found, _unsaid(file, given, values, found)


def padded(found: Preprocessing) -> Preprocessing:
    """Preprocessing that pads images to a square with their mean first, as LLaVA does."""
    # Truncated, as there.
    fill = tuple(int(level * 255) for level in found.mean)
    return replace(found, resize="pad", fill=fill)


def without_processor(family: Preprocessing) -> str:
    """The remark where no file says how images are made."""
    return f"{NO_PROCESSOR}: {in_words(family)}"


def _unsaid(
    file: str, given: Mapping[str, Any], values: Mapping[str, Any], found: Preprocessing
) -> str:
    """What decides how images look and is not in the file, and what it is then."""
    norm = ("image_mean", "image_std") if values.get("do_normalize", True) else ()
    optional = [key for key in ("do_center_crop", "do_pad") if values.get(key)]
    crop = ["crop_size"] if values.get("do_center_crop") else []
    names = ("size", *crop, "resample", *optional, *norm)
    missing = [name for name in names if given.get(name) is None]
    return f"{file} names no {', '.join(missing)}: {in_words(found)}" if missing else ""


def _processor(
    given: dict[str, Any], kind: str, family: Preprocessing, where: str
) -> dict[str, Any]:
    """The image processor's attributes, those that its file leaves out among them."""
    key = next((k for k in ("image_processor_type", "feature_extractor_type") if given.get(k)), "")
    named = given.get(key, "")
    if not isinstance(named, str):
        raise InputError(
            f"{where}: {key} is {named!r}; expected the name of one of Transformers' image "
            "processors"
        )
    norm = {"image_mean": list(family.mean), "image_std": list(family.std)}
    missing = {key: value for key, value in norm.items() if given.get(key) is None}
    with quiet() as transformers, tempfile.TemporaryDirectory(prefix="tome-export-") as place:
        # The name that every version of the library reads.
        (Path(place) / PROCESSOR).write_text(json.dumps({**given, **missing}), encoding="utf-8")
        config = transformers.AutoConfig.for_model(_FAMILIES.get(kind, kind))
        try:
            made = transformers.AutoImageProcessor.from_pretrained(
                place, config=config, local_files_only=True, trust_remote_code=False
            )
            values: dict[str, Any] = made.to_dict()
        # It checks its files with as many classes of error as its configurations.
        except Exception as error:
            raise InputError(
                f"{where} makes no image processor ({reason_of(error)}); expected that of a whole "
                "checkpoint"
            ) from None
    named = named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    # The library would take its own of that model type in silence.
    if named and named != type(made).__name__.removesuffix("Fast").removesuffix("Pil"):
        raise InputError(
            f"{where} names {named}, which Transformers does not have; expected one of its image "
            "processors"
        )
    return values


def check_size(found: Preprocessing, expected: Preprocessing, folder: Path, where: str) -> None:
    """Refuse preprocessing of a folder that makes images of another size than the model takes."""
    (height, width), (tall, wide) = found.input_size[1:], expected.input_size[1:]
    if (height, width) != (tall, wide):
        file = (processor_of(folder) or (PROCESSOR,))[0]
        raise InputError(
            f"{file} of {where} makes images of {height} x {width}, and its config.json says "
            f"{tall} x {wide}; expected the same"
        )


def _per_channel(found: Any, key: str, channels: int, where: str) -> tuple[float, ...]:
    if not are_numbers(found, channels):
        found = list(found) if isinstance(found, tuple) else found
        raise InputError(f"{where}: {key} is {found!r}; expected {channels} finite numbers")
    return tuple(map(float, found))


def _sides(values: dict[str, Any], where: str) -> tuple[tuple[int, int], int, Resize]:
    """Size of the cut, length of its first side, or of the shorter one, before it, and the rule."""
    size = values.get("size") or {}
    crop: tuple[int, int] | None = None
    if values.get("do_center_crop"):
        given, what = values.get("crop_size") or {}, f"{where}: crop_size"
        edge = given.get("shortest_edge")
        crop = whole(given.get("height", edge), what), whole(given.get("width", edge), what)
    what = f"{where}: size"
    if size.get("height") is not None:
        height, width = whole(size["height"], what), whole(size.get("width"), what)
        cut = crop or (height, width)
        if height * cut[1] != width * cut[0]:
            raise _refused(where, f"a size of {height} x {width} cut to {cut[0]} x {cut[1]}")
        return cut, height, "squash"
    if size.get("shortest_edge") is None:
        raise _refused(where, f"size {size!r}")
    if crop is None:
        raise _refused(where, "images that keep their shape")
    edge = whole(size["shortest_edge"], what)
    if crop[0] != crop[1]:
        unlike = f"a cut of {crop[0]} x {crop[1]} out of images whose shorter side is {edge}"
        raise _refused(where, unlike)
    return crop, edge, "crop"


def _refused(where: str, what: str) -> InputError:
    return InputError(
        f"{where} asks for {what}, which is not supported; expected a resize to a fixed size, a "
        "centre crop, scaling to [0, 1] and normalisation"
    )
