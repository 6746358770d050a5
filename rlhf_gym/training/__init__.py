"""Supervised fine-tuning and reward-model training, by transformers' Trainer."""
