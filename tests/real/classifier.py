"""Makes a tiny BERT that tells classes apart: 2 layers of random weights, whose probabilities are each for themselves.

Run as a program, since it imports torch: `python tests/real/classifier.py FOLDER`.
"""

import sys
from pathlib import Path

CLASSES = ("safe", "toxic", "threat")
_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] you are a nice person fine bad i will hurt them the what"


def make(folder: Path) -> None:
    """Write the folder as Hugging Face does."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz.,!?"
    vocabulary = [
        *_WORDS.split(),
        *(one for one in letters if one not in _WORDS.split()),
        *(f"##{one}" for one in letters),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(1)
    configuration = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=128, initializer_range=0.6, problem_type="multi_label_classification",
        id2label=dict(enumerate(CLASSES)), label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    BertForSequenceClassification(configuration).save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
