"""The class token: its vector, its prompts, its objective, its files."""
