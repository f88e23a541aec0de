"""What clustered attention loses and costs on given activations, and which settings would do.

Everything is compared with exact attention at a sample of the queries, so that no array of T×S is
formed. A sample is drawn for each batch entry from its valid queries, the same ones for all heads.
With ``sample`` of T or more it is all of them, and the figures are exact. Where products are part
of a figure they are taken in float32 at least, at the highest precision. All but
:func:`recommend` can be used under ``jax.jit``.

>>> import jax
>>> from clustax import ClusteredAttention, diagnostics
>>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 16))  # B = 2, N = 4
>>> clusters = ClusteredAttention(num_clusters=50).cluster(query, key)
>>> diagnostics.occupancy(clusters).largest.shape
(2, 4)
"""

from clustax.diagnostics.bounds import Bound as Bound
from clustax.diagnostics.bounds import KeptMass as KeptMass
from clustax.diagnostics.bounds import distance_bound as distance_bound
from clustax.diagnostics.bounds import improvement_bound as improvement_bound
from clustax.diagnostics.bounds import kept_mass as kept_mass
from clustax.diagnostics.clusters import Occupancy as Occupancy
from clustax.diagnostics.clusters import inertia as inertia
from clustax.diagnostics.clusters import occupancy as occupancy
from clustax.diagnostics.cost import CANDIDATES as CANDIDATES
from clustax.diagnostics.cost import Recommendation as Recommendation
from clustax.diagnostics.cost import Tried as Tried
from clustax.diagnostics.cost import operations as operations
from clustax.diagnostics.cost import recommend as recommend
from clustax.diagnostics.errors import ApproximationError as ApproximationError
from clustax.diagnostics.errors import approximation_error as approximation_error
from clustax.diagnostics.errors import attention_weights as attention_weights
from clustax.diagnostics.layers import LayerFigures as LayerFigures
from clustax.diagnostics.layers import measure_layers as measure_layers
from clustax.diagnostics.sample import SAMPLE as SAMPLE
