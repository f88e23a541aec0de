"""Encoders that take their attention as an argument, and the loaders of their pretrained weights.

>>> from clustax.models import Bert, BertConfig
>>> BertConfig().num_hidden_layers
12
"""

from clustax.models.bert import Bert as Bert
from clustax.models.bert import BertConfig as BertConfig
from clustax.models.bert import load as load
