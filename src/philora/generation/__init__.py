"""Answers of a model: the decoder, batches of prompts, sampling, conversations."""
