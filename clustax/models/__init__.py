"""Encoders that take their attention as an argument, and the loaders of their pretrained weights.

>>> from clustax.models import Bert, BertConfig, Whisper, WhisperConfig
>>> BertConfig().num_hidden_layers, WhisperConfig().encoder_layers
(12, 4)
"""

from clustax.models.audio import log_mel as log_mel
from clustax.models.bert import Bert as Bert
from clustax.models.bert import BertConfig as BertConfig
from clustax.models.bert import BertForMaskedLM as BertForMaskedLM
from clustax.models.bert import BertForQuestionAnswering as BertForQuestionAnswering
from clustax.models.bert import BertForSequenceClassification as BertForSequenceClassification
from clustax.models.encoder import Encoder as Encoder
from clustax.models.encoder import EncoderLayer as EncoderLayer
from clustax.models.whisper import Whisper as Whisper
from clustax.models.whisper import WhisperConfig as WhisperConfig
