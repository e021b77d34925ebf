"""Answers of the teacher from a server with OpenAI's protocol."""
