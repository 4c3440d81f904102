"""Models, tokenizers and adapters: where they are, and how they are loaded."""
