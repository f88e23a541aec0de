"""The rivals of clustered attention, as functions and as an ``attention_fn``.

``clustax.baselines.nnx`` has the layer that :class:`Reformer` needs.
"""

from clustax.baselines.attention_fn import Exact as Exact
from clustax.baselines.attention_fn import Local as Local
from clustax.baselines.attention_fn import OracleTopk as OracleTopk
from clustax.baselines.attention_fn import Reformer as Reformer
from clustax.baselines.lsh import reformer as reformer
from clustax.baselines.softmax import exact as exact
from clustax.baselines.softmax import local as local
from clustax.baselines.softmax import oracle_topk as oracle_topk
