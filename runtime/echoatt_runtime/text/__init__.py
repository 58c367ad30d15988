"""Between text and tokens: tokenizer, chat templates, streamed text."""
