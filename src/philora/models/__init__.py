"""Models, tokenizers and adapters: finding and loading them."""
