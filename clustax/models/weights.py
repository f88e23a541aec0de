"""Pretrained weights: where their files are, and how they get into a model."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
"""What Hugging Face's files are called: one, or the list of several."""

Model = TypeVar("Model", bound=nnx.Module)
Tensors = Mapping[str, np.ndarray | Array]


class Place(NamedTuple):
    """A tensor in a file; the parameter is one of its `parts` equal parts along the first axis."""

    name: str
    part: int = 0
    parts: int = 1


def locate(path: str | Path, names: Sequence[str]) -> Path:
    """Returns the path of the first of these files that is there.

    Args:
        path: a file of one of these names, or the folder of one.
        names: what the files may be called.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    for name in names:
        file = path / name if path.is_dir() else path
        if file.name == name and file.exists():
            return file
    raise FileNotFoundError(
        f"path must be one of {', '.join(names)}, or a folder with one of them, got {path}, which "
        "is none: rename the file, join its parts, or save PyTorch's as safetensors."
    )


def read_safetensors(path: Path) -> dict[str, Array]:
    """Reads all tensors by name; needs the package safetensors.

    Args:
        path: a file of tensors, or an index.json, which says what other files have them.

    Raises:
        FileNotFoundError: if a file of the index is not beside it; the message names all of them.
    """
    load_file = _safetensors(path).load_file
    if path.suffix != ".json":
        return load_file(path)
    index = json.loads(path.read_text(encoding="utf-8"))
    files = [path.with_name(name) for name in sorted(set(index["weight_map"].values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(
            f"the folder of {path} must hold all files that it lists, but: "
            f"{' is missing; '.join(missing)} is missing. Get them from the same model."
        )
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def load(
    make: Callable[[], Model],
    tensors: Tensors,
    place: Callable[[tuple[Any, ...]], Place],
    path: Path,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Returns a model with weights from a file, as float32, in evaluation mode.

    Args:
        make: makes the model with random weights.
        tensors: by name.
        place: maps a parameter, given as its path in the model, to its tensor.
        path: where the tensors are from, for messages.
        rngs: for dropout; `nnx.Rngs(0)` if None.

    Raises:
        ValueError: if tensors are missing, have the wrong shape, or hold no floating point numbers;
            the message names all of them.
    """
    # eval_shape: the weights come from the file, so none are made up first.
    model = nnx.eval_shape(make)
    problems = []
    for parameter, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        name, part, parts = place(parameter)
        transposed = parameter[-1] == "kernel"  # PyTorch stores (out, in) and (out, in, width).
        shape = variable.shape[::-1] if transposed else variable.shape
        shape = (parts * shape[0], *shape[1:])
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif (tensor := tensors[name]).shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, not {shape}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} holds {tensor.dtype}, not floating point numbers")
        else:
            chosen = np.split(np.asarray(tensor), parts)[part]
            variable.set_value(jnp.asarray(chosen.T if transposed else chosen, variable.dtype))
    if problems:
        # Parameters that share a tensor share its problem.
        raise ValueError(
            f"{path} must hold the {type(model).__name__} that its config.json describes, in "
            f"floating point, but: {'; '.join(dict.fromkeys(problems))}. "
            "Take all files from the same model."
        )
    rngs = nnx.Rngs(0) if rngs is None else rngs
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout) and module.rate:
            module.rngs = rngs.dropout.fork()  # Its random state was a shape only, too.
    model.eval()
    return model


def save(model: nnx.Module, place: Callable[[tuple[Any, ...]], Place], path: Path) -> None:
    """Writes the weights of a model where `load` finds them; needs the package safetensors.

    Args:
        model: whose weights.
        place: maps a parameter, given as its path in the model, to its tensor, of which it is all.
        path: the file.
    """
    tensors = {}
    for parameter, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        value = variable.get_value()
        # A transposed view would be written in the order of what it is a view of.
        tensors[place(parameter).name] = jnp.array(value.T if parameter[-1] == "kernel" else value)
    _safetensors(path).save_file(tensors, path)


def _safetensors(path: Path) -> Any:
    try:
        return importlib.import_module("safetensors.flax")
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package safetensors: pip install safetensors."
        ) from error
