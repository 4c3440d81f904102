"""Generate answers: the decoder, batches of prompts, sampling, conversations."""
