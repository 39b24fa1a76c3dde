"""Text in, token ids out: corpus, tokenizers, windows."""
