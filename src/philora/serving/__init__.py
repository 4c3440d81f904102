"""Chat in the terminal, in the browser and over an API like OpenAI's."""
