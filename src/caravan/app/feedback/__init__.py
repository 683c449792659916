"""Marks become training examples, and a folder's versions come and go by what they find."""
