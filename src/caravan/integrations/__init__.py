"""Doors into other frameworks: one module each, and only that module imports the framework."""
