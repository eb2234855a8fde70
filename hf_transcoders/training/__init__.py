"""Training dictionaries with the Hugging Face Trainer."""

from .arguments import TranscoderTrainingArguments
from .trainer import TranscoderTrainer
