"""Words: records, files, the catalogue and client shards; no tensor of a model."""
