"""CTranslate2's model.bin, read as it is described in the source of that project."""

import struct
from pathlib import Path

import numpy as np

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def read_variables(path: str | Path, spec: str) -> dict[str, np.ndarray]:
    """Reads all variables of a model, by name; an alias names the array of its target.

    Args:
        path: the file model.bin, of format version 6.
        spec: the kind of model that it must hold, such as "WhisperSpec".

    Raises:
        ValueError: if it holds another kind of model, another version, or ends too early.
    """
    data = Path(path).read_bytes()
    offset = 0

    def number(code: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(f"<{code}", data, offset)
        offset += struct.calcsize(f"<{code}")
        return value

    def take(size: int) -> bytes:
        nonlocal offset
        if offset + size > len(data):
            raise struct.error
        offset += size
        return data[offset - size : offset]

    def string() -> str:
        return take(number("H")).rstrip(b"\0").decode()

    def variable() -> np.ndarray:
        shape = [number("I") for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        return np.frombuffer(take(number("I")), np.dtype(dtype).newbyteorder("<")).reshape(shape)

    try:
        version = number("I")
        if version != 6:
            raise ValueError(
                f"{path} must be a model.bin of version 6, got {version}: convert the model again "
                "with a current CTranslate2."
            )
        if (found := string()) != spec:
            raise ValueError(f"{path} must hold a {spec}, got {found}: take another model.")
        number("I")  # The revision of the spec only ever added variables.
        variables = {string(): variable() for _ in range(number("I"))}
        return variables | {string(): variables[string()] for _ in range(number("I"))}
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be a whole model.bin of {len(data):,} bytes or more, but it ends or "
            f"breaks at byte {offset:,}: get it again, or join its parts in order."
        ) from error
