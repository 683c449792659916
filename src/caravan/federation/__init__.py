"""Many machines: updates, their average, and the engine that carries them."""
