"""Answers from documents: sentences found, or words from a generator, with what they rest on."""
