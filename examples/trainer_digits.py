"""F-SAM in Hugging Face's Trainer, on scikit-learn's digits: a small vision transformer, no download, under a minute.

pip install "fsam_ext[transformers]" scikit-learn
python examples/trainer_digits.py                 the log is printed; checkpoints are in runs/trainer_digits
"""

from __future__ import annotations

import argparse

import numpy
import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from fsam_ext.integrations.transformers import FriendlySAMTrainer


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((numpy.argmax(prediction.predictions, 1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", default="runs", help="where checkpoints go")
    options = parser.parse_args()
    set_seed(0)
    images, digits = load_digits(return_X_y=True)
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    rows = [{"pixel_values": image, "labels": int(digit)} for image, digit in zip(pixels, digits)]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    args = TrainingArguments(
        output_dir=f"{options.runs}/trainer_digits",
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=3e-3,
        weight_decay=0.05,
        warmup_steps=20,
        logging_steps=23,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
    )
    trainer = FriendlySAMTrainer(
        ViTForImageClassification(config),
        args,
        train_dataset=rows[360:],
        eval_dataset=rows[:360],
        compute_metrics=accuracy,
        fsam={"rho": 0.05},
    )
    trainer.train()


if __name__ == "__main__":
    main()
