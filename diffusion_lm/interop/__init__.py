"""Reads and writes released checkpoints: Hugging Face folders, GGUF files, T5X checkpoints, PEFT adapters."""
