"""A tokenizer and a model small enough to be made by hand, in the files of Hugging Face."""

from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from clustax.models import Bert, BertConfig, bert

WORDS = ("a", "the", "good", "no", "one", "two", "three", "who", "what", "is", "in", "red", "##s")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write(path: Path, text: str) -> None:
    """Writes a file, and the folders it is in, without changing the ends of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def tiny_tokenizer() -> Tokenizer:
    """BERT's way with a vocabulary of a few words and all letters."""
    letters = [each for c in "abcdefghijklmnopqrstuvwxyz0123456789.,?'é" for each in (c, f"##{c}")]
    words = dict.fromkeys((*SPECIAL, *WORDS, *letters))
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    numbers = [(name, vocabulary[name]) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*numbers)
    return tokenizer


def tiny_folder(folder: Path) -> Path:
    """Writes a random encoder of one layer, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    bert.save(Bert(config, rngs=nnx.Rngs(0)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
