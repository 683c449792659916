"""Doors: the command line and what joins the floors below."""
