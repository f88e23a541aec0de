"""The figures of each attention in a model that runs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

from flax import nnx
from jaxtyping import Array

from clustax import validation
from clustax.attention_fn import ClusteredAttention, as_bool, of_heads
from clustax.clustering import Clusters
from clustax.diagnostics.bounds import KeptMass, kept_mass
from clustax.diagnostics.clusters import Occupancy, occupancy
from clustax.diagnostics.errors import ApproximationError, approximation_error
from clustax.diagnostics.sample import SAMPLE

Model = TypeVar("Model", bound=nnx.Module)
Out = TypeVar("Out")


class LayerFigures(NamedTuple):
    """The figures of one call of attention in a model.

    Where the call is below ``exact_below`` there is no error but that of rounding, and the other
    figures are of the clusters that would be used above.

    Attributes:
      error: see :func:`approximation_error`.
      occupancy: see :func:`occupancy`.
      kept: see :func:`kept_mass`.
    """

    error: ApproximationError
    occupancy: Occupancy
    kept: KeptMass


def measure_layers(
    model: Model,
    run: Callable[[Model], Out],
    *,
    attention: ClusteredAttention | None = None,
    sample: int = SAMPLE,
    rng: Array | None = None,
) -> tuple[Out, list[LayerFigures | None]]:
    """Runs an NNX model and measures each call of its attention.

    What the model computes stays as it is: each of its attentions is watched, and measured on the
    queries, keys and values that it gets. So clustered attention can be measured in the model that
    runs with it, where the errors of the layers below have changed its inputs; or, as
    ``attention``, before it is swapped in, each layer on its own.

    It is a pure function: what it returns are the figures of this run, also under ``jax.jit`` or
    ``nnx.jit`` around it. Layers must not be transformed within (``nnx.scan``, ``nnx.remat``, a
    ``jit`` of their own), as figures could not leave the transform. Changes of the model's state
    in the run are dropped.

    Args:
      model: one of ``clustax.models``, or any with ``flax.nnx.MultiHeadAttention`` or other modules
        whose attention is called ``attention_fn``.
      run: called with a copy of the model; ``lambda model: model(x)``, for example.
      attention: what is measured, in all layers; if None what the model attends with itself.
      sample, rng: as for :func:`approximation_error`.

    Returns:
      What ``run`` returns, and the figures of all calls in their order: one a layer in most models.
      None stands for a call of an attention that is not a ``ClusteredAttention``.

    Raises:
      ValueError: if there is nothing to measure.
      NotImplementedError: if ``attention`` is to stand for causal attention.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from clustax.models import Encoder
    >>> encoder = Encoder(2, 32, 4, rngs=nnx.Rngs(0))  # 2 layers, with exact attention
    >>> encoder.eval()
    >>> hidden = jax.random.normal(jax.random.key(0), (1, 200, 32))
    >>> out, layers = measure_layers(
    ...     encoder, lambda model: model(hidden), attention=ClusteredAttention(num_clusters=50)
    ... )
    >>> jnp.stack([layer.error.relative for layer in layers]).shape  # layers, B, N
    (2, 1, 4)
    """
    figures: list[LayerFigures | None] = []

    def watched(attention_fn):
        return _Watched(attention_fn, attention or attention_fn, sample, rng, figures)

    other = nnx.merge(*nnx.split(model))
    modules: list[Any] = [module for _, module in nnx.iter_modules(other)]
    for module in modules:
        if "attention_fns" in vars(module):
            module.attention_fns = tuple(map(watched, module.attention_fns))
        elif "attention_fn" in vars(module):
            module.attention_fn = watched(module.attention_fn)
    out = run(other)
    if all(each is None for each in figures):
        raise ValueError(
            f"model must call a ClusteredAttention in this run, got {len(figures)} calls of other "
            "attentions; pass attention=ClusteredAttention(...) to measure that in their place."
        )
    return out, figures


@dataclasses.dataclass(frozen=True, eq=False)
class _Watched:
    """An attention whose calls are measured."""

    attention_fn: Any  # what attends
    measured: Any  # what the figures are of
    sample: int
    rng: Array | None
    figures: list[LayerFigures | None]

    def cluster(self, *args: Any, **kwargs: Any) -> Clusters:
        """Finds clusters, where a layer asks for them."""
        return self.attention_fn.cluster(*args, **kwargs)

    def __call__(self, query, key, value, bias=None, mask=None, **options: Any) -> Array:
        self.figures.append(self._measure(query, key, value, bias, mask, options))
        return self.attention_fn(query, key, value, bias, mask, **options)

    def _measure(self, query, key, value, bias, mask, options) -> LayerFigures | None:
        if not isinstance(self.measured, ClusteredAttention):
            return None
        validation.not_causal(options.get("is_causal", False) and query.shape[-3] > 1)
        mask = as_bool(mask)
        names = ("query_seq_lengths", "key_value_seq_lengths")
        lengths: dict[str, Any] = {name: options.get(name) for name in names}
        # Clusters that the model shares are its own: another attention finds others.
        clusters = options.get("clusters") if self.measured is self.attention_fn else None
        if clusters is None:
            clusters = self.measured.cluster(query, key, mask, bias=bias, **lengths)
        clusters = of_heads(clusters, query.shape[-2])
        common: dict[str, Any] = {
            "scale": self.measured.scale,
            "sample": self.sample,
            "rng": self.rng,
            **lengths,
        }
        attend = partial(self.measured, clusters=clusters, precision=options.get("precision"))
        return LayerFigures(
            approximation_error(query, key, value, bias, mask, attention=attend, **common),
            occupancy(clusters),
            kept_mass(
                query,
                key,
                bias,
                mask,
                clusters=clusters,
                topk=self.measured.topk,
                num_subclusters=self.measured.num_subclusters,
                **common,
            ),
        )
