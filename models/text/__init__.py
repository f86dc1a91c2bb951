"""From prompts to conditions: tokenizers, what is read with which text encoder, and how their states are
joined."""
