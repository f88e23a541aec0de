"""Where the files of Hugging Face and of CTranslate2 have the parameters of a Whisper."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from clustax.models.ctranslate2 import read_variables
from clustax.models.weights import SAFETENSORS, Place, Tensors, locate, read_safetensors


class Files(NamedTuple):
    """What the files of a model hold, and where.

    Attributes:
        config: the entries of Hugging Face's config.json, those of `WhisperConfig` among them.
        tensors: by name.
        place: maps a parameter, given as its path in the model, to its tensor.
    """

    config: dict[str, Any]
    tensors: Tensors
    place: Callable[[tuple[Any, ...]], Place]


def read(path: str | Path) -> Files:
    """Reads a model's files.

    Args:
        path: model.safetensors, its index, or model.bin with the other files beside it, or their
            folder.

    Raises:
        FileNotFoundError: if there is none of them.
        ValueError: if they do not describe a Whisper.
    """
    readers = dict.fromkeys(SAFETENSORS, _read_hugging_face) | {"model.bin": _read_ctranslate2}
    file = locate(path, tuple(readers))
    return readers[file.name](file)


def _read_hugging_face(path: Path) -> Files:
    entries = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    for name, served in _SERVED.items():
        if entries.get(name, served) != served:
            raise ValueError(
                f"{name} in the config.json beside {path} must be {served!r}, "
                f"got {entries[name]!r}: this model computes nothing else."
            )
    generation = path.with_name("generation_config.json")
    if generation.exists():  # Newer checkpoints have the suppressed tokens only there.
        entries |= json.loads(generation.read_text(encoding="utf-8"))
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        entries[name] = tuple(entries.get(name) or ())
    # Without their prefix, "model." as a rule.
    stored = read_safetensors(path).items()
    tensors = {re.sub(r"^.*?(?=(en|de)coder\.)", "", name): tensor for name, tensor in stored}
    return Files(entries, tensors, _hugging_face_place)


# What a config.json may ask for and the model has only one of.
_SERVED = {
    "model_type": "whisper",
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
}

# What the length of an axis of a tensor says in CTranslate2's files.
_SIZES = {
    "vocab_size": ("decoder/embeddings/weight", 0),
    "num_mel_bins": ("encoder/conv1/weight", 1),
    "d_model": ("encoder/conv1/weight", 0),
    "encoder_ffn_dim": ("encoder/layer_0/ffn/linear_0/weight", 0),
    "decoder_ffn_dim": ("decoder/layer_0/ffn/linear_0/weight", 0),
    "max_source_positions": ("encoder/position_encodings/encodings", 0),
    "max_target_positions": ("decoder/position_encodings/encodings", 0),
}


def _read_ctranslate2(path: Path) -> Files:
    tensors = read_variables(path, "WhisperSpec")
    heads = {f"{side}_attention_heads": f"{side}/num_heads" for side in ("encoder", "decoder")}
    needed = dict.fromkeys([*heads.values(), *(name for name, _ in _SIZES.values())])
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(
            f"{path} must hold a whole Whisper, but: {' is missing; '.join(missing)} is missing. "
            "Convert the model again."
        )
    config: dict[str, Any] = {
        entry: tensors[name].shape[axis] for entry, (name, axis) in _SIZES.items()
    }
    config |= {entry: int(tensors[name]) for entry, name in heads.items()}
    for side in ("encoder", "decoder"):
        layers = (re.match(rf"{side}/layer_(\d+)/", name) for name in tensors)
        config[f"{side}_layers"] = 1 + max(int(match[1]) for match in layers if match)
    entries = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = _vocabulary(path).index("<|endoftext|>")
    config["suppress_tokens"] = tuple(entries["suppress_ids"])
    config["begin_suppress_tokens"] = tuple(entries["suppress_ids_begin"])
    return Files(config, tensors, _ctranslate2_place)


def _vocabulary(path: Path) -> list[str]:
    """Reads the tokens beside a model.bin: JSON, or of older versions lines."""
    newer = path.with_name("vocabulary.json")
    if newer.exists():
        return json.loads(newer.read_text(encoding="utf-8"))
    return path.with_name("vocabulary.txt").read_text(encoding="utf-8").split("\n")


def _hugging_face_place(parameter: tuple[Any, ...]) -> Place:
    side, layer, module, leaf = _split(parameter)
    block = f"{side}.layers.{layer}" if layer else side
    name = _MODULES[module].hugging_face
    return Place(f"{block}.{name}.{'bias' if leaf == 'bias' else 'weight'}")


def _ctranslate2_place(parameter: tuple[Any, ...]) -> Place:
    side, layer, module, leaf = _split(parameter)
    block = f"{side}/layer_{layer}" if layer else side
    _, name, part, parts = _MODULES[module]
    leaves = {"positions": "encodings", "scale": "gamma", "bias": "bias"}
    if module.endswith("norm"):
        leaves["bias"] = "beta"
    return Place(f"{block}/{name}/{leaves.get(leaf, 'weight')}", part, parts)


def _split(parameter: tuple[Any, ...]) -> tuple[str, str | None, str, str]:
    """Returns encoder or decoder, the layer if it is in one, the module, and the last name."""
    side, *where = map(str, parameter)
    side = "encoder" if side == "embeddings" else side  # The files have no such part.
    layer = where[1] if where[0] == "layers" else None
    where = where[2:] if layer else where
    # The positions are in no module of their own.
    return side, layer, ".".join(where[:-1]) or where[-1], where[-1]


class _Module(NamedTuple):
    hugging_face: str
    ctranslate2: str
    part: int = 0
    parts: int = 1


_MODULES = {
    "conv1": _Module("conv1", "conv1"),
    "conv2": _Module("conv2", "conv2"),
    "embedding": _Module("embed_tokens", "embeddings"),
    "positions": _Module("embed_positions", "position_encodings"),
    "norm": _Module("layer_norm", "layer_norm"),
    "attention_norm": _Module("self_attn_layer_norm", "self_attention/layer_norm"),
    "attention.query": _Module("self_attn.q_proj", "self_attention/linear_0", 0, 3),
    "attention.key": _Module("self_attn.k_proj", "self_attention/linear_0", 1, 3),
    "attention.value": _Module("self_attn.v_proj", "self_attention/linear_0", 2, 3),
    "attention.output": _Module("self_attn.out_proj", "self_attention/linear_1"),
    "cross_norm": _Module("encoder_attn_layer_norm", "attention/layer_norm"),
    "cross_attention.query": _Module("encoder_attn.q_proj", "attention/linear_0"),
    "cross_attention.key": _Module("encoder_attn.k_proj", "attention/linear_1", 0, 2),
    "cross_attention.value": _Module("encoder_attn.v_proj", "attention/linear_1", 1, 2),
    "cross_attention.output": _Module("encoder_attn.out_proj", "attention/linear_2"),
    "feed_forward_norm": _Module("final_layer_norm", "ffn/layer_norm"),
    "feed_forward.intermediate": _Module("fc1", "ffn/linear_0"),
    "feed_forward.output": _Module("fc2", "ffn/linear_1"),
}
