"""From prompts to conditions: tokenizers, readers of text encoders, and how their outputs are joined."""
